// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The index over segments that lie far apart, against a walk through all of them.
//!
//! Density that varies by orders of magnitude is what divides buckets; an array of sectors cannot
//! hold such devices.

use ovbd_image::index::{directory_len, BuildError, Index, Mapping, Source};
use ovbd_image::segment::{PackedSegment, Segment, MAX_SEGMENT_SECTORS, MAX_VIRTUAL_SECTORS};
use proptest::prelude::*;

/// A segment of a layer that fits every device.
fn segment(start: u64, sectors: u64) -> PackedSegment {
    let zeroed = start % 3 == 0;
    let layer = (start % 255) as u8;
    Segment::new(start, sectors as u32, start + 8, layer, zeroed)
        .unwrap()
        .into()
}

/// Lays out gaps and lengths up to the last virtual sector.
fn lay_out(pieces: impl IntoIterator<Item = (u64, u64)>) -> Vec<PackedSegment> {
    let (mut at, mut out) = (0u64, Vec::new());
    for (gap, sectors) in pieces {
        at += gap;
        if at + sectors > MAX_VIRTUAL_SECTORS {
            break;
        }
        out.push(segment(at, sectors));
        at += sectors;
    }
    out
}

/// A number of `0..=bits` bits.
fn any_size(bits: u32) -> impl Strategy<Value = u64> {
    (0..=bits, any::<u64>()).prop_map(|(bits, n)| n & ((1 << bits) - 1))
}

/// Runs of segments that have gaps and lengths of one order of magnitude each.
fn runs() -> impl Strategy<Value = Vec<PackedSegment>> {
    let run = (any_size(50), 0u32..24, 0u32..14, 1usize..400, any::<u64>());
    prop::collection::vec(run, 0..24).prop_map(|runs| {
        let pieces = runs
            .into_iter()
            .flat_map(|(before, gap, len, count, seed)| {
                (0..count as u64).map(move |i| {
                    let noise = seed.wrapping_mul(2 * i + 1).rotate_left(17);
                    let first = if i == 0 { before } else { 0 };
                    (first + noise % (1 << gap), 1 + (noise >> 32) % (1 << len))
                })
            });
        lay_out(pieces)
    })
}

/// Segments of which each is about half as far from the end as the one before: the worst for even
/// division.
fn halving(n: u32) -> Vec<PackedSegment> {
    let mut out = Vec::new();
    for i in 0..n {
        for j in 0..3 {
            out.push(segment((1 << i) + j, 1));
        }
    }
    out.sort_by_key(PackedSegment::start);
    out.dedup_by_key(|segment| segment.start());
    out
}

fn expected(segments: &[PackedSegment], sector: u64) -> (u64, Source) {
    match segments.iter().find(|segment| segment.end() > sector) {
        None => (u64::MAX, Source::Hole),
        Some(s) if sector < s.start() => (s.start(), Source::Hole),
        Some(s) if s.zeroed() => (s.end(), Source::Zero { layer: s.layer() }),
        Some(s) => {
            let (layer, stored) = (s.layer(), s.stored() + (sector - s.start()));
            (s.end(), Source::Data { layer, stored })
        }
    }
}

/// The sectors around every `step`th segment and the given ones, and every mapping in order.
fn check(segments: &[PackedSegment], step: usize, sectors: &[u64]) {
    let len = directory_len(segments);
    let n = segments.len();
    assert!(len <= n.div_ceil(2) + n, "{len} words for {n} segments");
    let index = Index::build(segments, vec![!0; len]).unwrap();
    let around = |segment: &PackedSegment| {
        let (start, end) = (segment.start(), segment.end());
        [start.saturating_sub(1), start, end - 1, end]
    };
    let borders = segments.iter().step_by(step).flat_map(around);
    for sector in borders.chain(sectors.iter().copied()) {
        let found = index.lookup(sector);
        assert_eq!(found.start(), sector);
        assert_eq!(
            (found.end(), found.source()),
            expected(segments, sector),
            "{sector}"
        );
        let mapping = index.range(sector, u64::MAX).next().unwrap();
        assert_eq!(mapping, found);
    }
    let mapped = index.range(0, MAX_VIRTUAL_SECTORS);
    let mapped: Vec<Mapping> = mapped.filter(|m| m.source() != Source::Hole).collect();
    assert_eq!(mapped.len(), n);
    for (mapping, segment) in mapped.iter().zip(segments) {
        assert_eq!(*mapping, Mapping::at(segment.start(), *segment));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn runs_map_as_a_walk(
        segments in runs(),
        sectors in prop::collection::vec(any_size(63), 0..50),
    ) {
        check(&segments, 1 + segments.len() / 400, &sectors);
    }

    #[test]
    fn all_sizes_map_as_a_walk(
        pieces in prop::collection::vec((any_size(40), any_size(13)), 0..2000),
        sectors in prop::collection::vec(any_size(50), 0..50),
    ) {
        let segments = lay_out(pieces.into_iter().map(|(gap, len)| (gap, len + 1)));
        check(&segments, 1 + segments.len() / 400, &sectors);
    }
}

#[test]
fn nothing_maps_nothing() {
    check(&[], 1, &[0, 1, MAX_VIRTUAL_SECTORS, u64::MAX - 1]);
    let index = Index::build(&[][..], vec![]).unwrap();
    assert_eq!((index.end(), index.bytes()), (0, 0));
    assert_eq!(index.range(5, 5).next(), None);
    assert_eq!(index.range(6, 5).next(), None);
    let hole = index.range(5, 9).next().unwrap();
    assert_eq!((hole.end(), hole.source()), (9, Source::Hole));
}

#[test]
fn the_borders_of_the_sector_space() {
    let max = u64::from(MAX_SEGMENT_SECTORS);
    let last = MAX_VIRTUAL_SECTORS;
    let beyond = [
        last - 1,
        last,
        last + 1,
        1 << 50,
        1 << 51,
        1 << 63,
        u64::MAX - 1,
    ];
    check(&[segment(0, 1)], 1, &beyond);
    check(&[segment(last - max, max)], 1, &beyond);
    check(&[segment(last - 1, 1)], 1, &beyond);
    check(&[segment(0, max), segment(last - max, max)], 1, &beyond);
    let mut crowded: Vec<_> = (0..1000).map(|i| segment(i, 1)).collect();
    crowded.extend((1..=1000).rev().map(|i| segment(last - i * max, max)));
    check(&crowded, 1, &beyond);
}

#[test]
fn the_worst_layout_for_even_division() {
    check(&halving(49), 1, &[]);
    // More of it than the directory may grow for.
    let mut many = Vec::new();
    for i in 0..200u64 {
        let base = i << 40;
        let near = halving(39);
        many.extend(near.iter().map(|s| segment(base + s.start(), 1)));
    }
    check(&many, 7, &[]);
}

#[test]
fn what_is_not_an_index_is_refused() {
    let build = |segments: &[PackedSegment], len| Index::build(segments, vec![0; len]).err();
    let good = [segment(0, 8), segment(8, 8), segment(20, 1)];
    let len = directory_len(&good);
    assert_eq!(build(&good, len), None);
    assert_eq!(build(&good, len - 1), Some(BuildError::WrongDirectory));
    assert_eq!(build(&good, len + 1), Some(BuildError::WrongDirectory));
    let overlapping = [segment(0, 8), segment(7, 8), segment(20, 1)];
    assert_eq!(
        build(&overlapping, len),
        Some(BuildError::Unsorted { at: 1 })
    );
    let unsorted = [segment(30, 8), segment(40, 8), segment(20, 1)];
    assert_eq!(build(&unsorted, len), Some(BuildError::Unsorted { at: 2 }));
    let twice = [segment(30, 8), segment(30, 8)];
    assert_eq!(build(&twice, 1), Some(BuildError::Unsorted { at: 1 }));
    // Counting needs no order: it must only end.
    directory_len(&unsorted);
}
