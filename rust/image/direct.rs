// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Which stacks can be accessed directly: where every page of the image is a page of a blob.
//!
//! A file system with DAX maps the pages that hold the blob. So segments must begin and end, in the
//! image and in the blob, where pages do, and no page may be in two places. Pages that no layer has
//! data for need memory elsewhere, one page for each.

use super::segment::PackedSegment;

/// Why a stack cannot be accessed directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// A segment of `layer` does not begin and end with pages.
    Unaligned {
        /// Number of the layer.
        layer: u8,
        /// First virtual sector of the segment.
        sector: u64,
    },
    /// A segment of `layer` is stored before the end of an earlier one, so perhaps in its place.
    OutOfOrder {
        /// Number of the layer.
        layer: u8,
        /// First virtual sector of the segment.
        sector: u64,
    },
}

/// Checks that the pages before virtual sector `end` are each in one place.
///
/// `segments` are those of a merged index, in order. A page is `page` sectors, a power of two, and
/// `end` is a multiple of it. `ends` has a word for every layer, which is zero at first; it is where
/// what was seen of the layer ends in its blob.
///
/// Returns the first sector for which no layer has data, if there is one before `end`.
///
/// # Errors
///
/// What is in the way. Data that is out of order need not be anywhere twice, but what writes layers
/// stores it in order, and so that can be told without a table of all pages.
pub fn check(
    segments: &[PackedSegment],
    end: u64,
    page: u64,
    ends: &mut [u64],
) -> Result<Option<u64>, Obstacle> {
    let mut covered = 0;
    let mut hole = None;
    for segment in segments
        .iter()
        .filter(|segment| !segment.zeroed())
        .map_while(|segment| segment.before(end))
    {
        let (layer, sector) = (segment.layer(), segment.start());
        if (sector | segment.end() | segment.stored()) & page.wrapping_sub(1) != 0 {
            return Err(Obstacle::Unaligned { layer, sector });
        }
        let Some(stored_end) = ends.get_mut(usize::from(layer)) else {
            return Err(Obstacle::OutOfOrder { layer, sector });
        };
        if segment.stored() < *stored_end {
            return Err(Obstacle::OutOfOrder { layer, sector });
        }
        // Cannot wrap, as positions have 55 bits.
        *stored_end = segment.stored().wrapping_add(segment.sectors().into());
        if sector > covered {
            hole = hole.or(Some(covered));
        }
        covered = segment.end();
    }
    Ok(hole.or((covered < end).then_some(covered)))
}

/// The largest pages before virtual sector `end`, in sectors: what all segments are aligned to but for the part behind the
/// last whole page of `limit` sectors, a power of two.
pub fn largest_page(segments: &[PackedSegment], end: u64, limit: u64) -> u64 {
    let whole = end & limit.wrapping_neg();
    if whole == 0 && limit > 1 {
        return largest_page(segments, end, limit / 2);
    }
    let bits = segments
        .iter()
        .filter(|segment| !segment.zeroed())
        .map_while(|segment| segment.before(whole))
        .fold(limit, |bits, segment| {
            bits | segment.start() | segment.end() | segment.stored()
        });
    bits & bits.wrapping_neg()
}
