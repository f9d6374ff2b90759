// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The merge of one million segments in 1 to 250 layers, and the build of the index of the result,
//! on one thread. Each figure is the best of several rounds.

use ovbd_image::index::{directory_len, Index};
use ovbd_image::merge::{lanes_needed, merge, Lane};
use ovbd_image::segment::{PackedSegment, Segment};
use std::convert::Infallible;
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 5;
const SEGMENTS: usize = 1_000_000;

#[path = "common/random.rs"]
mod random;
use random::Random;

/// Where the segments of a layer lie.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// Anywhere on the device.
    Scattered,
    /// Anywhere on a device eight times smaller, so that they hide and split each other.
    Crowded,
    /// In eight places, side by side.
    Clustered,
}

type Layer = Vec<PackedSegment>;

/// One layer of segments of 4 to 64 KiB, in slots so that they do not overlap each other.
fn layer(number: usize, len: usize, layout: Layout, random: &mut Random) -> Layer {
    const SLOT: u64 = 128;
    let slots = match layout {
        Layout::Crowded => SEGMENTS as u64 / 4,
        _ => 2 * SEGMENTS as u64,
    };
    let mut starts: Vec<u64> = match layout {
        Layout::Scattered | Layout::Crowded => (0..len).map(|_| random.below(slots)).collect(),
        Layout::Clustered => {
            let run = (len as u64).div_ceil(8);
            let begins: Vec<u64> = (0..8).map(|_| random.below(slots - run)).collect();
            let slot = |i: u64| begins[(i / run) as usize] + i % run;
            (0..len as u64).map(slot).collect()
        }
    };
    starts.sort_unstable();
    starts.dedup();
    let segment = |slot: u64| {
        let sectors = 8 + 8 * random.below(SLOT / 8 - 1);
        let zeroed = random.below(16) == 0;
        let stored = 8 + random.below(1 << 40);
        let start = slot * SLOT + 8 * random.below((SLOT - sectors) / 8 + 1);
        Segment::new(start, sectors as u32, stored, number as u8, zeroed).unwrap()
    };
    starts
        .into_iter()
        .map(segment)
        .map(PackedSegment::from)
        .collect()
}

fn best<T>(mut run: impl FnMut() -> T) -> f64 {
    let time = || {
        let begin = Instant::now();
        black_box(run());
        begin.elapsed().as_secs_f64() * 1e3
    };
    std::iter::repeat_with(time)
        .take(ROUNDS)
        .fold(f64::MAX, f64::min)
}

fn main() {
    let mut random = Random::new();
    println!("merge and index of {SEGMENTS} segments: ms (best of {ROUNDS} rounds)");
    for layout in [Layout::Scattered, Layout::Crowded, Layout::Clustered] {
        for layers in [1, 10, 50, 250] {
            let len = SEGMENTS / layers;
            let stack: Vec<Layer> = (0..layers)
                .map(|i| layer(i, len, layout, &mut random))
                .collect();
            let input: usize = stack.iter().map(Vec::len).sum();
            let mut lanes = vec![Lane::default(); lanes_needed(layers)];
            let mut merged = Layer::new();
            let total = best(|| {
                merged.clear();
                let sink = |segment| {
                    merged.push(segment);
                    Ok::<_, Infallible>(())
                };
                merge(&stack, &mut lanes, sink).unwrap();
            });
            let len = merged.len();
            let mut directory = vec![0; directory_len(&merged)];
            let index = best(|| {
                let len = directory_len(&merged);
                Index::build(&merged[..], &mut directory[..len])
                    .unwrap()
                    .end()
            });
            let name = format!("{layout:?}");
            println!(
                "{name:10} {layers:4} layers {input:8} -> {len:8} segments:  \
                 merge {total:6.1}  index {index:6.1}"
            );
        }
    }
}
