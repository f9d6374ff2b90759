// SPDX-License-Identifier: GPL-2.0

//! Right checksums for a damaged ZFile, so that the damage gets past them.

use ovbd_image::zfile::{Header, BLOCK_SEED, ENTRY_BYTES, HEADER_BYTES};
use ovbd_layers::crc::crc32c;

use crate::mutate::{get, table_place};

/// Puts right as many checksums as `level` says: 0 none, 1 the digests and the CRC of the jump table, 2 also
/// those of the blocks. Returns what it did, if anything.
pub fn repair(data: &mut [u8], level: usize) -> Option<&'static str> {
    if level == 0 || data.len() < 2 * HEADER_BYTES || !Header::recognise(data) {
        return None;
    }
    if level > 1 {
        blocks(data);
    }
    let trailer = data.len() - HEADER_BYTES;
    for start in [0, trailer] {
        digests(data, start);
    }
    Some(match level {
        1 => "digests put right",
        _ => "all checksums put right",
    })
}

/// The CRC of the jump table that the structure at `start` names, and the digest of that structure.
fn digests(data: &mut [u8], start: usize) {
    let field = |at| usize::try_from(get(data, start + at, 8)?).ok();
    let table = field(40).zip(field(48)).and_then(|(offset, entries)| {
        data.get(offset..offset.checked_add(entries.checked_mul(ENTRY_BYTES)?)?)
    });
    if let Some(table) = table {
        let crc = crc32c(0, table).to_le_bytes();
        data[start + 64..start + 68].copy_from_slice(&crc);
    }
    let block = &mut data[start..start + HEADER_BYTES];
    block[28..32].fill(0);
    let digest = crc32c(0, block).to_le_bytes();
    block[28..32].copy_from_slice(&digest);
}

/// The CRC at the end of every block that the jump table names and that is inside the file.
fn blocks(data: &mut [u8]) {
    let Some((table, entries)) = table_place(data) else {
        return;
    };
    let mut start = HEADER_BYTES;
    for number in 0..entries {
        let length = get(data, table + number * ENTRY_BYTES, ENTRY_BYTES).unwrap_or(0) as usize;
        let stored = start.checked_add(length).filter(|end| *end <= table);
        let Some(stored) = stored.and_then(|end| data.get_mut(start..end)) else {
            return;
        };
        if let Some((payload, sum)) = stored.split_last_chunk_mut::<4>() {
            *sum = crc32c(BLOCK_SEED, payload).to_le_bytes();
        }
        start += length;
    }
}
