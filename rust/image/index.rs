// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The index: which segment maps a sector, answered in one or two cache misses.
//!
//! The segments stay where the merge put them, 16 bytes each, in order. Beside them stands the
//! directory: the virtual sectors up to the last segment, divided evenly into one *bucket* for every
//! two segments. The word of a bucket is the number of the first segment that ends in it or behind
//! it, or of the fourth from the end of all where that comes before. Where more than twelve segments
//! end in one bucket, its word leads to a *node* instead: the sectors of the bucket, divided in the
//! same way.
//!
//! A lookup finds the bucket by one multiplication, whose upper half is the number of the bucket and
//! whose lower half says how far inside it the sector is, which is what the next node divides. Then
//! it compares the sector with the next four segments without a branch. Four there always are: where
//! an index has fewer, there is a copy of them, filled up with the last. Only if the sector is behind
//! all four, the lookup searches on in growing steps.
//!
//! # Cost
//!
//! For `n` segments the directory takes `n / 2` words of 4 bytes where segments are of one density
//! and never more than `3 n / 2`: between 18 and 22 bytes per segment all in, plus 16 bytes. Beyond
//! that, and below four nodes, crowded buckets stay as they are.
//!
//! A lookup takes one step, independent of `n`, where density does not vary, and one more for every
//! node on its way. The worst case, which takes a layout made for it, is four nodes and
//! `2 log2(n)` comparisons. [`directory_len`] and [`Index::build`] are O(n) for each level of nodes.

use super::segment::{Origin, PackedSegment};
use core::ops::{Deref, DerefMut};

/// Segments for which there is a bucket.
const PER_BUCKET: usize = 2;

/// Segments that a bucket can have without being divided.
const CROWD: usize = 12;

/// Nodes that a lookup can pass, the root not counted.
const DEPTH: usize = 4;

/// Segments that are compared at once.
const WINDOW: usize = 4;

/// Marks the words that hold the position of a node.
const NODE: u32 = 1 << 31;

/// Why no index could be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// Segment number `at` begins before its predecessor ends.
    Unsorted {
        /// Position in the list.
        at: usize,
    },
    /// The directory has not the [`directory_len`] of the segments.
    WrongDirectory,
    /// There are more segments than a directory can number, 2^30.
    TooMany,
}

/// Where the data of a run of sectors comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// No layer owns the sectors. They read as zeros.
    Hole,
    /// A zeroed segment of `layer` owns them. They read as zeros.
    Zero {
        /// Layer number of the segment.
        layer: u8,
    },
    /// A segment of `layer` owns them.
    Data {
        /// Layer number of the segment.
        layer: u8,
        /// Sector in the layer's blob where the first of them is stored.
        stored: u64,
    },
}

/// A run of virtual sectors with one source.
///
/// # Invariants
///
/// `start < end`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    start: u64,
    end: u64,
    origin: Origin,
}

impl Mapping {
    /// First virtual sector.
    #[inline(always)]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// First virtual sector after the run; `u64::MAX` in the hole behind the last segment.
    #[inline(always)]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Number of sectors, at least 1.
    #[inline(always)]
    pub fn sectors(&self) -> u64 {
        // Cannot wrap by the type invariant.
        self.end.wrapping_sub(self.start)
    }

    /// Where the sectors' data comes from.
    #[inline(always)]
    pub fn source(&self) -> Source {
        let layer = self.origin.layer();
        if !self.origin.zeroed() {
            let stored = self.origin.stored();
            Source::Data { layer, stored }
        } else if self.origin != Origin::NOWHERE {
            Source::Zero { layer }
        } else {
            Source::Hole
        }
    }

    /// What `segment`, the first that ends after `sector`, says about the sectors from there on.
    #[inline(always)]
    pub fn at(sector: u64, segment: PackedSegment) -> Self {
        let start = segment.start();
        let hole = sector < start;
        // Written for conditional moves: whether a random sector is in a hole cannot be predicted.
        let inside = segment.origin().advanced(sector.wrapping_sub(start));
        // INVARIANT: `sector` is before `start` in the first case, before the end in the other.
        Self {
            start: sector,
            end: if hole { start } else { segment.end() },
            origin: if hole { Origin::NOWHERE } else { inside },
        }
    }

    /// The hole behind the last segment. It has no end but that of all virtual sectors.
    #[inline(always)]
    pub fn rest(sector: u64) -> Self {
        // INVARIANT: no device has a sector `u64::MAX`.
        Self {
            start: sector,
            end: u64::MAX,
            origin: Origin::NOWHERE,
        }
    }

    /// This run and the next as one where that is the next in the blob of the same layer, or where both
    /// read as zeros, whoever says so.
    fn join(self, next: Self) -> Option<Self> {
        let zeros = self.origin.zeroed() && next.origin.zeroed();
        // INVARIANT: `next` starts where this ends, so it ends behind this start.
        (zeros || self.origin.continues(self.sectors(), next.origin)).then_some(Self {
            end: next.end,
            ..self
        })
    }

    /// The same, ending at `end` at the latest, which is after `start`.
    #[inline]
    fn until(self, end: u64) -> Self {
        Self {
            end: self.end.min(end),
            ..self
        }
    }
}

impl core::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}..{}: {:?}", self.start, self.end, self.source())
    }
}

/// A node, while it is made or used.
///
/// In the directory it is one word for each bucket, behind one word for their number. The root has
/// no such word, and its multiplier divides sectors instead of fractions.
#[derive(Clone, Copy)]
struct Node {
    /// Position in the directory of the first bucket's word.
    at: usize,
    /// Turns a sector into its fraction of the bucket that this node divides.
    scale: u64,
    /// Turns that fraction into the number of a bucket and the fraction of that bucket.
    multiplier: u64,
}

impl Node {
    /// The bucket in which `segment` ends, by its last sector.
    fn bucket_of(&self, segment: &PackedSegment) -> usize {
        let last = segment.end().wrapping_sub(1);
        split(last.wrapping_mul(self.scale), self.multiplier).0
    }
}

/// Number of the bucket for `fraction`, in units of 2^-64, and the fraction of that bucket.
#[inline(always)]
fn split(fraction: u64, multiplier: u64) -> (usize, u64) {
    let product = u128::from(fraction).wrapping_mul(u128::from(multiplier));
    ((product >> 64) as usize, product as u64)
}

/// Number of the root's buckets, and what a sector is multiplied by to find its bucket.
fn root(len: usize, end: u64) -> (usize, u64) {
    let buckets = len.div_ceil(PER_BUCKET);
    // No bucket is narrower than a sector because no segment is, so the quotient is at most 2^64.
    (buckets, fraction_of(buckets as u64, end))
}

/// `part / whole` in units of 2^-64, rounded down, and at most `u64::MAX`.
fn fraction_of(part: u64, whole: u64) -> u64 {
    if part >= whole {
        return u64::MAX;
    }
    // Bit by bit, because the kernel has no division of 128 bits. `whole` is at most 2^50.
    let (mut quotient, mut rest) = (0u64, part);
    for _ in 0..u64::BITS {
        rest = rest.wrapping_shl(1);
        quotient = quotient.wrapping_shl(1);
        if rest >= whole {
            rest = rest.wrapping_sub(whole);
            quotient |= 1;
        }
    }
    quotient
}

/// The layout of a directory, which is counted before it is written.
struct Layout<W> {
    /// Words that are taken.
    len: usize,
    /// Words that can be taken.
    limit: usize,
    /// Number of the first of the last [`WINDOW`] segments, 0 where there are fewer.
    last_window: usize,
    /// Receives the range of the words that are known next, and their value.
    write: W,
}

impl<W: FnMut(core::ops::Range<usize>, u32)> Layout<W> {
    /// Lays out the directory for `segments` and returns its length.
    fn all(segments: &[PackedSegment], write: W) -> usize {
        let end = segments.last().map_or(0, |last| last.end());
        let (buckets, multiplier) = root(segments.len(), end);
        let root = Node {
            at: 0,
            scale: 1,
            multiplier,
        };
        let mut layout = Self {
            len: buckets,
            limit: buckets.saturating_add(segments.len()),
            last_window: segments.len().saturating_sub(WINDOW),
            write,
        };
        layout.node(root, buckets, segments, 0, 0);
        layout.len
    }

    /// Lays out one node, whose `segments` begin with number `first`. Recursion ends at `DEPTH`.
    fn node(
        &mut self,
        node: Node,
        buckets: usize,
        mut segments: &[PackedSegment],
        mut first: usize,
        depth: usize,
    ) {
        let end = node.at.saturating_add(buckets);
        let mut next = node.at;
        while let Some(segment) = segments.first() {
            let bucket = node.bucket_of(segment);
            let same = |other: &&PackedSegment| node.bucket_of(other) == bucket;
            let crowd = segments.iter().take_while(same).count();
            let (crowd, others) = segments.split_at_checked(crowd).unwrap_or((segments, &[]));
            // Buckets in which no segment ends share the number of the one behind them.
            let after = node.at.saturating_add(bucket).saturating_add(1);
            self.name(next..after, first);
            next = after;

            let parts = crowd.len().div_ceil(PER_BUCKET);
            let at = self.len;
            let len = at.saturating_add(parts).saturating_add(1);
            if crowd.len() > CROWD && depth < DEPTH && len <= self.limit {
                self.len = len;
                (self.write)(after.saturating_sub(1)..after, NODE | at as u32);
                (self.write)(at..at.saturating_add(1), parts as u32);
                let child = Node {
                    at: at.saturating_add(1),
                    scale: node.scale.wrapping_mul(node.multiplier),
                    multiplier: parts as u64,
                };
                self.node(child, parts, crowd, first, depth + 1);
            }
            first = first.saturating_add(crowd.len());
            segments = others;
        }
        self.name(next..end, first);
    }

    /// Writes the words of buckets whose first segment has number `first`.
    fn name(&mut self, words: core::ops::Range<usize>, first: usize) {
        (self.write)(words, first.min(self.last_window) as u32);
    }
}

/// Number of words that the directory of an index of `segments` needs.
pub fn directory_len(segments: &[PackedSegment]) -> usize {
    Layout::all(segments, |_, _| ())
}

/// The lookup structure over merged segments.
///
/// `S` holds the segments and `D` the directory: a `KVVec` in the kernel, a `Vec` in userspace, or
/// slices.
///
/// # Invariants
///
/// - the segments are in order and do not overlap;
/// - `end` is the end of the last segment, 0 where there is none;
/// - `multiplier` is that of the root, and `directory` is as the module's documentation explains: so
///   [`WINDOW`] segments begin with each number in it, unless there are fewer in all;
/// - `few` are the first segments, the last again and again where there are fewer.
///
/// A storage that changes behind the index makes it answer nonsense but not panic.
pub struct Index<S, D> {
    segments: S,
    directory: D,
    end: u64,
    multiplier: u64,
    few: [PackedSegment; WINDOW],
}

impl<S, D> Index<S, D>
where
    S: Deref<Target = [PackedSegment]>,
    D: Deref<Target = [u32]>,
{
    /// Builds the index of `segments` in `directory`, whose content does not matter and whose length
    /// is [`directory_len`].
    pub fn build(segments: S, mut directory: D) -> Result<Self, BuildError>
    where
        D: DerefMut,
    {
        let mut end = 0;
        for (at, segment) in segments.iter().enumerate() {
            if segment.start() < end {
                return Err(BuildError::Unsorted { at });
            }
            end = segment.end();
        }
        if segments.len() > 1 << 30 {
            return Err(BuildError::TooMany);
        }
        let words = &mut *directory;
        let mut fits = true;
        let len = Layout::all(&segments, |range, word| match words.get_mut(range) {
            Some(words) => words.fill(word),
            None => fits = false,
        });
        if !fits || len != directory.len() {
            return Err(BuildError::WrongDirectory);
        }
        let (_, multiplier) = root(segments.len(), end);
        // Where there are none at all no lookup comes to them.
        let few = core::array::from_fn(|number| {
            let segment = segments.get(number).or(segments.last());
            segment.copied().unwrap_or(PackedSegment::ZERO_SECTOR)
        });
        // INVARIANT: order was checked, and the layout gave every word its value.
        Ok(Self {
            segments,
            directory,
            end,
            multiplier,
            few,
        })
    }

    /// The segments, in order.
    pub fn segments(&self) -> &[PackedSegment] {
        &self.segments
    }

    /// First sector after the last segment, 0 where there is none.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes of memory that segments and directory take.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.segments).saturating_add(size_of_val(&*self.directory))
    }

    /// The mapping of `sector`: from there to the end of the segment or of the hole.
    #[inline]
    pub fn lookup(&self, sector: u64) -> Mapping {
        match self.near(sector) {
            Some(segment) => Mapping::at(sector, segment),
            None => self.far(sector),
        }
    }

    /// Number of a segment at or before the first that ends after `sector`, and close to it.
    #[inline(always)]
    fn number(&self, sector: u64) -> Option<usize> {
        if sector >= self.end {
            return None;
        }
        let (bucket, mut fraction) = split(sector, self.multiplier);
        let mut word = *self.directory.get(bucket)?;
        while word & NODE != 0 {
            let (buckets, words) = self
                .directory
                .get((word ^ NODE) as usize..)?
                .split_first()?;
            let (bucket, rest) = split(fraction, u64::from(*buckets));
            word = *words.get(bucket)?;
            fraction = rest;
        }
        Some(word as usize)
    }

    /// The first segment that ends after `sector`, if it is among the first of its bucket.
    #[inline(always)]
    fn near(&self, sector: u64) -> Option<PackedSegment> {
        let from = self.number(sector)?;
        let limit = PackedSegment::key_limit(sector);
        let window = self.segments.get(from..from.wrapping_add(WINDOW));
        // By the type invariant, those are all where there are fewer.
        let window = window.unwrap_or(&self.few);
        // All but the last, which is asked only when it is its turn.
        let (_, before) = window.split_last()?;
        let passed = before.iter().map(|s| usize::from(s.key() <= limit)).sum();
        let segment = *window.get::<usize>(passed)?;
        (segment.key() > limit).then_some(segment)
    }

    /// The mapping of `sector` together with those that continue it, until it has `wanted` sectors.
    ///
    /// What continues data follows it in the blob of the same layer. Whatever reads as zeros continues
    /// what does.
    #[inline]
    pub fn run(&self, sector: u64, wanted: u64) -> Mapping {
        let mapping = self.lookup(sector);
        if mapping.sectors() >= wanted {
            return mapping;
        }
        self.longer(mapping, wanted)
    }

    /// The same for a mapping that is too short.
    #[inline(never)]
    fn longer(&self, mut run: Mapping, wanted: u64) -> Mapping {
        for next in self.range(run.end(), u64::MAX) {
            match run.join(next) {
                Some(joined) => run = joined,
                None => break,
            }
            if run.sectors() >= wanted {
                break;
            }
        }
        run
    }

    /// The same mapping for any sector.
    #[cold]
    #[inline(never)]
    fn far(&self, sector: u64) -> Mapping {
        // The last segments are never far: here they would be found too, but cost more.
        debug_assert!(self
            .number(sector)
            .is_none_or(|from| from.saturating_add(WINDOW) < self.segments.len()));
        match self.from(sector).first() {
            Some(segment) => Mapping::at(sector, *segment),
            None => Mapping::rest(sector),
        }
    }

    /// The segments that end after `sector`.
    fn from(&self, sector: u64) -> &[PackedSegment] {
        let Some(mut segments) = self
            .number(sector)
            .and_then(|from| self.segments.get(from..))
        else {
            return &[];
        };
        let limit = PackedSegment::key_limit(sector);
        let passed = |segment: &PackedSegment| segment.key() <= limit;
        let mut step = WINDOW;
        while segments.get(step.wrapping_sub(1)).is_some_and(passed) {
            segments = segments.get(step..).unwrap_or(&[]);
            step = step.saturating_mul(2);
        }
        let near = segments.get(..step).unwrap_or(segments);
        segments.get(near.partition_point(passed)..).unwrap_or(&[])
    }

    /// The mappings of `from..to`, in order and without a gap.
    pub fn range(&self, from: u64, to: u64) -> Range<'_> {
        Range {
            segments: self.from(from),
            at: from,
            to,
        }
    }
}

/// Iterator over the mappings of a range of sectors; see [`Index::range`].
///
/// # Invariants
///
/// `segments` are those of the index that end after `at`.
#[derive(Clone)]
pub struct Range<'a> {
    segments: &'a [PackedSegment],
    at: u64,
    to: u64,
}

impl Iterator for Range<'_> {
    type Item = Mapping;

    fn next(&mut self) -> Option<Mapping> {
        if self.at >= self.to {
            return None;
        }
        let mapping = match self.segments.split_first() {
            Some((segment, others)) => {
                let mapping = Mapping::at(self.at, *segment);
                if mapping.end == segment.end() {
                    self.segments = others;
                }
                mapping
            }
            None => Mapping::rest(self.at),
        };
        // INVARIANT: a segment was dropped exactly when it ends where `at` goes to.
        self.at = mapping.end;
        Some(mapping.until(self.to))
    }
}
