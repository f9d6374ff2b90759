// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The merge: up to 255 sorted layers become one sorted list in which the topmost layer wins.
//!
//! A zeroed segment is a segment like any other: it hides what lies below and stays in the result,
//! also where nothing lies below. So the three answers for a sector stay apart: data of a layer,
//! zeros of a layer, and a hole that no layer owns.
//!
//! # How
//!
//! One sweep over the virtual device. The next segment to begin, over all layers, comes from a
//! tournament tree with one leaf per layer; replacing the winner costs one comparison per level.
//! Every layer has at most one segment that has begun and not ended, because its segments do not
//! overlap; a bitmap says which layers have one. The topmost of them owns the position of the sweep.
//! Layers are neither merged in pairs nor visited recursively.
//!
//! # Cost
//!
//! For `n` segments in `k` layers, time is O(n log k): each segment enters the tournament once and
//! the bitmap once. Memory is one [`Lane`] (48 bytes) per layer, rounded up to a power of two, hence
//! at most 12 KiB, beside the layers and the result.
//!
//! The result has at most `2n - 1` segments: each begins where some segment begins or ends, and none
//! begins at the last end. A layer of long segments under a layer of short ones that leave gaps
//! reaches it. The number is known at the end only, as counting before would be a second merge; a
//! sink that wants no more than some number of segments refuses the next.

use super::segment::PackedSegment;
use core::ops::Deref;

/// Layers that a stack can have at most.
pub const MAX_LAYERS: usize = 255;

/// Why a merge ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeError<E> {
    /// There are more than [`MAX_LAYERS`] layers.
    TooManyLayers,
    /// The scratch has fewer than [`lanes_needed`] lanes.
    ScratchTooSmall,
    /// Segment number `at` of layer number `layer` begins before its predecessor ends.
    Unsorted {
        /// Position of the layer in the stack, 0 = bottom.
        layer: usize,
        /// Position of the segment in the layer.
        at: usize,
    },
    /// The sink refused a segment.
    Sink(E),
}

/// Scratch for one layer during a merge. The content is of no interest to the caller.
#[derive(Clone, Copy, Default)]
pub struct Lane {
    /// Children of one inner node of the tournament: keys of their winners.
    pair: [u64; 2],
    /// First segment of the layer that has not begun yet.
    next: usize,
    /// Segment of the layer that began last. Valid while the layer's bit is set.
    begun: Option<PackedSegment>,
}

/// Number of lanes that a merge of `layers` layers needs, at least 1.
pub fn lanes_needed(layers: usize) -> usize {
    layers.min(MAX_LAYERS).next_power_of_two()
}

/// Merges `layers`, bottom first, into `sink`, which receives the segments in order.
///
/// The layer number of a segment is the one it was given when it was made; its rank is its position
/// in `layers`. Neighbours that continue each other are joined. See the [module](self) for the cost.
pub fn merge<L, E>(
    layers: &[L],
    scratch: &mut [Lane],
    sink: impl FnMut(PackedSegment) -> Result<(), E>,
) -> Result<(), MergeError<E>>
where
    L: Deref<Target = [PackedSegment]>,
{
    if layers.len() > MAX_LAYERS {
        return Err(MergeError::TooManyLayers);
    }
    let lanes = scratch
        .get_mut(..lanes_needed(layers.len()))
        .ok_or(MergeError::ScratchTooSmall)?;
    let mut out = Joiner { held: None, sink };
    let mut sweep = Sweep {
        layers,
        lanes,
        begun: Bits([0; 4]),
        owner: None,
        at: 0,
    };
    let mut first = sweep.start();
    while first != NONE {
        let layer = layer_of(first);
        sweep.advance(first >> LAYER_BITS, &mut out)?;
        first = sweep.begin(layer, &mut out)?;
    }
    sweep.advance(u64::MAX, &mut out)?;
    out.flush()
}

/// What the tournament compares: the start of a segment above the layer's complement, so that of
/// segments that begin together the topmost comes first and the others begin hidden.
const LAYER_BITS: u32 = 8;
const LAYER_MASK: u64 = (1 << LAYER_BITS) - 1;

/// Key of a layer that has no segments left.
const NONE: u64 = u64::MAX;

fn key(start: u64, layer: usize) -> u64 {
    (start << LAYER_BITS) | (!(layer as u64) & LAYER_MASK)
}

fn layer_of(key: u64) -> usize {
    (!key & LAYER_MASK) as usize
}

/// State of a merge.
///
/// # Invariants
///
/// - everything before `at` has been given to the sink;
/// - the bit of a layer is set if its last begun segment may end after `at`;
/// - `owner` is the topmost layer whose begun segment covers `at`, and that segment.
struct Sweep<'a, L> {
    layers: &'a [L],
    lanes: &'a mut [Lane],
    begun: Bits,
    owner: Option<(usize, PackedSegment)>,
    at: u64,
}

impl<L: Deref<Target = [PackedSegment]>> Sweep<'_, L> {
    /// Enters every layer into the tournament and returns the winner's key.
    fn start(&mut self) -> u64 {
        self.lanes.fill(Lane {
            pair: [NONE; 2],
            next: 0,
            begun: None,
        });
        let mut first = NONE;
        for (layer, segments) in self.layers.iter().enumerate() {
            if let Some(segment) = segments.first() {
                first = self.replay(layer, key(segment.start(), layer));
            }
        }
        first
    }

    /// Gives `layer` a new key and returns the key that wins then.
    #[inline]
    fn replay(&mut self, layer: usize, key: u64) -> u64 {
        // Nodes are numbered as in a heap: the root is 1, the children of i are 2i and 2i + 1, the
        // leaves follow the inner nodes. Lane i holds both children of i; lane 0 holds the root.
        let mut node = self.lanes.len().wrapping_add(layer);
        let mut winner = key;
        while let (Some(lane), true) = (self.lanes.get_mut(node >> 1), node > 0) {
            // The sibling does not wait for the winner: all levels are loaded at once.
            let side = node & 1;
            lane.pair[side] = winner;
            winner = winner.min(lane.pair[side ^ 1]);
            node >>= 1;
        }
        winner
    }

    /// Lets the next segment of `layer` begin and returns the key that wins then.
    fn begin<E, S>(&mut self, layer: usize, out: &mut Joiner<S>) -> Result<u64, MergeError<E>>
    where
        S: FnMut(PackedSegment) -> Result<(), E>,
    {
        let Some((segments, lane)) = self.layers.get(layer).zip(self.lanes.get_mut(layer)) else {
            return Ok(NONE);
        };
        let Some(&segment) = segments.get(lane.next) else {
            return Ok(self.replay(layer, NONE));
        };
        lane.next = lane.next.saturating_add(1);
        lane.begun = Some(segment);
        self.begun.set(layer);
        let next_key = match segments.get(lane.next) {
            Some(next) if next.start() < segment.end() => {
                let at = lane.next;
                return Err(MergeError::Unsorted { layer, at });
            }
            Some(next) => key(next.start(), layer),
            None => NONE,
        };
        // A segment below the owner begins hidden.
        if self.owner.is_none_or(|(above, _)| above < layer) {
            let start = segment.start();
            if let Some((_, owner)) = self.owner.filter(|_| self.at < start) {
                out.push(owner.part(self.at, start))?;
            }
            self.at = start;
            self.owner = Some((layer, segment));
        }
        Ok(self.replay(layer, next_key))
    }

    /// Moves the sweep up to `to` or to where no layer owns anything, whichever comes first.
    ///
    /// Ends segments but does not cut the one that covers `to`.
    fn advance<E, S>(&mut self, to: u64, out: &mut Joiner<S>) -> Result<(), MergeError<E>>
    where
        S: FnMut(PackedSegment) -> Result<(), E>,
    {
        while let Some((layer, owner)) = self.owner.filter(|(_, owner)| owner.end() <= to) {
            out.push(owner.part(self.at, owner.end()))?;
            self.at = owner.end();
            // `topmost` would do it, one round later.
            self.begun.clear(layer);
            self.owner = self.topmost();
        }
        Ok(())
    }

    /// The topmost begun segment that covers `at`. Forgets those above it, which have ended.
    fn topmost(&mut self) -> Option<(usize, PackedSegment)> {
        loop {
            let layer = self.begun.highest()?;
            match self.lanes.get(layer).and_then(|lane| lane.begun) {
                Some(segment) if segment.end() > self.at => return Some((layer, segment)),
                _ => self.begun.clear(layer),
            }
        }
    }
}

/// A set of layers.
struct Bits([u64; 4]);

impl Bits {
    fn word(&mut self, layer: usize) -> &mut u64 {
        &mut self.0[(layer >> 6) & 3]
    }

    fn set(&mut self, layer: usize) {
        *self.word(layer) |= 1 << (layer & 63);
    }

    fn clear(&mut self, layer: usize) {
        *self.word(layer) &= !(1 << (layer & 63));
    }

    fn highest(&self) -> Option<usize> {
        let (i, word) = self.0.iter().enumerate().rfind(|(_, word)| **word != 0)?;
        Some(i * 64 + (word.ilog2() as usize))
    }
}

/// Joins neighbours on their way to the sink.
struct Joiner<S> {
    held: Option<PackedSegment>,
    sink: S,
}

impl<S> Joiner<S> {
    fn push<E>(&mut self, segment: PackedSegment) -> Result<(), MergeError<E>>
    where
        S: FnMut(PackedSegment) -> Result<(), E>,
    {
        if let Some(held) = self.held {
            if let Some(joined) = held.join(&segment) {
                self.held = Some(joined);
                return Ok(());
            }
            (self.sink)(held).map_err(MergeError::Sink)?;
        }
        self.held = Some(segment);
        Ok(())
    }

    fn flush<E>(mut self) -> Result<(), MergeError<E>>
    where
        S: FnMut(PackedSegment) -> Result<(), E>,
    {
        match self.held {
            Some(held) => (self.sink)(held).map_err(MergeError::Sink),
            None => Ok(()),
        }
    }
}
