// SPDX-License-Identifier: GPL-2.0

//! The ranges in which a snapshot may differ from an older one, found without reading any data.
//!
//! The metadata of a thin pool says which chunks two volumes share. It says nothing of what was written to a chunk that one
//! volume has alone, so the older one must be read-only ever since it was pushed. The chunks of a classic snapshot's COW
//! store are those in which it differs from its origin.

use ovbd_layers::{
    delta::{Known, Range},
    ranges::Ranges,
};

use crate::thin_xml::{Chunks, Difference};

/// Bytes of the blocks in which volumes are compared.
const BLOCK: u64 = 4096;

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

impl Sizes {
    /// What both have, in whole blocks unless the newer one ends there: extents of a group may be of 1 KiB.
    fn common(&self) -> u64 {
        match self.new <= self.old {
            true => self.new,
            false => self.old / BLOCK * BLOCK,
        }
    }
}

/// Of a whole volume, whose chunks are added as they become known.
#[derive(Debug)]
pub struct Whole {
    sizes: Sizes,
    out: Ranges,
}

impl Whole {
    /// Of a volume of which nothing is known yet.
    pub fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            out: Ranges::default(),
        }
    }

    /// It has these chunks, of `chunk_bytes`.
    pub fn add(&mut self, chunk_bytes: u64, chunks: Chunks) {
        let (start, end) = bytes(chunks, chunk_bytes, self.sizes.new);
        if !self.sizes.external {
            add(&mut self.out, start, end, Known::WasZero);
        }
    }

    /// All ranges.
    pub fn finish(mut self) -> Ranges {
        if self.sizes.external {
            add(&mut self.out, 0, self.sizes.new, Known::WasZero);
        }
        self.out
    }
}

/// Of a volume against an older one, whose differences are added as they become known.
#[derive(Debug)]
pub struct Thin {
    sizes: Sizes,
    /// Where the older volume ends nothing is known of the layers below: they may have been larger once.
    grown: u64,
    /// What was dealt with behind that.
    at: u64,
    out: Ranges,
}

impl Thin {
    /// Of two volumes of which nothing is known yet.
    pub fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            grown: sizes.common(),
            at: sizes.common(),
            out: Ranges::default(),
        }
    }

    /// They differ so in these chunks, of `chunk_bytes`.
    pub fn add(&mut self, chunk_bytes: u64, difference: Difference, chunks: Chunks) {
        let (start, end) = bytes(chunks, chunk_bytes, self.sizes.new);
        let known = match difference {
            Difference::Same => None,
            _ if self.sizes.external => Some(Known::Changed),
            Difference::Different => Some(Known::Changed),
            Difference::RightOnly => Some(Known::WasZero),
            Difference::LeftOnly => Some(Known::Zeroed),
        };
        if let Some(known) = known {
            add(&mut self.out, start, end.min(self.grown), known);
        }
        let start = start.max(self.grown);
        if start < end && difference != Difference::LeftOnly && !self.sizes.external {
            add(&mut self.out, self.at, start, Known::Zeroed);
            add(&mut self.out, start, end, Known::Whole);
            self.at = end;
        }
    }

    /// All ranges.
    pub fn finish(mut self) -> Ranges {
        let rest = match self.sizes.external {
            true => Known::Whole,
            false => Known::Zeroed,
        };
        add(&mut self.out, self.at, self.sizes.new, rest);
        self.out
    }
}

/// Of a newer classic snapshot against an older one of the same origin, by the chunks of the older one's COW store.
pub fn classic(chunks: impl Iterator<Item = u64>, chunk_bytes: u64, sizes: Sizes) -> Ranges {
    let mut out = Ranges::default();
    let common = sizes.common();
    for begin in chunks {
        let (start, end) = bytes(Chunks { begin, length: 1 }, chunk_bytes, common);
        add(&mut out, start, end, Known::Changed);
    }
    add(&mut out, common, sizes.new, Known::Whole);
    out
}

/// Of a volume that was read-only since it was pushed, and may have been made larger.
pub fn grown(sizes: Sizes) -> Ranges {
    let mut out = Ranges::default();
    add(&mut out, sizes.common(), sizes.new, Known::Whole);
    out
}

/// Of a volume of which nothing is known.
pub fn all(bytes: u64) -> Ranges {
    let mut out = Ranges::default();
    add(&mut out, 0, bytes, Known::WasZero);
    out
}

fn bytes(chunks: Chunks, chunk_bytes: u64, most: u64) -> (u64, u64) {
    let at = |chunk: u64| chunk.saturating_mul(chunk_bytes).min(most);
    (
        at(chunks.begin),
        at(chunks.begin.saturating_add(chunks.length)),
    )
}

fn add(out: &mut Ranges, start: u64, end: u64, known: Known) {
    out.add(Range {
        start,
        bytes: end.saturating_sub(start),
        known,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64 << 10;

    fn delta(ranges: &[(Difference, u64, u64)]) -> impl Fn(Sizes) -> Ranges + '_ {
        move |sizes| {
            let mut thin = Thin::new(sizes);
            for (kind, begin, length) in ranges {
                let (begin, length) = (*begin, *length);
                thin.add(CHUNK, *kind, Chunks { begin, length });
            }
            thin.finish()
        }
    }

    fn sizes(old: u64, new: u64, external: bool) -> Sizes {
        Sizes {
            old: old * CHUNK,
            new: new * CHUNK,
            external,
        }
    }

    fn found(ranges: Ranges) -> Vec<(u64, u64, Known)> {
        let per = |range: Range| (range.start / CHUNK, range.bytes / CHUNK, range.known);
        ranges.iter().map(per).collect()
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
            found(delta(sizes(32, 32, false))),
            [
                (4, 2, Known::Changed),
                (8, 1, Known::WasZero),
                (9, 3, Known::Zeroed),
                (20, 12, Known::Changed),
            ]
        );
        // With an external origin nothing is known to be zeros.
        assert_eq!(
            found(delta(sizes(32, 32, true))),
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
            found(delta(sizes(11, 20, false))),
            [
                (8, 2, Known::Changed),
                (11, 3, Known::Whole),
                (14, 2, Known::Zeroed),
                (16, 1, Known::Whole),
                (17, 3, Known::Zeroed),
            ]
        );
        assert_eq!(
            found(delta(sizes(11, 20, true))),
            [(8, 2, Known::Changed), (11, 9, Known::Whole)]
        );
        assert_eq!(found(delta(sizes(20, 9, false))), [(8, 1, Known::Changed)]);
    }

    #[test]
    fn of_a_whole_volume_and_of_a_classic_one() {
        let whole = |sizes| {
            let mut whole = Whole::new(sizes);
            for (begin, length) in [(1, 2), (7, 9)] {
                whole.add(CHUNK, Chunks { begin, length });
            }
            found(whole.finish())
        };
        assert_eq!(
            whole(sizes(0, 9, false)),
            [(1, 2, Known::WasZero), (7, 2, Known::WasZero)]
        );
        assert_eq!(whole(sizes(0, 9, true)), [(0, 9, Known::WasZero)]);
        assert_eq!(
            found(classic([1, 2, 5].into_iter(), CHUNK, sizes(8, 9, false))),
            [
                (1, 2, Known::Changed),
                (5, 1, Known::Changed),
                (8, 1, Known::Whole)
            ]
        );
    }

    /// Of a group with extents of 1 KiB.
    #[test]
    fn sizes_that_are_no_whole_blocks() {
        let sizes = |old, new| Sizes {
            old,
            new,
            external: false,
        };
        let whole = |start, bytes| Range {
            start,
            bytes,
            known: Known::Whole,
        };
        let all = |ranges: Ranges| ranges.iter().collect::<Vec<_>>();
        assert_eq!(all(grown(sizes(5120, 9216))), [whole(4096, 5120)]);
        assert_eq!(all(grown(sizes(9216, 9216))), []);
        assert_eq!(all(grown(sizes(9216, 5120))), []);
        let mut thin = Thin::new(sizes(5120, 9216));
        thin.add(
            CHUNK,
            Difference::Different,
            Chunks {
                begin: 0,
                length: 1,
            },
        );
        let changed = Range {
            start: 0,
            bytes: 4096,
            known: Known::Changed,
        };
        assert_eq!(all(thin.finish()), [changed, whole(4096, 5120)]);
        let found = classic([0].into_iter(), CHUNK, sizes(5120, 9216));
        assert_eq!(all(found), [changed, whole(4096, 5120)]);
    }
}
