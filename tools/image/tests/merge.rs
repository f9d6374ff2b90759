// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Edges of the merge and of the packed segment that random stacks do not hit for certain.

use ovbd_image::merge::{lanes_needed, merge, Lane, MergeError, MAX_LAYERS};
use ovbd_image::segment::{
    PackedSegment, Segment, MAX_SEGMENT_SECTORS, MAX_STORED_SECTORS, MAX_VIRTUAL_SECTORS,
};
use std::convert::Infallible;

fn data(start: u64, sectors: u32, stored: u64, layer: u8) -> PackedSegment {
    Segment::new(start, sectors, stored, layer, false)
        .unwrap()
        .into()
}

fn zero(start: u64, sectors: u32, layer: u8) -> PackedSegment {
    Segment::new(start, sectors, 8, layer, true).unwrap().into()
}

fn merged(stack: &[Vec<PackedSegment>]) -> Vec<PackedSegment> {
    let mut lanes = vec![Lane::default(); lanes_needed(stack.len())];
    let mut out = Vec::new();
    let sink = |segment| {
        out.push(segment);
        Ok::<_, Infallible>(())
    };
    merge(stack, &mut lanes, sink).unwrap();
    out
}

#[test]
fn nothing_gives_nothing() {
    assert_eq!(merged(&[]), []);
    assert_eq!(merged(&[vec![]]), []);
    assert_eq!(merged(&vec![vec![]; MAX_LAYERS]), []);
    assert_eq!(lanes_needed(0), 1);
}

#[test]
fn the_greatest_result() {
    // A long segment shows through every gap of the layer above.
    for n in [1u64, 2, 100] {
        let long = data(0, 2 * n as u32 + 1, 8, 0);
        let comb: Vec<_> = (0..n)
            .map(|i| data(2 * i + 1, 1, 5000 + 7 * i, 1))
            .collect();
        let stack = [vec![long], comb];
        assert_eq!(merged(&stack).len() as u64, 2 * (n + 1) - 1);
    }
}

#[test]
fn a_segment_is_cut_at_the_end_of_the_stack() {
    for segment in [data(10, 20, 100, 3), zero(10, 20, 3)] {
        let cut = |end| segment.before(end).map(Segment::from);
        let part = |sectors| Segment::new(10, sectors, segment.stored(), 3, segment.zeroed());
        assert_eq!(cut(0), None);
        assert_eq!(cut(10), None);
        assert_eq!(cut(11), part(1));
        assert_eq!(cut(29), part(19));
        assert_eq!(cut(30), part(20));
        assert_eq!(cut(u64::MAX), part(20));
    }
}

#[test]
fn a_zeroed_segment_hides_and_stays() {
    let stack = [
        vec![data(10, 20, 100, 0)],
        vec![zero(0, 15, 1), zero(40, 5, 1)],
    ];
    let expected = [zero(0, 15, 1), data(15, 15, 105, 0), zero(40, 5, 1)];
    assert_eq!(merged(&stack), expected);
}

#[test]
fn what_is_hidden_comes_back() {
    let stack = [
        vec![data(0, 100, 1000, 0)],
        vec![data(10, 80, 2000, 1)],
        vec![data(20, 5, 3000, 2), data(30, 5, 4000, 2)],
    ];
    let expected = [
        data(0, 10, 1000, 0),
        data(10, 10, 2000, 1),
        data(20, 5, 3000, 2),
        data(25, 5, 2015, 1),
        data(30, 5, 4000, 2),
        data(35, 55, 2025, 1),
        data(90, 10, 1090, 0),
    ];
    assert_eq!(merged(&stack), expected);
}

#[test]
fn equal_starts_and_ends() {
    let stack = [
        vec![data(0, 8, 100, 0), data(8, 8, 200, 0)],
        vec![data(0, 4, 300, 1), data(12, 4, 400, 1)],
        vec![data(0, 4, 500, 2)],
    ];
    let expected = [
        data(0, 4, 500, 2),
        data(4, 4, 104, 0),
        data(8, 4, 200, 0),
        data(12, 4, 400, 1),
    ];
    assert_eq!(merged(&stack), expected);
}

#[test]
fn neighbours_are_joined_where_they_continue_each_other() {
    let max = MAX_SEGMENT_SECTORS;
    let one = |segments: &[PackedSegment]| merged(&[segments.to_vec()]);
    assert_eq!(
        one(&[data(0, 8, 100, 3), data(8, 8, 108, 3)]),
        [data(0, 16, 100, 3)]
    );
    assert_eq!(
        one(&[
            data(0, max - 8, 100, 3),
            data(u64::from(max) - 8, 8, u64::from(max) + 92, 3)
        ]),
        [data(0, max, 100, 3)]
    );
    assert_eq!(
        one(&[zero(0, 8, 3), zero(8, 8, 3), zero(16, 8, 3)]),
        [zero(0, 24, 3)]
    );
    let apart = [
        vec![data(0, 8, 100, 3), data(8, 8, 109, 3)],
        vec![data(0, 8, 100, 3), data(9, 8, 108, 3)],
        vec![data(0, 8, 100, 3), data(8, 8, 108, 4)],
        vec![data(0, 8, 100, 3), zero(8, 8, 3)],
        vec![zero(0, 8, 3), data(8, 8, 8, 3)],
        vec![zero(0, 8, 3), zero(8, 8, 4)],
        vec![
            data(0, max, 100, 3),
            data(u64::from(max), 1, 100 + u64::from(max), 3),
        ],
        // The position behind the last that can be stored is the next bit's.
        vec![data(0, 8, MAX_STORED_SECTORS - 8, 3), zero(8, 8, 3)],
    ];
    for segments in apart {
        assert_eq!(one(&segments), segments);
    }
}

#[test]
fn the_topmost_of_255_layers_wins() {
    let stack: Vec<_> = (0..MAX_LAYERS as u64)
        .map(|i| vec![data(i, 600 - 2 * i as u32, 1000 * i + 8, i as u8)])
        .collect();
    let out = merged(&stack);
    assert_eq!(out.len(), 2 * MAX_LAYERS - 1);
    let top = out[MAX_LAYERS - 1];
    assert_eq!((top.start(), top.layer()), (254, 254));
}

#[test]
fn a_merge_that_cannot_be_is_refused() {
    let sink = |_| Ok::<_, Infallible>(());
    let mut lanes = vec![Lane::default(); 256];
    let stack = vec![vec![zero(0, 1, 0)]; MAX_LAYERS + 1];
    assert_eq!(
        merge(&stack, &mut lanes, sink),
        Err(MergeError::TooManyLayers)
    );
    assert_eq!(
        merge(&stack[..5], &mut lanes[..7], sink),
        Err(MergeError::ScratchTooSmall)
    );
    assert_eq!(merge(&stack[..5], &mut lanes[..8], sink), Ok(()));

    let bad = [
        vec![zero(0, 8, 0)],
        vec![zero(0, 8, 1), zero(9, 8, 1), zero(16, 8, 1)],
    ];
    let unsorted = MergeError::Unsorted { layer: 1, at: 2 };
    assert_eq!(merge(&bad, &mut lanes, sink), Err(unsorted));

    let comb: Vec<_> = (0..10).map(|i| zero(2 * i, 1, 0)).collect();
    let mut taken = 0;
    let full = |_| {
        taken += 1;
        if taken < 4 {
            Ok(())
        } else {
            Err("full")
        }
    };
    assert_eq!(
        merge(&[comb], &mut lanes, full),
        Err(MergeError::Sink("full"))
    );
    assert_eq!(taken, 4);
}

#[test]
fn packing_keeps_a_segment() {
    for (start, sectors, stored, layer) in [
        (0, 1, 0, 0),
        (0, MAX_SEGMENT_SECTORS, 8, 255),
        (MAX_VIRTUAL_SECTORS - 1, 1, MAX_STORED_SECTORS - 1, 255),
        (
            MAX_VIRTUAL_SECTORS - 16383,
            16383,
            MAX_STORED_SECTORS - 16383,
            254,
        ),
    ] {
        let segment = Segment::new(start, sectors, stored, layer, false).unwrap();
        assert_eq!(Segment::from(PackedSegment::from(segment)), segment);
        // A zeroed one has no stored position.
        let zeroed = Segment::new(start, sectors, stored, layer, true).unwrap();
        let expected = Segment::new(start, sectors, 0, layer, true).unwrap();
        assert_eq!(Segment::from(PackedSegment::from(zeroed)), expected);
    }
    assert_eq!(size_of::<PackedSegment>(), 16);
}
