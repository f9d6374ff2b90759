// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The layer: an LSMT blob of header, data, index and trailer.
//!
//! Where the specification (docs/specs/lsmt.md of containerd/overlaybd) and the bytes of the original
//! library differ, the bytes win:
//!
//! - header and trailer are 390 bytes in a block of 4096; offset 130 is a reserved u16, version 132 and
//!   sub-version 133 are both 1; flag bits other than 0, 1, 2 and 4 do not exist;
//! - the trailer, the last 4096 bytes, is what counts: the header's index fields are 0;
//! - the index is padded with entries of offset 2^50-1, which are skipped wherever they stand; the size
//!   of the index counts them;
//! - the tag byte of an entry is not always 0 and is ignored, except that it gives away a layer whose
//!   data is in a second file (TurboOCI).
//!
//! Offsets of the structure shared by header and trailer, all integers little-endian:
//!
//! | offset | bytes | field                                                    |
//! |-------:|------:|----------------------------------------------------------|
//! |      0 |     8 | magic 0                                                  |
//! |      8 |    16 | magic 1                                                  |
//! |     24 |     4 | size of the structure, 390                               |
//! |     28 |     4 | flags: 0 header, 1 data file, 2 sealed, 4 sparse         |
//! |     32 |     8 | index offset in bytes                                    |
//! |     40 |     8 | index size in entries, padding included                  |
//! |     48 |     8 | virtual size in bytes                                    |
//! |     56 |    37 | UUID as text, NUL-terminated                             |
//! |     93 |    37 | UUID of the parent as text, NUL-terminated               |
//! |    130 |     2 | reserved                                                 |
//! |    132 |     1 | version                                                  |
//! |    133 |     1 | sub-version                                              |
//! |    134 |   256 | user tag                                                 |

use zerocopy::{
    little_endian::{U16, U32, U64},
    FromBytes as _,
};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    error::{Error, Reason},
    segment::MAX_VIRTUAL_SECTORS,
};

/// Bytes of a sector, the unit of everything in the index.
pub const SECTOR_BYTES: u64 = 512;

/// Bytes that the header and the trailer each occupy.
pub const HEADER_BYTES: usize = 4096;

/// First sector of the data section.
pub const DATA_START: u64 = HEADER_BYTES as u64 / SECTOR_BYTES;

/// Bytes of one index entry.
pub const ENTRY_BYTES: usize = 16;

/// A committed index is padded to a multiple of this many entries.
pub const PADDING_ENTRIES: u64 = 256;

/// Entries of a layer's index at most, padding included.
pub const MAX_LAYER_ENTRIES: u64 = 1_000_000;

/// Segments of a merged stack at most.
pub const MAX_MERGED_SEGMENTS: u64 = 128_000_000;

/// Flag: this is the header, not the trailer.
pub const FLAG_HEADER: u32 = 1 << 0;
/// Flag: a data file, not an index file.
pub const FLAG_DATA: u32 = 1 << 1;
/// Flag: sealed, never written again.
pub const FLAG_SEALED: u32 = 1 << 2;
/// Flag: a writable layer that is a sparse file instead of a log.
pub const FLAG_SPARSE: u32 = 1 << 4;

pub(crate) const MAGIC0: [u8; 8] = *b"LSMT\0\x01\x02\0";
pub(crate) const MAGIC1: [u8; 16] = [
    0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08, 0x4c, 0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
];
/// Bytes of the structure in both: the rest fills up.
pub const STRUCT_BYTES: usize = 390;
const FLAGS_AT: u64 = 28;
const INDEX_OFFSET_AT: u64 = 32;
const INDEX_SIZE_AT: u64 = 40;
const VIRTUAL_SIZE_AT: u64 = 48;

/// The structure that header and trailer share; offsets as in the table above.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    pub(crate) magic0: [u8; 8],
    pub(crate) magic1: [u8; 16],
    pub(crate) size: U32,
    pub(crate) flags: U32,
    pub(crate) index_offset: U64,
    pub(crate) index_size: U64,
    pub(crate) virtual_size: U64,
    pub(crate) uuid: [u8; 37],
    pub(crate) parent_uuid: [u8; 37],
    pub(crate) reserved: U16,
    pub(crate) version: u8,
    pub(crate) sub_version: u8,
    pub(crate) user_tag: [u8; 256],
}

const _: () = assert!(core::mem::size_of::<Raw>() == STRUCT_BYTES);

impl Raw {
    fn read(block: &[u8; HEADER_BYTES]) -> Option<&Self> {
        Self::ref_from_prefix(block).ok().map(|(raw, _)| raw)
    }

    fn magic_is_right(&self) -> bool {
        self.magic0 == MAGIC0 && self.magic1 == MAGIC1
    }

    fn has(&self, flag: u32) -> bool {
        self.flags.get() & flag != 0
    }
}

/// A UUID as the text in a header: 36 characters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UuidText(pub(crate) [u8; 36]);

impl UuidText {
    /// The UUID that means "none".
    pub const NIL: Self = Self(*b"00000000-0000-0000-0000-000000000000");

    /// Takes 36 characters of the form 8-4-4-4-12 hexadecimal digits, or `None`.
    pub fn new(text: &[u8]) -> Option<Self> {
        let text: [u8; 36] = text.try_into().ok()?;
        let right = text.iter().enumerate().all(|(i, c)| match i {
            8 | 13 | 18 | 23 => *c == b'-',
            _ => c.is_ascii_hexdigit(),
        });
        right.then_some(Self(text))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.0).unwrap_or("")
    }

    /// Whether this is [`UuidText::NIL`].
    pub fn is_nil(&self) -> bool {
        *self == Self::NIL
    }

    fn read(field: &[u8; 37]) -> Option<Self> {
        Self::new(field.get(..36)?)
    }
}

impl core::fmt::Debug for UuidText {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The header of a layer, or of a file of a writable pair.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Flag bits as stored.
    pub flags: u32,
    /// Start of the index in bytes; 0 except in the index file of a writable pair.
    pub index_offset: u64,
    /// Virtual size in bytes; 0 where the layer below decides.
    pub virtual_size: u64,
    /// UUID of this layer, or `None` where the field holds none.
    pub uuid: Option<UuidText>,
    /// UUID of the layer below, or `None` where the field holds none.
    pub parent_uuid: Option<UuidText>,
}

impl Header {
    /// Whether `first`, the first bytes of a blob, start as a header does.
    pub fn recognise(first: &[u8]) -> bool {
        first.get(..8) == Some(&MAGIC0) && first.get(8..24) == Some(&MAGIC1)
    }

    /// Reads the first 4096 bytes of a file and checks that they are a header.
    ///
    /// # Errors
    ///
    /// Wrong magic, or not marked as header.
    pub fn parse(block: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        let raw = Raw::read(block)
            .filter(|raw| raw.magic_is_right())
            .ok_or(Error::new(Reason::LsmtHeaderMagic, 0))?;
        if !raw.has(FLAG_HEADER) {
            return Err(Error::new(Reason::LsmtHeaderType, FLAGS_AT));
        }
        Ok(Self {
            flags: raw.flags.get(),
            index_offset: raw.index_offset.get(),
            virtual_size: raw.virtual_size.get(),
            uuid: UuidText::read(&raw.uuid),
            parent_uuid: UuidText::read(&raw.parent_uuid),
        })
    }

    /// Reads the header of a sealed layer or of the data file of a writable pair.
    ///
    /// # Errors
    ///
    /// As [`Header::parse`], and the header of an index file.
    pub fn parse_data(block: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        let header = Self::parse(block)?;
        if header.flags & FLAG_DATA == 0 {
            return Err(Error::new(Reason::LsmtHeaderIndexFile, FLAGS_AT));
        }
        Ok(header)
    }
}

/// The trailer of a sealed layer: where its index is, and what the layer is.
#[derive(Clone, Copy, Debug)]
pub struct Trailer {
    /// Start of the index, and end of the data section, in bytes of the blob.
    pub index_offset: u64,
    /// Entries of the index, padding included.
    pub entries: u64,
    /// Virtual size in bytes; 0 where the layer below decides.
    pub virtual_size: u64,
    /// UUID of this layer, or `None` where the field holds none.
    pub uuid: Option<UuidText>,
    /// UUID of the layer below, or `None` where the field holds none.
    pub parent_uuid: Option<UuidText>,
    /// Version and sub-version as stored; not checked, as the original does not.
    pub version: (u8, u8),
}

impl Trailer {
    /// Byte of a blob of `blob_bytes` at which its trailer starts.
    ///
    /// # Errors
    ///
    /// A blob that cannot hold a header and a trailer.
    pub fn position(blob_bytes: u64) -> Result<u64, Error> {
        blob_bytes
            .checked_sub(HEADER_BYTES as u64)
            .filter(|at| *at >= HEADER_BYTES as u64)
            .ok_or(Error::new(Reason::LsmtTooShort, blob_bytes))
    }

    /// Reads the last 4096 bytes of a blob of `blob_bytes` and checks everything they say.
    ///
    /// # Errors
    ///
    /// Not the trailer of a sealed layer, an index that is too large or not between header and trailer,
    /// a virtual size that entries cannot address, or a TurboOCI layer.
    pub fn parse(block: &[u8; HEADER_BYTES], blob_bytes: u64) -> Result<Self, Error> {
        let at = Self::position(blob_bytes)?;
        let fail = |reason, field: u64| Err(Error::new(reason, at.saturating_add(field)));
        let Some(raw) = Raw::read(block).filter(|raw| raw.magic_is_right()) else {
            return fail(Reason::LsmtTrailerMagic, 0);
        };
        if raw.has(FLAG_HEADER) {
            return fail(Reason::LsmtTrailerType, FLAGS_AT);
        }
        if !raw.has(FLAG_DATA) {
            return fail(Reason::LsmtTrailerIndexFile, FLAGS_AT);
        }
        if !raw.has(FLAG_SEALED) {
            return fail(Reason::LsmtUnsealed, FLAGS_AT);
        }
        let entries = raw.index_size.get();
        if entries > MAX_LAYER_ENTRIES {
            return fail(Reason::LsmtTooManyEntries, INDEX_SIZE_AT);
        }
        let index_offset = raw.index_offset.get();
        if index_offset < HEADER_BYTES as u64 || index_offset % SECTOR_BYTES != 0 {
            return fail(Reason::LsmtIndexOffset, INDEX_OFFSET_AT);
        }
        // No overflow: the number of entries is limited above.
        let index_end = index_offset.checked_add(entries * ENTRY_BYTES as u64);
        if index_end.is_none_or(|end| end > at) {
            return fail(Reason::LsmtIndexOutside, INDEX_OFFSET_AT);
        }
        // Every other writer pads the index to at least a sector.
        if at % SECTOR_BYTES != 0 {
            return fail(Reason::TurboLayer, 0);
        }
        let virtual_size = raw.virtual_size.get();
        if virtual_size.div_ceil(SECTOR_BYTES) > MAX_VIRTUAL_SECTORS {
            return fail(Reason::LsmtVirtualSize, VIRTUAL_SIZE_AT);
        }
        Ok(Self {
            index_offset,
            entries,
            virtual_size,
            uuid: UuidText::read(&raw.uuid),
            parent_uuid: UuidText::read(&raw.parent_uuid),
            version: (raw.version, raw.sub_version),
        })
    }

    /// Bytes of the index, padding included.
    pub fn index_bytes(&self) -> u64 {
        // No overflow: `parse` limits the number of entries.
        self.entries * ENTRY_BYTES as u64
    }
}

/// Virtual size of a stack, in bytes, of those that its layers record, bottom first: the topmost that is
/// not 0.
pub fn topmost_size(bottom_first: impl DoubleEndedIterator<Item = u64>) -> u64 {
    bottom_first.rev().find(|size| *size != 0).unwrap_or(0)
}

/// An index entry as stored, not checked.
///
/// u64 of offset (50 bits) and length (14 bits), u64 of stored position (55 bits), zeroed (1 bit) and
/// tag (8 bits); all in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First virtual sector.
    pub start: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// Sector of the data in the blob; the write position of its time for a zeroed entry.
    pub stored: u64,
    /// Whether the sectors read as zeros.
    pub zeroed: bool,
    /// Which file the data is in, or nothing of meaning.
    pub tag: u8,
}

impl Entry {
    /// Decodes 16 bytes.
    pub fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let [low, high]: [U64; 2] = zerocopy::transmute!(*bytes);
        let (low, high) = (low.get(), high.get());
        Self {
            start: low & MAX_VIRTUAL_SECTORS,
            sectors: (low >> 50) as u32,
            stored: high & ((1 << 55) - 1),
            zeroed: (high >> 55) & 1 != 0,
            tag: (high >> 56) as u8,
        }
    }

    /// Whether this entry only fills up the index.
    pub fn is_padding(&self) -> bool {
        self.start == MAX_VIRTUAL_SECTORS
    }

    /// Whether the data is between sector 8 and `data_end`, as the original demands it; a zeroed entry
    /// names a position there too but occupies nothing.
    pub fn data_is_inside(&self, data_end: u64) -> bool {
        let length = if self.zeroed {
            0
        } else {
            u64::from(self.sectors)
        };
        self.stored >= DATA_START
            && self
                .stored
                .checked_add(length)
                .is_some_and(|end| end <= data_end)
    }
}
