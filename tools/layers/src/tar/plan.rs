// SPDX-License-Identifier: GPL-2.0

//! What the sectors of a file system become in a layer over a tar: parts of the tar, data that is stored, or zeros.

use ovbd_image::lsmt::SECTOR_BYTES;

use super::pieces::{Pieces, PIECE_SECTORS};
use crate::{compare::Changes, layer_writer::segments_of, zeros::GRANULE_BYTES};

/// What sectors read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The tar, from this sector of it on.
    Tar(u64),
    /// Data that is stored besides.
    Stored,
    /// Zeros.
    Zeros,
}

/// Sectors with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First sector of the device.
    pub start: u64,
    /// Number of sectors.
    pub sectors: u64,
    /// What they read.
    pub source: Source,
}

impl Run {
    fn end(&self) -> u64 {
        self.start + self.sectors
    }

    /// Whether `next` goes on where this one ends.
    fn continues(&self, next: &Self) -> bool {
        let same = match (self.source, next.source) {
            (Source::Tar(one), Source::Tar(other)) => one + self.sectors == other,
            (one, other) => one == other,
        };
        same && self.end() == next.start
    }
}

/// Changes of a window, with the hash of each block that holds data.
pub struct Hashed {
    /// The changes.
    pub changes: Changes,
    hashes: Vec<u64>,
}

impl Hashed {
    /// Hashes the blocks of `changes`.
    pub fn new(changes: Changes, pieces: &Pieces) -> Self {
        let bytes = changes.runs.iter().filter(|run| !run.zeroed);
        let bytes: u64 = bytes.map(|run| run.sectors * SECTOR_BYTES).sum();
        let blocks = changes.data[..bytes as usize].chunks(GRANULE_BYTES);
        Self {
            hashes: blocks.map(|block| pieces.seed().hash(block)).collect(),
            changes,
        }
    }
}

/// All that a layer over a tar holds, in order.
#[derive(Debug, Default)]
pub struct Plan {
    runs: Vec<Run>,
    /// Sector of the tar after the last block that was found.
    wanted: u64,
}

impl Plan {
    /// Adds the changes of a window, which follows all earlier ones. `over_base` is whether there is anything below, so that
    /// zeros must be said.
    pub fn add(&mut self, hashed: &Hashed, pieces: &Pieces, over_base: bool) {
        let mut hashes = hashed.hashes.iter();
        for run in &hashed.changes.runs {
            if run.zeroed {
                self.push(Run {
                    start: run.start,
                    sectors: run.sectors,
                    source: Source::Zeros,
                });
                continue;
            }
            let end = run.start + run.sectors;
            for start in (run.start..end).step_by(PIECE_SECTORS as usize) {
                let Some(hash) = hashes.next() else { return };
                let sectors = PIECE_SECTORS.min(end - start);
                // The last block of a device may be shorter: then it is no piece.
                let found = pieces.find(*hash, self.wanted);
                let Some(place) = found.filter(|_| sectors == PIECE_SECTORS) else {
                    self.push(Run {
                        start,
                        sectors,
                        source: Source::Stored,
                    });
                    continue;
                };
                self.wanted = place.start + place.sectors;
                self.push(Run {
                    start,
                    sectors: place.sectors,
                    source: Source::Tar(place.start),
                });
                if over_base && place.sectors < sectors {
                    self.push(Run {
                        start: start + place.sectors,
                        sectors: sectors - place.sectors,
                        source: Source::Zeros,
                    });
                }
            }
        }
    }

    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.continues(&run) => last.sectors += run.sectors,
            _ => self.runs.push(run),
        }
    }

    /// The runs.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Segments of a layer with these runs.
    pub fn segments(&self) -> u64 {
        self.runs.iter().map(|run| segments_of(run.sectors)).sum()
    }

    /// The same in `most` segments at most: of more, the shortest parts of the tar are stored besides. False if that is
    /// not enough.
    pub fn fit(&mut self, most: u64) -> bool {
        let mut longest = PIECE_SECTORS;
        while self.segments() > most {
            if longest > 1 << 20 {
                return false;
            }
            self.store_short(longest);
            longest *= 2;
        }
        true
    }

    /// Stores the parts of the tar that have `longest` sectors at most: their whole blocks, with the zeros that fill them up.
    fn store_short(&mut self, longest: u64) {
        let before = std::mem::take(&mut self.runs);
        let mut done = 0;
        for mut run in before {
            if matches!(run.source, Source::Tar(_)) && run.sectors <= longest {
                run.source = Source::Stored;
                run.sectors = run.end().next_multiple_of(PIECE_SECTORS) - run.start;
                done = run.end();
            } else if run.start < done {
                // The zeros after a part that is stored.
                run.sectors -= done - run.start;
                run.start = done;
            }
            if run.sectors > 0 {
                self.push(run);
            }
        }
    }

    /// Bytes that are stored besides the tar.
    pub fn stored_bytes(&self) -> u64 {
        let stored = self.runs.iter().filter(|run| run.source == Source::Stored);
        stored.map(|run| run.sectors * SECTOR_BYTES).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, sectors: u64, source: Source) -> Run {
        Run {
            start,
            sectors,
            source,
        }
    }

    #[test]
    fn short_parts_are_stored_where_there_are_too_many() {
        let mut plan = Plan::default();
        for run in [
            run(0, 8, Source::Stored),
            run(8, 3, Source::Tar(50)),
            run(11, 5, Source::Zeros),
            run(16, 8, Source::Tar(60)),
            run(24, 8, Source::Tar(68)),
            run(32, 2, Source::Tar(80)),
            run(34, 14, Source::Zeros),
            run(100 * 8, 1, Source::Tar(90)),
        ] {
            plan.push(run);
        }
        assert_eq!(plan.segments(), 7);
        assert!(plan.fit(7) && plan.segments() == 7);
        assert!(plan.fit(6));
        assert_eq!(
            plan.runs(),
            [
                run(0, 16, Source::Stored),
                run(16, 16, Source::Tar(60)),
                run(32, 8, Source::Stored),
                run(40, 8, Source::Zeros),
                run(800, 8, Source::Stored),
            ]
        );
        assert!(plan.fit(4));
        assert_eq!(plan.runs()[0], run(0, 40, Source::Stored));
        assert_eq!(plan.stored_bytes(), 48 * SECTOR_BYTES);
        assert!(!plan.fit(2));
    }
}
