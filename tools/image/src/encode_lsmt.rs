// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Writing a layer: entries, header and trailer. The kernel only reads.

use zerocopy::{
    little_endian::{U16, U32, U64},
    FromBytes as _, IntoBytes as _,
};

use crate::image::{
    lsmt::{
        Entry, Raw, UuidText, ENTRY_BYTES, FLAG_DATA, FLAG_HEADER, FLAG_SEALED, HEADER_BYTES,
        MAGIC0, MAGIC1, STRUCT_BYTES,
    },
    segment::{Segment, MAX_SEGMENT_SECTORS, MAX_VIRTUAL_SECTORS},
};

impl Entry {
    /// The entry that fills up an index.
    pub const PADDING: Self = Self {
        start: MAX_VIRTUAL_SECTORS,
        sectors: 0,
        stored: 0,
        zeroed: false,
        tag: 0,
    };

    /// Encodes the entry; bits that do not fit their field are lost.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let low = (self.start & MAX_VIRTUAL_SECTORS)
            | (u64::from(self.sectors & MAX_SEGMENT_SECTORS) << 50);
        let high = (self.stored & ((1 << 55) - 1))
            | (u64::from(self.zeroed) << 55)
            | (u64::from(self.tag) << 56);
        zerocopy::transmute!([U64::new(low), U64::new(high)])
    }
}

impl From<&Segment> for Entry {
    /// The entry that stores a segment, with tag 0.
    fn from(segment: &Segment) -> Self {
        Self {
            start: segment.start(),
            sectors: segment.sectors(),
            stored: segment.stored(),
            zeroed: segment.zeroed(),
            tag: 0,
        }
    }
}

/// What a writer puts into the header and the trailer.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// UUID of the layer.
    pub uuid: UuidText,
    /// UUID of the layer below, [`UuidText::NIL`] for none.
    pub parent_uuid: UuidText,
}

impl Identity {
    /// The header of a committed layer, as the original writes it.
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        self.encode(FLAG_HEADER | FLAG_DATA | FLAG_SEALED, 0, 0)
    }

    /// The trailer of a committed layer whose index of `entries` (padding included) starts at byte
    /// `index_offset`.
    pub fn trailer(&self, index_offset: u64, entries: u64) -> [u8; HEADER_BYTES] {
        self.encode(FLAG_DATA | FLAG_SEALED, index_offset, entries)
    }

    fn encode(&self, flags: u32, index_offset: u64, entries: u64) -> [u8; HEADER_BYTES] {
        let text = |uuid: &UuidText| {
            let mut field = [0; 37];
            field[..36].copy_from_slice(&uuid.0);
            field
        };
        let raw = Raw {
            magic0: MAGIC0,
            magic1: MAGIC1,
            size: U32::new(STRUCT_BYTES as u32),
            flags: U32::new(flags),
            index_offset: U64::new(index_offset),
            index_size: U64::new(entries),
            virtual_size: U64::new(self.virtual_size),
            uuid: text(&self.uuid),
            parent_uuid: text(&self.parent_uuid),
            reserved: U16::ZERO,
            version: 1,
            sub_version: 1,
            user_tag: [0; 256],
        };
        let mut block = [0; HEADER_BYTES];
        block[..STRUCT_BYTES].copy_from_slice(raw.as_bytes());
        block
    }
}

/// What the user tag of a trailer begins with where the data section begins with a tar.
const TAR_TAG: &[u8] = b"tar=";

/// Records in `trailer` that the data section begins with a tar of so many bytes, which need not be whole sectors. Other
/// readers ignore it.
pub fn set_tar_bytes(trailer: &mut [u8; HEADER_BYTES], bytes: u64) {
    let Ok((raw, _)) = Raw::mut_from_prefix(trailer) else {
        return;
    };
    raw.user_tag = [0; 256];
    let (tag, number) = raw.user_tag.split_at_mut(TAR_TAG.len());
    tag.copy_from_slice(TAR_TAG);
    let digits = core::iter::successors(Some(bytes), |rest| {
        Some(rest / 10).filter(|rest| *rest != 0)
    });
    let count = digits.clone().count();
    for (to, rest) in number.iter_mut().take(count).rev().zip(digits) {
        *to = b'0' + (rest % 10) as u8;
    }
}

/// What [`set_tar_bytes`] recorded, if that is what the user tag says.
pub fn tar_bytes(trailer: &[u8; HEADER_BYTES]) -> Option<u64> {
    let (raw, _) = Raw::ref_from_prefix(trailer).ok()?;
    let number = raw.user_tag.strip_prefix(TAR_TAG)?;
    let end = number.iter().position(|byte| *byte == 0)?;
    let (digits, rest) = number.split_at(end);
    let canonical = !digits.is_empty() && (digits.len() == 1 || !digits.starts_with(b"0"));
    if !canonical || rest.iter().any(|byte| *byte != 0) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(digit.into())
    })
}
