// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Complete lookups (find the mapping of a random sector and return it): the index against a
//! textbook binary search of the same segments, in the same run, on one thread.
//!
//! `independent` lookups may overlap in the processor, as those of unrelated requests do; `chained`
//! ones wait for each other. Each figure is the best of several rounds that alternate between both.

use ovbd_image::index::{directory_len, Index, Mapping};
use ovbd_image::segment::{PackedSegment, Segment};
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 15;
const LOOKUPS: usize = 1 << 17;

#[path = "common/random.rs"]
mod random;
use random::Random;

/// How segments lie on the virtual device.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// 4 KiB each, no holes.
    Dense,
    /// 4 to 128 KiB, holes of the same sizes before half of them.
    Gaps,
    /// Runs of 64 to 4096 such segments, 64 GiB of hole between two runs on average.
    Runs,
    /// Lengths spread over all orders of magnitude up to 8 MiB, and holes up to 1 GiB.
    Skewed,
}

fn segments(n: usize, layout: Layout, random: &mut Random) -> Vec<PackedSegment> {
    let (mut at, mut out, mut run) = (0, Vec::with_capacity(n), 0);
    for _ in 0..n {
        let (gap, len) = match layout {
            Layout::Dense => (0, 8),
            Layout::Gaps => (
                random.below(2) * (8 + 8 * random.below(32)),
                8 + 8 * random.below(32),
            ),
            Layout::Runs if run == 0 => {
                run = 64 + random.below(4033);
                (8 * random.below(1 << 25), 8)
            }
            Layout::Runs => (
                random.below(2) * (8 + 8 * random.below(32)),
                8 + 8 * random.below(32),
            ),
            Layout::Skewed => (
                random.next() & ((1 << random.below(22)) - 1),
                (random.next() & ((1 << random.below(15)) - 1)).max(1),
            ),
        };
        run = run.saturating_sub(1);
        at += gap;
        let zeroed = random.below(16) == 0;
        let layer = random.below(250) as u8;
        let stored = 8 + random.below(1 << 40);
        out.push(
            Segment::new(at, len as u32, stored, layer, zeroed)
                .unwrap()
                .into(),
        );
        at += len;
    }
    out
}

/// Sectors anywhere on the device or, where most of it is hole, mostly inside segments.
fn sector(segments: &[PackedSegment], layout: Layout, random: &mut Random) -> u64 {
    let end = segments.last().map_or(0, |last| last.end());
    match layout {
        Layout::Dense | Layout::Gaps => random.below(end),
        _ if random.below(8) == 0 => random.below(end),
        _ => {
            let segment = segments[random.below(segments.len() as u64) as usize];
            segment.start() + random.below(segment.sectors().into())
        }
    }
}

/// The textbook.
#[inline(never)]
fn textbook(segments: &[PackedSegment], sector: u64) -> Mapping {
    match segments.get(segments.partition_point(|segment| segment.end() <= sector)) {
        Some(segment) => Mapping::at(sector, *segment),
        None => Mapping::rest(sector),
    }
}

type Tree<'a> = Index<&'a [PackedSegment], Vec<u32>>;

#[inline(never)]
fn indexed(index: &Tree<'_>, sector: u64) -> Mapping {
    index.lookup(sector)
}

/// Nanoseconds per lookup.
fn time(sectors: &[u64], chained: bool, lookup: impl Fn(u64) -> Mapping) -> f64 {
    let begin = Instant::now();
    let mut previous = 0;
    for sector in sectors {
        let mapping = lookup(*sector ^ previous);
        black_box(&mapping);
        if chained {
            // Always 0, but only known when the mapping is.
            previous = mapping.end() >> 63;
        }
    }
    begin.elapsed().as_nanos() as f64 / sectors.len() as f64
}

fn main() {
    let mut random = Random::new();
    println!("lookup: M/s textbook, M/s index, ratio (best of {ROUNDS} rounds)");
    for layout in [Layout::Dense, Layout::Gaps, Layout::Runs, Layout::Skewed] {
        for n in [1_000, 10_000, 100_000, 1_000_000] {
            let segments = segments(n, layout, &mut random);
            let directory = vec![!0; directory_len(&segments)];
            let index = Index::build(&segments[..], directory).unwrap();
            let bytes = index.bytes() as f64 / n as f64;
            print!(
                "{:8} {n:8} segments, {bytes:5.2} bytes each:",
                format!("{layout:?}")
            );
            for chained in [false, true] {
                let mut best = [f64::MAX; 2];
                for _ in 0..ROUNDS {
                    let sectors: Vec<u64> = (0..LOOKUPS)
                        .map(|_| sector(&segments, layout, &mut random))
                        .collect();
                    best[0] = best[0].min(time(&sectors, chained, |s| textbook(&segments, s)));
                    best[1] = best[1].min(time(&sectors, chained, |s| indexed(&index, s)));
                }
                let name = if chained { "chained" } else { "independent" };
                let [old, new] = best.map(|ns| 1e3 / ns);
                print!("  {name} {old:5.1} {new:6.1} {:5.2}x", new / old);
            }
            println!();
        }
    }
}
