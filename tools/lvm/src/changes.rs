// SPDX-License-Identifier: GPL-2.0

//! The ranges in which a snapshot may differ from an older one, found without reading any data.
//!
//! The metadata of a thin pool says which chunks two volumes share. It says nothing of what was written to a chunk that one
//! volume has alone, so the older one must be read-only ever since it was pushed. The chunks of a classic snapshot's COW
//! store are those in which it differs from its origin.

use ovbd_layers::delta::{Known, Range};

use crate::thin_xml::{Chunks, Delta, Difference, Mapped};

/// Sizes of the two volumes in bytes, of which the older may be missing, and what their unmapped chunks are.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// The older volume.
    pub old: u64,
    /// The newer one.
    pub new: u64,
    /// Whether unmapped chunks are those of an external origin, and not zeros.
    pub external: bool,
}

/// Of a whole volume.
pub fn whole(mapped: &Mapped, sizes: Sizes) -> Vec<Range> {
    let mut out = Ranges::default();
    if sizes.external {
        out.add(0, sizes.new, Known::WasZero);
        return out.0;
    }
    for chunks in &mapped.ranges {
        let (start, end) = bytes(*chunks, mapped.chunk_bytes, sizes.new);
        out.add(start, end, Known::WasZero);
    }
    out.0
}

/// Of a volume against an older one.
pub fn thin(delta: &Delta, sizes: Sizes) -> Vec<Range> {
    let mut out = Ranges::default();
    // Where the older volume ends nothing is known of the layers below: they may have been larger once.
    let grown = sizes.old.min(sizes.new);
    let mut at = grown;
    for (difference, chunks) in &delta.ranges {
        let (start, end) = bytes(*chunks, delta.chunk_bytes, sizes.new);
        let known = match difference {
            Difference::Same => None,
            _ if sizes.external => Some(Known::Changed),
            Difference::Different => Some(Known::Changed),
            Difference::RightOnly => Some(Known::WasZero),
            Difference::LeftOnly => Some(Known::Zeroed),
        };
        if let Some(known) = known {
            out.add(start, end.min(grown), known);
        }
        let (start, end) = (start.max(grown), end);
        if start < end && *difference != Difference::LeftOnly && !sizes.external {
            out.add(at, start, Known::Zeroed);
            out.add(start, end, Known::Whole);
            at = end;
        }
    }
    let rest = match sizes.external {
        true => Known::Whole,
        false => Known::Zeroed,
    };
    out.add(at, sizes.new, rest);
    out.0
}

/// Of a newer classic snapshot against an older one of the same origin, by the chunks of the older one's COW store.
pub fn classic(chunks: impl Iterator<Item = u64>, chunk_bytes: u64, sizes: Sizes) -> Vec<Range> {
    let mut out = Ranges::default();
    let common = sizes.old.min(sizes.new);
    for begin in chunks {
        let (start, end) = bytes(Chunks { begin, length: 1 }, chunk_bytes, common);
        out.add(start, end, Known::Changed);
    }
    out.add(common, sizes.new, Known::Whole);
    out.0
}

fn bytes(chunks: Chunks, chunk_bytes: u64, most: u64) -> (u64, u64) {
    let at = |chunk: u64| chunk.saturating_mul(chunk_bytes).min(most);
    (
        at(chunks.begin),
        at(chunks.begin.saturating_add(chunks.length)),
    )
}

/// Ranges in order; neighbours of one kind are one.
#[derive(Default)]
struct Ranges(Vec<Range>);

impl Ranges {
    fn add(&mut self, start: u64, end: u64, known: Known) {
        if start >= end {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.known == known && last.start + last.bytes == start => {
                last.bytes += end - start;
            }
            _ => self.0.push(Range {
                start,
                bytes: end - start,
                known,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64 << 10;

    fn delta(ranges: &[(Difference, u64, u64)]) -> Delta {
        let chunks = |begin, length| Chunks { begin, length };
        Delta {
            chunk_bytes: CHUNK,
            ranges: ranges
                .iter()
                .map(|(kind, begin, length)| (*kind, chunks(*begin, *length)))
                .collect(),
        }
    }

    fn sizes(old: u64, new: u64, external: bool) -> Sizes {
        Sizes {
            old: old * CHUNK,
            new: new * CHUNK,
            external,
        }
    }

    fn found(ranges: Vec<Range>) -> Vec<(u64, u64, Known)> {
        let per = |range: Range| (range.start / CHUNK, range.bytes / CHUNK, range.known);
        ranges.into_iter().map(per).collect()
    }

    #[test]
    fn of_one_size() {
        use Difference::*;
        let delta = delta(&[
            (Same, 0, 4),
            (Different, 4, 2),
            (RightOnly, 8, 1),
            (LeftOnly, 9, 3),
            (Different, 20, 30),
        ]);
        assert_eq!(
            found(thin(&delta, sizes(32, 32, false))),
            [
                (4, 2, Known::Changed),
                (8, 1, Known::WasZero),
                (9, 3, Known::Zeroed),
                (20, 12, Known::Changed),
            ]
        );
        // With an external origin nothing is known to be zeros.
        assert_eq!(
            found(thin(&delta, sizes(32, 32, true))),
            [
                (4, 2, Known::Changed),
                (8, 4, Known::Changed),
                (20, 12, Known::Changed)
            ]
        );
    }

    #[test]
    fn of_another_size() {
        use Difference::*;
        // Chunks 10 to 13 are the same: the older volume had been larger, and was cut at 11.
        let delta = delta(&[
            (Different, 8, 2),
            (Same, 10, 4),
            (RightOnly, 16, 1),
            (LeftOnly, 17, 1),
        ]);
        assert_eq!(
            found(thin(&delta, sizes(11, 20, false))),
            [
                (8, 2, Known::Changed),
                (11, 3, Known::Whole),
                (14, 2, Known::Zeroed),
                (16, 1, Known::Whole),
                (17, 3, Known::Zeroed),
            ]
        );
        assert_eq!(
            found(thin(&delta, sizes(11, 20, true))),
            [(8, 2, Known::Changed), (11, 9, Known::Whole)]
        );
        assert_eq!(
            found(thin(&delta, sizes(20, 9, false))),
            [(8, 1, Known::Changed)]
        );
    }

    #[test]
    fn of_a_whole_volume_and_of_a_classic_one() {
        let mapped = Mapped {
            chunk_bytes: CHUNK,
            ranges: vec![
                Chunks {
                    begin: 1,
                    length: 2,
                },
                Chunks {
                    begin: 7,
                    length: 9,
                },
            ],
        };
        assert_eq!(
            found(whole(&mapped, sizes(0, 9, false))),
            [(1, 2, Known::WasZero), (7, 2, Known::WasZero)]
        );
        assert_eq!(
            found(whole(&mapped, sizes(0, 9, true))),
            [(0, 9, Known::WasZero)]
        );
        assert_eq!(
            found(classic([1, 2, 5].into_iter(), CHUNK, sizes(8, 9, false))),
            [
                (1, 2, Known::Changed),
                (5, 1, Known::Changed),
                (8, 1, Known::Whole)
            ]
        );
    }
}
