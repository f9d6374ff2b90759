// SPDX-License-Identifier: GPL-2.0

//! Many ranges of a device in little memory: of a thin volume whose chunks are scattered there are millions.
//!
//! They are in order, and each is stored as the distance from the one before and its length in sectors, in as many bytes
//! as the numbers need: four for a chunk of 64 KiB between others.

use ovbd_image::lsmt::SECTOR_BYTES;

use crate::delta::{Known, Range};

/// Ranges in order, without overlap; neighbours of one kind are one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// All but the last.
    packed: Vec<u8>,
    /// Where the last of `packed` ends.
    packed_end: u64,
    last: Option<Range>,
    total: Totals,
    defect: Option<u64>,
}

/// How much there is of each kind, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// All ranges.
    pub all: u64,
    /// Those that are [`Known::Zeroed`].
    pub zeroed: u64,
}

impl Ranges {
    /// Adds a range behind the others. One that cannot be there is remembered as the [`Ranges::defect`].
    pub fn add(&mut self, range: Range) {
        if range.bytes == 0 {
            return;
        }
        let in_sectors = range.start % SECTOR_BYTES == 0 && range.bytes % SECTOR_BYTES == 0;
        let end = range.start.checked_add(range.bytes);
        let before = self.last.map_or(0, |last| last.start + last.bytes);
        if end.is_none() || range.start < before || !in_sectors {
            self.defect = self.defect.or(Some(range.start));
            return;
        }
        self.total.all += range.bytes;
        if range.known == Known::Zeroed {
            self.total.zeroed += range.bytes;
        }
        match &mut self.last {
            Some(last) if last.known == range.known && before == range.start => {
                last.bytes += range.bytes;
            }
            Some(last) => {
                let gap = (last.start - self.packed_end) / SECTOR_BYTES;
                put(&mut self.packed, (gap << 2) | code(last.known));
                put(&mut self.packed, last.bytes / SECTOR_BYTES);
                self.packed_end = before;
                self.last = Some(range);
            }
            None => self.last = Some(range),
        }
    }

    /// All of them, in order.
    pub fn iter(&self) -> Iter<'_> {
        Iter {
            packed: &self.packed,
            end: 0,
            last: self.last,
        }
    }

    /// How much there is.
    pub fn totals(&self) -> Totals {
        self.total
    }

    /// The first byte of a range that was not behind the others, or not in whole sectors.
    pub fn defect(&self) -> Option<u64> {
        self.defect
    }
}

impl FromIterator<Range> for Ranges {
    fn from_iter<I: IntoIterator<Item = Range>>(ranges: I) -> Self {
        let mut all = Self::default();
        ranges.into_iter().for_each(|range| all.add(range));
        all
    }
}

/// Ranges in order.
#[derive(Clone, Debug)]
pub struct Iter<'a> {
    packed: &'a [u8],
    end: u64,
    last: Option<Range>,
}

impl Iterator for Iter<'_> {
    type Item = Range;

    fn next(&mut self) -> Option<Range> {
        if self.packed.is_empty() {
            return self.last.take();
        }
        let first = take(&mut self.packed);
        let range = Range {
            start: self.end + (first >> 2) * SECTOR_BYTES,
            bytes: take(&mut self.packed) * SECTOR_BYTES,
            known: known(first & 3),
        };
        self.end = range.start + range.bytes;
        Some(range)
    }
}

fn code(known: Known) -> u64 {
    match known {
        Known::Changed => 0,
        Known::WasZero => 1,
        Known::Whole => 2,
        Known::Zeroed => 3,
    }
}

fn known(code: u64) -> Known {
    match code {
        0 => Known::Changed,
        1 => Known::WasZero,
        2 => Known::Whole,
        _ => Known::Zeroed,
    }
}

/// Seven bits a byte, the lowest first; the highest bit says that there are more.
fn put(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn take(from: &mut &[u8]) -> u64 {
    let (mut number, mut shift) = (0, 0);
    while let Some((byte, rest)) = from.split_first() {
        *from = rest;
        number |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, sectors: u64, known: Known) -> Range {
        Range {
            start: start * SECTOR_BYTES,
            bytes: sectors * SECTOR_BYTES,
            known,
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        let kinds = [Known::Changed, Known::WasZero, Known::Whole, Known::Zeroed];
        let mut wanted = Vec::new();
        let (mut start, mut number) = (0, 1_u64);
        for (n, kind) in kinds.iter().cycle().take(200).enumerate() {
            // Of every size, next to the one before and far from it.
            number = number
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(n as u64);
            let sectors = 1 + (number >> 8 >> (number % 56));
            start += [0, 1, 127, 1 << 33][n % 4];
            if start + sectors > 1 << 54 {
                start = wanted
                    .last()
                    .map_or(0, |last: &Range| (last.start + last.bytes) / 512);
                wanted.push(range(start, 1, *kind));
                start += 1;
                continue;
            }
            wanted.push(range(start, sectors, *kind));
            start += sectors;
        }
        let ranges: Ranges = wanted.iter().copied().collect();
        assert_eq!(ranges.defect(), None);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), wanted);
        let sum = |zeroed: bool| -> u64 {
            let of_kind = wanted
                .iter()
                .filter(|r| !zeroed || r.known == Known::Zeroed);
            of_kind.map(|range| range.bytes).sum()
        };
        assert_eq!(ranges.totals().all, sum(false));
        assert_eq!(ranges.totals().zeroed, sum(true));
    }

    #[test]
    fn neighbours_of_one_kind_are_one() {
        let all = [
            range(0, 8, Known::Changed),
            range(8, 8, Known::Changed),
            range(16, 8, Known::Zeroed),
            range(32, 8, Known::Zeroed),
            range(40, 0, Known::Whole),
        ];
        let ranges: Ranges = all.into_iter().collect();
        let found: Vec<Range> = ranges.iter().collect();
        assert_eq!(found, [range(0, 16, Known::Changed), all[2], all[3]]);
    }

    #[test]
    fn what_cannot_be_is_remembered() {
        let bad = [
            Range {
                start: 1,
                ..range(0, 8, Known::Whole)
            },
            Range {
                bytes: 100,
                ..range(0, 8, Known::Whole)
            },
            Range {
                start: u64::MAX - 511,
                ..range(0, 8, Known::Whole)
            },
        ];
        for range in bad {
            assert_eq!(Ranges::from_iter([range]).defect(), Some(range.start));
        }
        let overlap = [range(8, 8, Known::Whole), range(15, 8, Known::Whole)];
        assert_eq!(Ranges::from_iter(overlap).defect(), Some(15 * SECTOR_BYTES));
    }

    /// 10 million scattered chunks of 64 KiB, 640 GB of a pool, are to fit into 64 MiB.
    #[test]
    fn a_scattered_chunk_takes_four_bytes() {
        let count = 100_000;
        let ranges: Ranges = (0..count)
            .map(|n| range(n * 256, 128, Known::Changed))
            .collect();
        assert_eq!(ranges.iter().count() as u64, count);
        assert!(ranges.packed.len() as u64 <= 4 * count);
    }
}
