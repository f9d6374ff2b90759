// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The segment: a run of virtual sectors and where its data is stored.
//!
//! Layers, the merge and the index all speak in segments. A sector is 512 bytes everywhere.

/// Sectors that one segment can cover at most (14 bits on disk).
pub const MAX_SEGMENT_SECTORS: u32 = (1 << 14) - 1;

/// First virtual sector that no segment may reach; the value itself marks a padding entry on disk.
pub const MAX_VIRTUAL_SECTORS: u64 = (1 << 50) - 1;

/// First stored sector that cannot be expressed (55 bits on disk).
pub const MAX_STORED_SECTORS: u64 = 1 << 55;

/// A run of virtual sectors with one source.
///
/// # Invariants
///
/// - `1 <= sectors <= MAX_SEGMENT_SECTORS`;
/// - `start + sectors <= MAX_VIRTUAL_SECTORS`;
/// - `stored + sectors <= MAX_STORED_SECTORS`, also for a zeroed segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    start: u64,
    stored: u64,
    sectors: u16,
    layer: u8,
    zeroed: bool,
}

impl Segment {
    /// Makes a segment, or `None` where a value breaks the type's invariants.
    pub fn new(start: u64, sectors: u32, stored: u64, layer: u8, zeroed: bool) -> Option<Self> {
        if sectors == 0 || sectors > MAX_SEGMENT_SECTORS {
            return None;
        }
        let length = u64::from(sectors);
        if start.checked_add(length)? > MAX_VIRTUAL_SECTORS
            || stored.checked_add(length)? > MAX_STORED_SECTORS
        {
            return None;
        }
        Some(Self {
            start,
            stored,
            sectors: sectors as u16,
            layer,
            zeroed,
        })
    }

    /// First virtual sector.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u32 {
        u32::from(self.sectors)
    }

    /// First virtual sector after the segment.
    pub fn end(&self) -> u64 {
        // Cannot overflow by the type invariant.
        self.start + u64::from(self.sectors)
    }

    /// Sector of the layer's blob where the data of `start` is stored. Without meaning when zeroed.
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// Position of the owning layer in the stack, 0 = bottom.
    pub fn layer(&self) -> u8 {
        self.layer
    }

    /// Whether the sectors read as zeros and hide what lower layers hold there.
    pub fn zeroed(&self) -> bool {
        self.zeroed
    }

    /// The same segment owned by another layer.
    pub fn with_layer(self, layer: u8) -> Self {
        Self { layer, ..self }
    }

    /// The part of the segment inside `from..to` (virtual sectors), or `None` when they do not meet.
    pub fn clip(&self, from: u64, to: u64) -> Option<Self> {
        let start = self.start.max(from);
        let end = self.end().min(to);
        if start >= end {
            return None;
        }
        Some(Self {
            start,
            stored: self.stored + (start - self.start),
            sectors: (end - start) as u16,
            ..*self
        })
    }
}

const LENGTH_BITS: u32 = 14;
const LENGTH_MASK: u64 = (1 << LENGTH_BITS) - 1;
const ZEROED_SHIFT: u32 = 55;
const ZEROED_BIT: u64 = 1 << ZEROED_SHIFT;
const LAYER_SHIFT: u32 = 56;

/// Where the data of a sector is: the second word of a [`PackedSegment`].
///
/// # Invariants
///
/// `layer << 56 | zeroed << 55 | stored`; `stored` is below 2^14 when zeroed, where it means nothing.
/// So no segment has [`Self::NOWHERE`].
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Origin(u64);

impl Origin {
    /// No layer has data for the sector.
    pub(super) const NOWHERE: Self = Self(u64::MAX);

    #[inline(always)]
    pub(super) fn stored(self) -> u64 {
        self.0 & (ZEROED_BIT - 1)
    }

    #[inline(always)]
    pub(super) fn layer(self) -> u8 {
        (self.0 >> LAYER_SHIFT) as u8
    }

    #[inline(always)]
    pub(super) fn zeroed(self) -> bool {
        self.0 & ZEROED_BIT != 0
    }

    /// The origin of the sector `sectors` further on in the same segment.
    ///
    /// INVARIANT: callers stay inside the segment, whose `stored + sectors` is at most 2^55.
    #[inline(always)]
    pub(super) fn advanced(self, sectors: u64) -> Self {
        Self(self.0.wrapping_add(sectors))
    }

    /// Whether `next` is the origin of the sector `sectors` further on, after the end of the segment.
    #[inline(always)]
    pub(super) fn continues(self, sectors: u64, next: Self) -> bool {
        let same_owner = (self.0 ^ next.0) >> ZEROED_SHIFT == 0;
        same_owner && (self.zeroed() || self.0.wrapping_add(sectors) == next.0)
    }
}

/// A [`Segment`] in the 16 bytes in which layers and indexes keep it in memory.
///
/// The first word is the *end* above the length, not the start as on disk: words then compare like
/// positions without being taken apart, and the first segment that ends after a sector is the one
/// that maps the sector or, in a hole, the one at which the hole ends. One search answers both.
///
/// The stored position of a zeroed segment is not kept.
///
/// # Invariants
///
/// - `key` is `end << 14 | sectors`;
/// - the values are those of a [`Segment`], so its invariants hold.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct PackedSegment {
    key: u64,
    origin: Origin,
}

impl PackedSegment {
    /// The first sector, zeroed: for where there must be some segment.
    // INVARIANT: it is `Segment::new(0, 1, 0, 0, true)`.
    pub(super) const ZERO_SECTOR: Self = Self {
        key: (1 << LENGTH_BITS) | 1,
        origin: Origin(ZEROED_BIT),
    };

    /// The largest [`Self::key`] of a segment that ends at or before `sector`, which is below
    /// [`MAX_VIRTUAL_SECTORS`].
    #[inline(always)]
    pub(super) fn key_limit(sector: u64) -> u64 {
        (sector << LENGTH_BITS) | LENGTH_MASK
    }

    /// The word by which segments are searched; see [`Self::key_limit`].
    #[inline(always)]
    pub(super) fn key(&self) -> u64 {
        self.key
    }

    /// Where the data of `start` is.
    #[inline(always)]
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// First virtual sector.
    #[inline(always)]
    pub fn start(&self) -> u64 {
        // Cannot wrap by the type invariants.
        self.end().wrapping_sub(u64::from(self.sectors()))
    }

    /// Number of sectors.
    #[inline(always)]
    pub fn sectors(&self) -> u32 {
        (self.key & LENGTH_MASK) as u32
    }

    /// First virtual sector after the segment.
    #[inline(always)]
    pub fn end(&self) -> u64 {
        self.key >> LENGTH_BITS
    }

    /// Sector of the layer's blob where the data of `start` is stored. Without meaning when zeroed.
    #[inline(always)]
    pub fn stored(&self) -> u64 {
        self.origin.stored()
    }

    /// Position of the owning layer in the stack, 0 = bottom.
    #[inline(always)]
    pub fn layer(&self) -> u8 {
        self.origin.layer()
    }

    /// Whether the sectors read as zeros and hide what lower layers hold there.
    #[inline(always)]
    pub fn zeroed(&self) -> bool {
        self.origin.zeroed()
    }

    /// The part `from..to`, where `start <= from < to <= end`.
    #[inline(always)]
    pub(super) fn part(&self, from: u64, to: u64) -> Self {
        debug_assert!(self.start() <= from && from < to && to <= self.end());
        // INVARIANT: a part of a segment that is not empty is a segment.
        Self {
            key: (to << LENGTH_BITS) | (to.wrapping_sub(from) & LENGTH_MASK),
            origin: self.origin.advanced(from.wrapping_sub(self.start())),
        }
    }

    /// The part before sector `end`, or `None` where the segment starts there or later.
    #[inline]
    pub fn before(&self, end: u64) -> Option<Self> {
        if self.end() <= end {
            return Some(*self);
        }
        (self.start() < end).then(|| self.part(self.start(), end))
    }

    /// This segment and `next` as one, where that says the same: adjacent, from the same layer, both
    /// zeroed or continuous in the blob, and short enough together.
    #[inline(always)]
    pub(super) fn join(&self, next: &Self) -> Option<Self> {
        let own = u64::from(self.sectors());
        let sectors = own + u64::from(next.sectors());
        if next.start() != self.end()
            || sectors > LENGTH_MASK
            || !self.origin.continues(own, next.origin)
        {
            return None;
        }
        // INVARIANT: `next` ends where the sum ends, in the blob too unless both are zeroed.
        Some(Self {
            key: (next.key & !LENGTH_MASK) | sectors,
            origin: self.origin,
        })
    }
}

impl From<Segment> for PackedSegment {
    #[inline]
    fn from(segment: Segment) -> Self {
        let place = if segment.zeroed() {
            ZEROED_BIT
        } else {
            segment.stored()
        };
        // INVARIANT: the values come from a segment, so each fits its field; `stored` is below 2^55
        // because a segment is not empty.
        Self {
            key: (segment.end() << LENGTH_BITS) | u64::from(segment.sectors()),
            origin: Origin((u64::from(segment.layer()) << LAYER_SHIFT) | place),
        }
    }
}

impl From<PackedSegment> for Segment {
    #[inline]
    fn from(packed: PackedSegment) -> Self {
        // INVARIANT: the values of a packed segment are those of a segment.
        Self {
            start: packed.start(),
            stored: packed.stored(),
            sectors: packed.sectors() as u16,
            layer: packed.layer(),
            zeroed: packed.zeroed(),
        }
    }
}

impl core::fmt::Debug for PackedSegment {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        Segment::from(*self).fmt(f)
    }
}
