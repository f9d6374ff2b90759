// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Writing a ZFile: header and trailer. The kernel only reads.

use zerocopy::{
    little_endian::{U32, U64},
    IntoBytes as _,
};

use crate::image::zfile::{
    digest, Algorithm, Crc32c, Raw, DIGEST_AT, FLAG_DATA, FLAG_DIGEST, FLAG_FINAL, FLAG_HEADER,
    FLAG_SEALED, HEADER_BYTES, MAGIC0, MAGIC1,
};

/// What a writer records in header and trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes of a block, a power of two up to [`crate::zfile::MAX_BLOCK_BYTES`].
    pub block_bytes: u32,
    /// How blocks are compressed.
    pub algorithm: Algorithm,
    /// Whether every block is followed by its CRC.
    pub block_crc: bool,
}

/// What a writer knows when all blocks are written.
#[derive(Clone, Copy, Debug)]
pub struct Totals {
    /// Bytes of the file that was compressed.
    pub original_bytes: u64,
    /// Byte at which the jump table starts.
    pub index_offset: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// CRC of the jump table.
    pub index_crc: u32,
}

impl Options {
    /// A final header, as the original writes it when it can seek back.
    pub fn header(&self, totals: &Totals, crc: Crc32c) -> [u8; HEADER_BYTES] {
        self.encode(FLAG_HEADER | FLAG_DATA | FLAG_FINAL, totals, crc)
    }

    /// A header that leaves all values to the trailer, as the original writes it when it cannot seek back.
    pub fn first_header(&self, crc: Crc32c) -> [u8; HEADER_BYTES] {
        let nothing = Totals {
            original_bytes: 0,
            index_offset: 0,
            blocks: 0,
            index_crc: 0,
        };
        self.encode(FLAG_HEADER | FLAG_DATA, &nothing, crc)
    }

    /// The trailer.
    pub fn trailer(&self, totals: &Totals, crc: Crc32c) -> [u8; HEADER_BYTES] {
        self.encode(FLAG_DATA | FLAG_SEALED, totals, crc)
    }

    fn encode(&self, flags: u64, totals: &Totals, crc: Crc32c) -> [u8; HEADER_BYTES] {
        let raw = Raw {
            magic0: MAGIC0,
            magic1: MAGIC1,
            size: U32::new(core::mem::size_of::<Raw>() as u32),
            digest: U32::ZERO,
            flags: U64::new(flags | FLAG_DIGEST),
            index_offset: U64::new(totals.index_offset),
            index_size: U64::new(totals.blocks),
            original_size: U64::new(totals.original_bytes),
            index_crc: U32::new(totals.index_crc),
            reserved_0: U32::ZERO,
            block_size: U32::new(self.block_bytes),
            algorithm: match self.algorithm {
                Algorithm::Lz4 => 1,
                Algorithm::Zstd => 2,
            },
            level: 0,
            use_dictionary: 0,
            reserved_1: [0; 5],
            dictionary_size: U32::ZERO,
            verify: u8::from(self.block_crc),
            reserved_2: [0; 7],
        };
        let mut block = [0; HEADER_BYTES];
        block[..raw.as_bytes().len()].copy_from_slice(raw.as_bytes());
        let sum = digest(&block, crc);
        block[DIGEST_AT..DIGEST_AT + 4].copy_from_slice(&sum.to_le_bytes());
        block
    }
}
