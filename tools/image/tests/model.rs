// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Merge and index against a naive model: an array with one entry per sector.

use ovbd_image::index::{directory_len, Index, Source};
use ovbd_image::merge::{lanes_needed, merge, Lane, MAX_LAYERS};
use ovbd_image::segment::{PackedSegment, Segment, MAX_SEGMENT_SECTORS, MAX_VIRTUAL_SECTORS};
use proptest::prelude::*;
use std::convert::Infallible;

/// Sectors of the model. Long enough for several segments of the greatest length.
const SECTORS: usize = 3 * MAX_SEGMENT_SECTORS as usize;

type Layer = Vec<PackedSegment>;

/// Gap before a segment, its length, where its data is stored relative to the end of its
/// predecessor's (0 = continues it), and whether it is zeroed.
type Piece = (usize, usize, u64, bool);

/// Lays pieces out from sector `base`; those that do not fit are left away.
fn layer(pieces: &[Piece], number: u8, base: u64, sectors: usize) -> Layer {
    let (mut at, mut stored, mut out) = (0, 8, Layer::new());
    for &(gap, len, skip, zeroed) in pieces {
        at += gap;
        if at + len > sectors {
            break;
        }
        stored += skip;
        let segment = Segment::new(base + at as u64, len as u32, stored, number, zeroed).unwrap();
        out.push(segment.into());
        at += len;
        stored += len as u64;
    }
    out
}

fn pieces(max: usize) -> impl Strategy<Value = Vec<Piece>> {
    let gap = prop_oneof![3 => Just(0usize), 4 => 1usize..20, 1 => 0usize..20_000];
    let max_len = MAX_SEGMENT_SECTORS as usize;
    let len = prop_oneof![6 => 1usize..20, 1 => 1usize..=max_len, 1 => Just(max_len)];
    let skip = prop_oneof![Just(0u64), 0u64..4];
    prop::collection::vec((gap, len, skip, prop::bool::weighted(0.3)), 0..max)
}

/// A stack: few layers of many segments, or up to 255 of few.
fn stack() -> impl Strategy<Value = Vec<Layer>> {
    let deep = prop::collection::vec(pieces(12), 0..=MAX_LAYERS);
    let flat = prop::collection::vec(pieces(600), 0..8);
    prop_oneof![deep, flat].prop_map(|stack| {
        let number = |(i, p): (usize, &Vec<Piece>)| layer(p, i as u8, 0, SECTORS);
        stack.iter().enumerate().map(number).collect()
    })
}

/// What the model says about every sector.
fn model(stack: &[Layer], base: u64, sectors: usize) -> Vec<Source> {
    let mut model = vec![Source::Hole; sectors];
    for segment in stack.iter().flatten() {
        for i in 0..u64::from(segment.sectors()) {
            let layer = segment.layer();
            model[(segment.start() - base + i) as usize] = if segment.zeroed() {
                Source::Zero { layer }
            } else {
                let stored = segment.stored() + i;
                Source::Data { layer, stored }
            };
        }
    }
    model
}

fn merged(stack: &[Layer]) -> Layer {
    let mut lanes = vec![Lane::default(); lanes_needed(stack.len())];
    let mut out = Layer::new();
    let sink = |segment| {
        out.push(segment);
        Ok::<_, Infallible>(())
    };
    merge(stack, &mut lanes, sink).unwrap();
    let input: usize = stack.iter().map(Vec::len).sum();
    assert!(
        out.len() <= (2 * input).saturating_sub(1),
        "{} of {input}",
        out.len()
    );
    out
}

fn index(segments: &[PackedSegment]) -> Index<&[PackedSegment], Vec<u32>> {
    // Garbage: a build must not depend on what it finds.
    let directory = vec![!0; directory_len(segments)];
    Index::build(segments, directory).unwrap()
}

/// Whether one segment could say what both say, which the merge must then have made of them.
fn joinable(a: &PackedSegment, b: &PackedSegment) -> bool {
    a.end() == b.start()
        && (a.layer(), a.zeroed()) == (b.layer(), b.zeroed())
        && (a.zeroed() || a.stored() + u64::from(a.sectors()) == b.stored())
        && a.sectors() + b.sectors() <= MAX_SEGMENT_SECTORS
}

/// Every sector, every range given, and that mappings end where segments and holes do.
fn check(stack: &[Layer], base: u64, sectors: usize, ranges: &[(usize, usize)]) {
    let model = model(stack, base, sectors);
    let segments = merged(stack);
    for pair in segments.windows(2) {
        assert!(pair[0].end() <= pair[1].start(), "{pair:?}");
        assert!(!joinable(&pair[0], &pair[1]), "{pair:?}");
    }
    let index = index(&segments);
    let mut ahead = segments.iter().peekable();
    for (i, expected) in model.iter().enumerate() {
        let sector = base + i as u64;
        let mapping = index.lookup(sector);
        assert_eq!(mapping.start(), sector);
        assert_eq!(mapping.source(), *expected, "sector {sector}");
        while ahead.next_if(|segment| segment.end() <= sector).is_some() {}
        let end = match ahead.peek() {
            Some(segment) if sector < segment.start() => segment.start(),
            Some(segment) => segment.end(),
            None => u64::MAX,
        };
        assert_eq!(mapping.end(), end, "sector {sector}");
        assert_eq!(mapping.sectors(), end - sector);
    }
    for &(from, to) in ranges {
        let (from, to) = (base + from as u64, base + to as u64);
        let mut at = from;
        for mapping in index.range(from, to) {
            assert_eq!(mapping.start(), at);
            assert_eq!(mapping.end(), index.lookup(at).end().min(to));
            assert_eq!(mapping.source(), index.lookup(at).source());
            at = mapping.end();
        }
        assert_eq!(at, from.max(to));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn stacks_map_as_the_model(
        stack in stack(),
        ranges in prop::collection::vec((0..SECTORS, 0..SECTORS), 0..8),
    ) {
        check(&stack, 0, SECTORS, &ranges);
    }

    #[test]
    fn stacks_map_up_to_the_last_sector(stack in prop::collection::vec(pieces(20), 0..5)) {
        let base = MAX_VIRTUAL_SECTORS - SECTORS as u64;
        let mut at_end = Vec::new();
        for (i, pieces) in stack.iter().enumerate() {
            let mut layer = layer(pieces, i as u8, base, SECTORS);
            // The last one ends where segments must.
            let from = layer.last().map_or(base, |last| last.end());
            let from = from.max(MAX_VIRTUAL_SECTORS - u64::from(MAX_SEGMENT_SECTORS));
            let len = (MAX_VIRTUAL_SECTORS - from) as u32;
            layer.extend(Segment::new(from, len, 1 << 54, i as u8, false).map(PackedSegment::from));
            at_end.push(layer);
        }
        check(&at_end, base, SECTORS, &[(0, SECTORS)]);
    }
}
