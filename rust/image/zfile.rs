// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The ZFile: any file, compressed in blocks of a fixed size that can be read at random.
//!
//! A header of 512 bytes, the compressed blocks, a jump table with the stored length of every block, and
//! a trailer of 512 bytes. Where the specification (docs/specs/zfile.md of containerd/overlaybd) and the
//! bytes of the original library differ, the bytes win:
//!
//! - checksums are CRC-32C without inversion before or after: the kernel's `crc32c(seed, ...)`;
//! - the digest covers all 512 bytes with the digest itself taken as 0;
//! - the CRC of a block starts from [`BLOCK_SEED`], follows the compressed bytes, and is counted in the
//!   block's jump table entry;
//! - flag 3 means that the header holds the final values, then the trailer is never read; the digests and
//!   the CRC of the jump table count only with flag 4; higher flags and reserved bytes may be garbage;
//! - there are no stored blocks: data that does not compress is a compressed block larger than its input.
//!
//! The digest of the trailer, which the original never checks, is checked here when flag 4 is set in it.
//!
//! Offsets of the structure shared by header and trailer, all integers little-endian:
//!
//! | offset | bytes | field                                                              |
//! |-------:|------:|--------------------------------------------------------------------|
//! |      0 |     8 | magic 0                                                            |
//! |      8 |    16 | magic 1                                                            |
//! |     24 |     4 | size of the structure, 96                                          |
//! |     28 |     4 | digest                                                             |
//! |     32 |     8 | flags: 0 header, 1 data, 2 sealed, 3 final, 4 digests, 5 compressed |
//! |     40 |     8 | jump table offset in bytes                                         |
//! |     48 |     8 | jump table entries                                                 |
//! |     56 |     8 | original size in bytes                                             |
//! |     64 |     4 | CRC of the jump table                                              |
//! |     68 |     4 | reserved                                                           |
//! |     72 |     4 | block size in bytes                                                |
//! |     76 |     1 | algorithm: 1 lz4, 2 zstd                                           |
//! |     77 |     1 | level                                                              |
//! |     78 |     1 | dictionary used                                                    |
//! |     79 |     5 | reserved                                                           |
//! |     84 |     4 | dictionary size in bytes                                           |
//! |     88 |     1 | blocks carry a CRC                                                 |
//! |     89 |     7 | reserved                                                           |

use zerocopy::{
    little_endian::{U32, U64},
    FromBytes as _,
};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::{Error, Reason};

/// Bytes that the header and the trailer each occupy; the first block starts here.
pub const HEADER_BYTES: usize = 512;

/// Block size in bytes at most.
pub const MAX_BLOCK_BYTES: u32 = 65536;

/// Blocks of a file at most.
pub const MAX_BLOCKS: u64 = 1_000_000_000;

/// Bytes of one jump table entry.
pub const ENTRY_BYTES: usize = 4;

/// Bytes of the CRC after a block.
pub const CRC_BYTES: u32 = 4;

/// Bytes by which compressed data can exceed its block: the room that the original gives its compressors,
/// and more than lz4 or zstd need for any block.
pub const MAX_EXPANSION: u32 = 512;

/// Seed of the CRC of a block. All others start from 0.
pub const BLOCK_SEED: u32 = 100_007;

/// Continues a CRC-32C over more bytes, without inversion before or after.
pub type Crc32c = fn(u32, &[u8]) -> u32;

pub(crate) const FLAG_HEADER: u64 = 1 << 0;
pub(crate) const FLAG_DATA: u64 = 1 << 1;
pub(crate) const FLAG_SEALED: u64 = 1 << 2;
pub(crate) const FLAG_FINAL: u64 = 1 << 3;
pub(crate) const FLAG_DIGEST: u64 = 1 << 4;
const FLAG_COMPRESSED_INDEX: u64 = 1 << 5;

pub(crate) const MAGIC0: [u8; 8] = *b"ZFile\0\x01\0";
pub(crate) const MAGIC1: [u8; 16] = *b"tuji.yyf@Alibaba";
pub(crate) const DIGEST_AT: usize = 28;
const FLAGS_AT: u64 = 32;
const INDEX_OFFSET_AT: u64 = 40;
const INDEX_SIZE_AT: u64 = 48;
const BLOCK_SIZE_AT: u64 = 72;
const ALGORITHM_AT: u64 = 76;
const DICTIONARY_AT: u64 = 78;

/// The structure that header and trailer share; offsets as in the table above.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    pub(crate) magic0: [u8; 8],
    pub(crate) magic1: [u8; 16],
    pub(crate) size: U32,
    pub(crate) digest: U32,
    pub(crate) flags: U64,
    pub(crate) index_offset: U64,
    pub(crate) index_size: U64,
    pub(crate) original_size: U64,
    pub(crate) index_crc: U32,
    pub(crate) reserved_0: U32,
    pub(crate) block_size: U32,
    pub(crate) algorithm: u8,
    pub(crate) level: u8,
    pub(crate) use_dictionary: u8,
    pub(crate) reserved_1: [u8; 5],
    pub(crate) dictionary_size: U32,
    pub(crate) verify: u8,
    pub(crate) reserved_2: [u8; 7],
}

const _: () = assert!(core::mem::size_of::<Raw>() == 96);

impl Raw {
    fn read(block: &[u8; HEADER_BYTES]) -> Option<&Self> {
        Self::ref_from_prefix(block)
            .ok()
            .map(|(raw, _)| raw)
            .filter(|raw| raw.magic0 == MAGIC0 && raw.magic1 == MAGIC1)
    }

    fn has(&self, flag: u64) -> bool {
        self.flags.get() & flag != 0
    }

    /// Whether the digest is right, or there is none.
    fn digest_is_right(&self, block: &[u8; HEADER_BYTES], crc: Crc32c) -> bool {
        !self.has(FLAG_DIGEST) || self.digest.get() == digest(block, crc)
    }
}

pub(crate) fn digest(block: &[u8; HEADER_BYTES], crc: Crc32c) -> u32 {
    let (before, rest) = block.split_at(DIGEST_AT);
    let (_, after) = rest.split_at(4);
    crc(crc(crc(0, before), &[0; 4]), after)
}

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// An lz4 block without a frame.
    Lz4,
    /// A zstd frame.
    Zstd,
}

impl Algorithm {
    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Algorithm::Lz4 => "lz4",
            Algorithm::Zstd => "zstd",
        }
    }
}

/// The header of a ZFile.
#[derive(Clone, Copy, Debug)]
pub enum Header {
    /// The final values: there is no need to read the trailer, and it may be missing.
    Final(Geometry),
    /// The values are in the trailer.
    SeeTrailer,
}

impl Header {
    /// Whether `first`, the first bytes of a file, start as a ZFile does.
    pub fn recognise(first: &[u8]) -> bool {
        first.get(..8) == Some(&MAGIC0) && first.get(8..24) == Some(&MAGIC1)
    }

    /// Reads the first 512 bytes of a file of `file_bytes` and checks everything they say.
    ///
    /// # Errors
    ///
    /// Not a header, a wrong digest, or a final header with a [`Geometry`] that cannot be.
    pub fn parse(block: &[u8; HEADER_BYTES], file_bytes: u64, crc: Crc32c) -> Result<Self, Error> {
        let raw = Raw::read(block).ok_or(Error::new(Reason::ZfileHeaderMagic, 0))?;
        if !raw.has(FLAG_HEADER) {
            return Err(Error::new(Reason::ZfileHeaderType, FLAGS_AT));
        }
        if !raw.digest_is_right(block, crc) {
            return Err(Error::new(Reason::ZfileHeaderDigest, DIGEST_AT as u64));
        }
        if raw.has(FLAG_FINAL) {
            return Geometry::check(raw, 0, file_bytes).map(Self::Final);
        }
        if !raw.has(FLAG_DATA) {
            return Err(Error::new(Reason::ZfileIndexFile, FLAGS_AT));
        }
        Ok(Self::SeeTrailer)
    }
}

/// Byte at which the trailer of a ZFile of `file_bytes` starts.
///
/// # Errors
///
/// A file that cannot hold a header and a trailer.
pub fn trailer_position(file_bytes: u64) -> Result<u64, Error> {
    file_bytes
        .checked_sub(HEADER_BYTES as u64)
        .filter(|at| *at >= HEADER_BYTES as u64)
        .ok_or(Error::new(Reason::ZfileTooShort, file_bytes))
}

/// Everything needed to read the jump table and the blocks. The values fit together and into the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    original_bytes: u64,
    index_offset: u64,
    blocks: u64,
    pub(super) index_crc: Option<u32>,
    block_bytes: u32,
    algorithm: Algorithm,
    level: u8,
    block_crc: bool,
}

impl Geometry {
    /// Reads the last 512 bytes of a file of `file_bytes` and checks everything they say.
    ///
    /// # Errors
    ///
    /// Not the trailer of a sealed file, a wrong digest, something this format does not support (compressed
    /// jump table, dictionary, other algorithms), or values that do not fit together or into the file.
    pub fn parse_trailer(
        block: &[u8; HEADER_BYTES],
        file_bytes: u64,
        crc: Crc32c,
    ) -> Result<Self, Error> {
        let at = trailer_position(file_bytes)?;
        let fail = |reason, field| Err(Error::new(reason, at.saturating_add(field)));
        let Some(raw) = Raw::read(block) else {
            return fail(Reason::ZfileTrailerMagic, 0);
        };
        if raw.has(FLAG_HEADER) {
            return fail(Reason::ZfileTrailerType, FLAGS_AT);
        }
        if !raw.has(FLAG_DATA) {
            return fail(Reason::ZfileIndexFile, FLAGS_AT);
        }
        if !raw.has(FLAG_SEALED) {
            return fail(Reason::ZfileUnsealed, FLAGS_AT);
        }
        // Nothing reads the trailer when the header is final, so this one is in use.
        if !raw.digest_is_right(block, crc) {
            return fail(Reason::ZfileTrailerDigest, DIGEST_AT as u64);
        }
        Self::check(raw, at, at)
    }

    /// Checks the values of `raw`, found at byte `at`, for a jump table that ends before `limit`.
    fn check(raw: &Raw, at: u64, limit: u64) -> Result<Self, Error> {
        let fail = |reason, field| Err(Error::new(reason, at.saturating_add(field)));
        if raw.has(FLAG_COMPRESSED_INDEX) {
            return fail(Reason::ZfileCompressedIndex, FLAGS_AT);
        }
        if raw.use_dictionary != 0 || raw.dictionary_size.get() != 0 {
            return fail(Reason::ZfileDictionary, DICTIONARY_AT);
        }
        let algorithm = match raw.algorithm {
            1 => Algorithm::Lz4,
            2 => Algorithm::Zstd,
            _ => return fail(Reason::ZfileAlgorithm, ALGORITHM_AT),
        };
        let block_bytes = raw.block_size.get();
        if !block_bytes.is_power_of_two() || block_bytes > MAX_BLOCK_BYTES {
            return fail(Reason::ZfileBlockSize, BLOCK_SIZE_AT);
        }
        let blocks = raw.index_size.get();
        if blocks > MAX_BLOCKS {
            return fail(Reason::ZfileTooManyBlocks, INDEX_SIZE_AT);
        }
        let original_bytes = raw.original_size.get();
        if original_bytes.div_ceil(u64::from(block_bytes)) != blocks {
            return fail(Reason::ZfileBlockCount, INDEX_SIZE_AT);
        }
        let index_offset = raw.index_offset.get();
        // No overflow: the number of blocks is limited above.
        let index_end = index_offset.checked_add(blocks * ENTRY_BYTES as u64);
        if index_offset < HEADER_BYTES as u64 || index_end.is_none_or(|end| end > limit) {
            return fail(Reason::ZfileIndexOutside, INDEX_OFFSET_AT);
        }
        Ok(Self {
            original_bytes,
            index_offset,
            blocks,
            index_crc: raw.has(FLAG_DIGEST).then(|| raw.index_crc.get()),
            block_bytes,
            algorithm,
            level: raw.level,
            block_crc: raw.verify != 0,
        })
    }

    /// Bytes of the file that was compressed.
    pub fn original_bytes(&self) -> u64 {
        self.original_bytes
    }

    /// Byte of the file at which the jump table starts and the blocks end.
    pub fn index_offset(&self) -> u64 {
        self.index_offset
    }

    /// Bytes of the jump table.
    pub fn index_bytes(&self) -> u64 {
        // No overflow: `check` limits the number of blocks.
        self.blocks * ENTRY_BYTES as u64
    }

    /// Number of blocks, and of jump table entries.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Bytes of a block before compression; the last one may be shorter. A power of two.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// How the blocks are compressed.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Level as stored; the original writes 0.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// Whether every block is followed by its CRC.
    pub fn has_block_crc(&self) -> bool {
        self.block_crc
    }

    /// Whether the jump table has a CRC.
    pub fn has_digest(&self) -> bool {
        self.index_crc.is_some()
    }

    /// The block that holds byte `offset` of the original file.
    pub fn block_of(&self, offset: u64) -> u64 {
        offset >> self.block_bytes.trailing_zeros()
    }

    /// Bytes of the original file in `block`; 0 beyond the last.
    pub fn decoded_bytes(&self, block: u64) -> u32 {
        let start = block.saturating_mul(u64::from(self.block_bytes));
        let left = self.original_bytes.saturating_sub(start);
        left.min(u64::from(self.block_bytes)) as u32
    }

    /// Bytes that a stored block can have at most, with its CRC.
    pub fn max_stored_bytes(&self) -> u32 {
        // No overflow: the block size is limited.
        self.block_bytes + MAX_EXPANSION + self.crc_bytes()
    }

    /// Bytes of the CRC that follows every block.
    pub(super) fn crc_bytes(&self) -> u32 {
        if self.block_crc {
            CRC_BYTES
        } else {
            0
        }
    }

    /// Checks the CRC of a stored block, if it has one, and returns the compressed data in it.
    ///
    /// # Errors
    ///
    /// A wrong CRC, or no data; the offset counts from the start of the block.
    pub fn payload<'a>(&self, stored: &'a [u8], crc: Crc32c) -> Result<&'a [u8], Error> {
        if !self.block_crc {
            return Ok(stored);
        }
        let (data, sum) = split_crc(stored)?;
        if crc(BLOCK_SEED, data) != u32::from_le_bytes(*sum) {
            return Err(Error::new(Reason::ZfileBlockCrc, data.len() as u64));
        }
        Ok(data)
    }

    /// The compressed data in a stored block, whatever its CRC says.
    ///
    /// # Errors
    ///
    /// No data.
    pub fn unchecked_payload<'a>(&self, stored: &'a [u8]) -> Result<&'a [u8], Error> {
        if !self.block_crc {
            return Ok(stored);
        }
        split_crc(stored).map(|(data, _)| data)
    }
}

fn split_crc(stored: &[u8]) -> Result<(&[u8], &[u8; CRC_BYTES as usize]), Error> {
    stored
        .split_last_chunk()
        .ok_or(Error::new(Reason::ZfileBlockTooSmall, 0))
}
