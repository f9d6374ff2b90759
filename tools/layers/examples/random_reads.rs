// SPDX-License-Identifier: GPL-2.0

//! How long a random read of 4 KiB takes from each of some layers with the same content: microseconds of one thread for each,
//! the best of five rounds, which alternate. Arguments: number of reads, layers.

use std::{env, path::Path, time::Instant};

use ovbd_image::{index::Source, lsmt::SECTOR_BYTES};
use ovbd_layers::{layer::LayerPath, parents::Parents, stack::Stack};

const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = BLOCK as u64 / SECTOR_BYTES;
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = env::args_os().skip(1);
    let count: usize = args
        .next()
        .and_then(|n| n.to_str()?.parse().ok())
        .unwrap_or(10_000);
    let mut stacks = Vec::new();
    for path in args {
        let layers = [LayerPath::from(Path::new(&path))];
        stacks.push((path, Stack::open(&layers, Parents::Ignored)?, f64::MAX));
    }
    // Blocks that the first layer stores: the others have the same content.
    let mut blocks = Vec::new();
    if let Some((_, first, _)) = stacks.first() {
        for mapping in first.mappings(0, first.sectors()) {
            if let Source::Data { .. } = mapping.source() {
                let end = mapping.end() / BLOCK_SECTORS;
                blocks.extend(mapping.start().div_ceil(BLOCK_SECTORS)..end);
            }
        }
    }
    let mut random = 88_172_645_463_325_252_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        blocks[(random % blocks.len() as u64) as usize]
    };
    let chosen: Vec<u64> = (0..count).map(|_| next()).collect();
    let mut buffer = [0; BLOCK];
    for _ in 0..ROUNDS {
        for (_, stack, best) in &mut stacks {
            let mut reader = stack.reader();
            let start = Instant::now();
            for block in &chosen {
                reader.read(&mut buffer, block * BLOCK as u64)?;
            }
            *best = best.min(start.elapsed().as_secs_f64() / count as f64);
        }
    }
    for (path, _, best) in &stacks {
        println!("{} {:.2}", Path::new(path).display(), best * 1e6);
    }
    Ok(())
}
