// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The TurboOCI layer: an index of which some entries are in the blob and others in a target, the original tar.
//!
//! Nothing in the blob says that it is one, but who writes them leaves the index as long as it is, so that the trailer mostly
//! begins off a sector. The tag of an entry, less the smallest of the layer, is 0 for the blob and 1 for the target. With
//! the target behind the data section such a layer is an ordinary one: [`rebase`] gives the index of that.

use crate::image::{
    error::{Error, Reason},
    lsmt::{Entry, Trailer, ENTRY_BYTES, HEADER_BYTES, SECTOR_BYTES},
};

/// Reads the last 4096 bytes of a blob of `blob_bytes` that may be a TurboOCI layer.
///
/// # Errors
///
/// Those of [`Trailer::parse`], without the one about such layers.
pub fn parse_trailer(block: &[u8; HEADER_BYTES], blob_bytes: u64) -> Result<Trailer, Error> {
    let at = Trailer::position(blob_bytes)?;
    // As if the index were filled up to a whole sector, as everybody else does it.
    let trailer = Trailer::parse(block, blob_bytes.next_multiple_of(SECTOR_BYTES))?;
    let end = trailer.index_offset.checked_add(trailer.index_bytes());
    match end {
        Some(end) if end <= at => Ok(trailer),
        _ => Err(Error::new(Reason::LsmtIndexOutside, at)),
    }
}

/// What is wrong with the entries of a TurboOCI layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// As of other layers.
    Format(Error),
    /// An entry, the one at this byte of the blob, is neither of the blob nor of the target.
    Tag(u64),
    /// An entry that is not in the target.
    OutsideTarget(u64),
}

/// Makes `entries`, the index of a layer with this trailer, those of a layer with the target of `target_sectors` behind its data
/// section.
///
/// # Errors
///
/// Entries whose data is in neither of the two.
pub fn rebase(
    entries: &mut [[u8; ENTRY_BYTES]],
    trailer: &Trailer,
    target_sectors: u64,
) -> Result<(), Wrong> {
    let head = trailer.index_offset / SECTOR_BYTES;
    let decoded = entries.iter().map(Entry::decode);
    let used = decoded.filter(|entry| !entry.is_padding());
    let (least, most) = used.fold((u8::MAX, 0), |(least, most), entry| {
        (entry.tag.min(least), entry.tag.max(most))
    });
    let mut at = trailer.index_offset;
    for bytes in entries {
        let mut entry = Entry::decode(bytes);
        if entry.is_padding() {
            at = at.saturating_add(ENTRY_BYTES as u64);
            continue;
        }
        // Of one that is alone it cannot be told which of the two it is, unless nobody gave it another.
        let alone = least == most && least != 0;
        let tag = entry.tag.wrapping_sub(least);
        if alone || tag > 1 {
            return Err(Wrong::Tag(at));
        }
        if entry.zeroed {
            entry.stored = head;
        } else if tag == 0 {
            if !entry.data_is_inside(head) {
                return Err(Wrong::Format(Error::new(Reason::LsmtDataOutside, at)));
            }
        } else {
            let end = entry.stored.checked_add(u64::from(entry.sectors));
            if end.is_none_or(|end| end > target_sectors) {
                return Err(Wrong::OutsideTarget(at));
            }
            match entry.stored.checked_add(head) {
                Some(stored) if stored < 1 << 55 => entry.stored = stored,
                _ => return Err(Wrong::OutsideTarget(at)),
            }
        }
        entry.tag = 0;
        *bytes = entry.encode();
        at = at.saturating_add(ENTRY_BYTES as u64);
    }
    Ok(())
}
