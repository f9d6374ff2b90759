// SPDX-License-Identifier: GPL-2.0

//! Damage to layers where it hurts: fields of header and trailer, index entries, the jump table, the data of
//! blocks, and bytes anywhere.
//!
//! A mutant is given by a base and a number alone, so that whoever sees it fail can make it again. In part
//! of the mutants the checksums are put right afterwards, so that the damage gets past them.

use ovbd_image::{
    lsmt::{self, Entry},
    zfile,
};

use std::sync::LazyLock;

use crate::{
    base::{built, Base},
    random::Random,
    repair::repair,
};

/// Offset and width of the fields of an LSMT header or trailer.
const LSMT_FIELDS: &[(usize, usize)] = &[
    (0, 8),
    (16, 8),
    (24, 4),
    (28, 4),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 8),
    (93, 8),
    (130, 2),
    (132, 1),
    (133, 1),
];

/// The same of a ZFile.
const ZFILE_FIELDS: &[(usize, usize)] = &[
    (0, 8),
    (16, 8),
    (24, 4),
    (28, 4),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 8),
    (64, 4),
    (68, 4),
    (72, 4),
    (76, 1),
    (77, 1),
    (78, 1),
    (84, 4),
    (88, 1),
];

/// A damaged copy of a base.
pub struct Mutant {
    /// The blobs of the layers, bottom first.
    pub layers: Vec<Vec<u8>>,
    /// The layer that differs from the base.
    pub damaged: usize,
    /// What was done to it.
    pub what: String,
}

/// Mutant `number` of `base`.
pub fn mutant(base: &Base, number: u64) -> Mutant {
    let mut random = Random::new(base.seed() ^ number);
    let damaged = random.below(base.layers.len());
    let layer = &base.layers[damaged];
    let mut what = Vec::new();
    let blob = match &layer.inner {
        // A sound ZFile around a damaged layer.
        Some(inner) if random.below(2) == 0 => {
            let mut content = inner.content.clone();
            what.push("inside the ZFile".to_owned());
            damage(&mut content, &mut random, &mut what);
            inner.wrap(&content)
        }
        _ => {
            let mut blob = layer.blob.clone();
            damage(&mut blob, &mut random, &mut what);
            what.extend(repair(&mut blob, *random.choose(&[0, 1, 2, 2])).map(str::to_owned));
            blob
        }
    };
    let mut layers: Vec<Vec<u8>> = base.layers.iter().map(|layer| layer.blob.clone()).collect();
    layers[damaged] = blob;
    Mutant {
        layers,
        damaged,
        what: what.join(", "),
    }
}

/// Damages a blob in one to three places, and appends what it did to `what`.
pub fn damage(data: &mut Vec<u8>, random: &mut Random, what: &mut Vec<String>) {
    for _ in 0..=random.below(3) {
        if data.is_empty() {
            return;
        }
        let done = if random.below(6) == 0 {
            bytes(data, random)
        } else if zfile::Header::recognise(data) {
            damage_zfile(data, random)
        } else if lsmt::Header::recognise(data) {
            damage_lsmt(data, random)
        } else {
            bytes(data, random)
        };
        what.push(done);
    }
}

fn damage_zfile(data: &mut Vec<u8>, random: &mut Random) -> String {
    let header = zfile::HEADER_BYTES;
    if data.len() < 2 * header {
        return bytes(data, random);
    }
    let trailer = data.len() - header;
    match random.below(8) {
        0 | 1 => field(data, &[0], ZFILE_FIELDS, random),
        2 => field(data, &[trailer], ZFILE_FIELDS, random),
        3 => field(data, &[trailer, 0], ZFILE_FIELDS, random),
        4 | 5 => jump_table(data, random),
        _ => block(data, random),
    }
    .unwrap_or_else(|| bytes(data, random))
}

fn damage_lsmt(data: &mut Vec<u8>, random: &mut Random) -> String {
    let header = lsmt::HEADER_BYTES;
    if data.len() < 2 * header {
        return bytes(data, random);
    }
    let trailer = data.len() - header;
    match random.below(8) {
        0 => field(data, &[0], LSMT_FIELDS, random),
        1 | 2 => field(data, &[trailer], LSMT_FIELDS, random),
        _ => index(data, trailer, random),
    }
    .unwrap_or_else(|| bytes(data, random))
}

/// The little-endian number of up to 8 bytes at `at`.
pub(crate) fn get(data: &[u8], at: usize, bytes: usize) -> Option<u64> {
    let mut value = [0; 8];
    value[..bytes].copy_from_slice(data.get(at..at.checked_add(bytes)?)?);
    Some(u64::from_le_bytes(value))
}

fn put(data: &mut [u8], at: usize, bytes: usize, value: u64) {
    if let Some(place) = data.get_mut(at..at + bytes) {
        place.copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
}

/// A value that is wrong in a way that code may get wrong, given the right one.
fn value(old: u64, len: usize, random: &mut Random) -> u64 {
    let small = random.below(9) as u64;
    match random.below(10) {
        0 => old ^ (1 << random.below(64)),
        1 => old.wrapping_add(small),
        2 => old.wrapping_sub(small),
        3 => old.wrapping_add(*random.choose(&[512, 4096, 65536, u64::MAX - 511, u64::MAX - 4095])),
        4 => old << 1,
        5 => old >> 1,
        6 => small,
        7 => u64::MAX.wrapping_sub(small) >> random.below(64),
        8 => (len as u64).wrapping_sub(512 * small),
        _ => random.bits() >> random.below(64),
    }
}

/// Changes a field of the structures at `starts`, to the same value in all of them: what it was in the first,
/// made wrong.
fn field(
    data: &mut [u8],
    starts: &[usize],
    fields: &[(usize, usize)],
    random: &mut Random,
) -> Option<String> {
    let (at, bytes) = *random.choose(fields);
    let old = get(data, starts.first()? + at, bytes)?;
    let new = value(old, data.len(), random);
    for start in starts {
        put(data, start + at, bytes, new);
    }
    Some(format!(
        "field {at} at bytes {starts:?}: {old:#x} to {new:#x}"
    ))
}

/// Changes an entry of the index that the trailer names.
fn index(data: &mut [u8], trailer: usize, random: &mut Random) -> Option<String> {
    const BYTES: usize = lsmt::ENTRY_BYTES;
    let start = usize::try_from(get(data, trailer + 32, 8)?).ok()?;
    let entries = usize::try_from(get(data, trailer + 40, 8)?).ok()?;
    let index = data.get_mut(start..start.checked_add(entries.checked_mul(BYTES)?)?)?;
    let mut entries: Vec<[u8; BYTES]> = Vec::new();
    entries.extend(
        index
            .chunks_exact(BYTES)
            .filter_map(|e| <[u8; BYTES]>::try_from(e).ok()),
    );
    // Mostly real ones; the padding follows them.
    let real = entries
        .iter()
        .take_while(|e| !Entry::decode(e).is_padding())
        .count();
    let count = if random.below(8) == 0 {
        entries.len()
    } else {
        real
    };
    let number = random.below(count);
    let mut entry = Entry::decode(entries.get(number)?);
    let other = Entry::decode(entries.get(number + 1).unwrap_or(&entries[0]));
    let mut put = |number: usize, entry: &[u8; BYTES]| {
        index[number * BYTES..(number + 1) * BYTES].copy_from_slice(entry);
    };
    let what = match random.below(10) {
        0 => {
            entry.start = value(entry.start, start / 512, random);
            "start"
        }
        1 => {
            entry.sectors = value(entry.sectors.into(), 16383, random) as u32;
            "length"
        }
        2 => {
            entry.stored = value(entry.stored, start / 512, random);
            "position"
        }
        3 => {
            entry.zeroed = !entry.zeroed;
            "zeroed"
        }
        4 => {
            entry.tag = random.bits() as u8;
            "tag"
        }
        5 => {
            let with = random.below(count);
            put(number, &entries[with]);
            put(with, &entries[number]);
            return Some(format!("index entries {number} and {with} swapped"));
        }
        6 => {
            entry = other;
            "copy of the next"
        }
        7 => {
            entry.sectors = (other.start.wrapping_sub(entry.start)).wrapping_add(1) as u32;
            "one sector into the next"
        }
        8 => {
            // Sound, but it maps something else.
            entry.start += 1;
            entry.sectors = entry.sectors.saturating_sub(1);
            "one sector shorter"
        }
        _ => {
            entry = Entry::PADDING;
            "padding"
        }
    };
    put(number, &entry.encode());
    Some(format!("index entry {number}: {what}, now {entry:?}"))
}

/// Offset and number of entries of the jump table, by the header if that is final, else by the trailer.
pub(crate) fn table_place(data: &[u8]) -> Option<(usize, usize)> {
    let flags = get(data, 32, 8)?;
    let from = match flags & 8 {
        0 => data.len().checked_sub(zfile::HEADER_BYTES)?,
        _ => 0,
    };
    let start = usize::try_from(get(data, from + 40, 8)?).ok()?;
    let entries = usize::try_from(get(data, from + 48, 8)?).ok()?;
    let end = start.checked_add(entries.checked_mul(zfile::ENTRY_BYTES)?)?;
    data.get(start..end)?;
    Some((start, entries))
}

/// Changes an entry of the jump table, or two so that their sum stays.
fn jump_table(data: &mut [u8], random: &mut Random) -> Option<String> {
    let (start, entries) = table_place(data)?;
    let number = random.below(entries);
    let at = start + number * 4;
    let old = get(data, at, 4).filter(|_| entries != 0)?;
    let next = get(data, at + 4, 4).filter(|_| number + 1 < entries);
    match (random.below(4), next) {
        (0, Some(next)) => {
            put(data, at, 4, next);
            put(data, at + 4, 4, old);
            Some(format!("jump table entries {number} and the next swapped"))
        }
        (1 | 2, Some(next)) => {
            let by = (random.below(64) as u64).wrapping_sub(32);
            put(data, at, 4, old.wrapping_add(by));
            put(data, at + 4, 4, next.wrapping_sub(by));
            Some(format!(
                "block {number} {} bytes longer, the next shorter",
                by as i64
            ))
        }
        _ => {
            let new = value(old, data.len(), random);
            put(data, at, 4, new);
            Some(format!("jump table entry {number}: {old} to {new}"))
        }
    }
}

/// Changes the data of a block.
fn block(data: &mut [u8], random: &mut Random) -> Option<String> {
    let (table, entries) = table_place(data)?;
    let number = random.below(entries);
    let start = (0..number).try_fold(zfile::HEADER_BYTES, |start, block| {
        start.checked_add(get(data, table + block * 4, 4)? as usize)
    })?;
    let length = get(data, table + number * 4, 4).filter(|_| entries != 0)? as usize;
    let stored = data
        .get_mut(start..start.checked_add(length)?)
        .filter(|s| !s.is_empty())?;
    // The first bytes of a block decide most.
    let limit = if random.below(2) == 0 {
        16
    } else {
        stored.len()
    };
    let at = random.below(limit.min(stored.len()));
    let what = match random.below(5) {
        0 => {
            stored[at] ^= 1 << random.below(8);
            "a bit"
        }
        1 => {
            stored[at] = random.bits() as u8;
            "a byte"
        }
        2 => {
            let end = (at + 1 + random.below(32)).min(stored.len());
            stored[at..end].fill(*random.choose(&[0, 0xff]));
            "a run of equal bytes"
        }
        3 => {
            let end = (at + 2 + random.below(64)).min(stored.len());
            stored[at..end]
                .iter_mut()
                .for_each(|byte| *byte = random.bits() as u8);
            "a run of random bytes"
        }
        _ => {
            let from = random.below(stored.len());
            let n = random.below(64).min(stored.len() - at.max(from));
            stored.copy_within(from..from + n, at);
            "a run from elsewhere"
        }
    };
    Some(format!("block {number}: {what} at byte {at} of {length}"))
}

/// Damage anywhere, most often at both ends, and to the length.
pub(crate) fn bytes(data: &mut Vec<u8>, random: &mut Random) -> String {
    let len = data.len();
    let at = match random.below(4) {
        0 => random.below(len.min(160)),
        1 => len - 1 - random.below(len.min(512)),
        2 => len - 1 - random.below(len.min(4096 + 512)),
        _ => random.below(len),
    };
    match random.below(6) {
        0 => {
            data.truncate(at);
            format!("cut off at byte {at}")
        }
        1 => {
            data[at] ^= 1 << random.below(8);
            format!("a bit of byte {at}")
        }
        2 => {
            let n = (1 << random.below(4)).min(len - at);
            let old = get(data, at, n).unwrap_or(0);
            put(data, at, n, value(old, len, random));
            format!("{n} bytes at byte {at}")
        }
        3 => {
            let n = random.below(64).min(len - at);
            let from = random.below(len - n);
            data.copy_within(from..from + n, at);
            format!("{n} bytes from byte {from} to byte {at}")
        }
        4 => {
            let n = random.below(600);
            data.splice(at..at, std::iter::repeat_n(0, n));
            format!("{n} zeros inserted at byte {at}")
        }
        _ => {
            let end = (at + random.below(600)).min(len);
            data.drain(at..end);
            format!("bytes {at} to {end} removed")
        }
    }
}

/// A blob for libFuzzer's mutator: `blob` damaged, or where that is nothing, something sound damaged.
pub fn mutate_blob(blob: &[u8], random: &mut Random) -> Vec<u8> {
    static SOUND: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
        let bases = built().expect("the bases can be built");
        let layers = bases.into_iter().flat_map(|base| base.layers);
        layers.map(|layer| layer.blob).collect()
    });
    let mut blob = match blob.len() {
        0..=8 => random.choose(&SOUND).clone(),
        _ => blob.to_vec(),
    };
    damage(&mut blob, random, &mut Vec::new());
    repair(&mut blob, random.below(3));
    blob
}
