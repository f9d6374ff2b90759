// SPDX-License-Identifier: GPL-2.0

//! The merged list of segments while it grows.
//!
//! How many segments a merge gives is known at its end, and counting them before takes as long as
//! the merge. So the list grows in parts that never move; at the end, when the layers' indexes are
//! freed, the parts are copied into one allocation of the right size.

use super::{
    image::segment::PackedSegment,
    lower_read::gfp_table, //
};
use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// Segments of a part: 1 MiB, so that few are needed and little is unused in the last.
const PART_SEGMENTS: usize = 1 << 16;

/// Why a segment was not taken.
pub(super) enum PushError {
    /// There are as many as are allowed.
    TooMany,
    /// There is no memory for it.
    Memory,
}

impl From<AllocError> for PushError {
    fn from(_: AllocError) -> Self {
        Self::Memory
    }
}

/// A list that grows without moving what it holds.
pub(super) struct Merged {
    full: KVec<KVVec<PackedSegment>>,
    last: KVVec<PackedSegment>,
    /// Segments that may still come.
    room: u64,
}

impl Merged {
    /// An empty list for at most `limit` segments, of which some `expected` will come.
    pub(super) fn new(limit: u64, expected: usize) -> Result<Self, AllocError> {
        Ok(Self {
            full: KVec::new(),
            last: part(expected.min(PART_SEGMENTS))?,
            room: limit,
        })
    }

    /// Appends a segment.
    pub(super) fn push(&mut self, segment: PackedSegment) -> Result<(), PushError> {
        self.room = self.room.checked_sub(1).ok_or(PushError::TooMany)?;
        if let Err(error) = self.last.push_within_capacity(segment) {
            let mut next = part(PART_SEGMENTS)?;
            next.push(error.0, gfp_table())?;
            let full = core::mem::replace(&mut self.last, next);
            self.full.push(full, gfp_table())?;
        }
        Ok(())
    }

    /// All segments in one piece.
    pub(super) fn join(mut self) -> Result<KVVec<PackedSegment>, AllocError> {
        self.full.push(self.last, gfp_table())?;
        let mut all = part(self.full.iter().map(|part| part.len()).sum())?;
        for part in &self.full {
            all.extend_from_slice(part, gfp_table())?;
        }
        Ok(all)
    }
}

/// Memory for that many segments.
fn part(segments: usize) -> Result<KVVec<PackedSegment>, AllocError> {
    KVVec::with_capacity(segments, gfp_table())
}
