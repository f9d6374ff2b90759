// SPDX-License-Identifier: GPL-2.0

//! What changed since a stack was sealed, and the new hash tree by that alone.
//!
//! The old tree came with the layers, and they may have come from anybody. Each block of it that is used is therefore
//! checked against the block above it, and the highest against the old root hash, which is trusted: so a digest that is
//! kept is that of the data that was sealed. Where a block of data changed in part, all of it is checked in the same way
//! before the rest of it is hashed again. What is never read can be wrong; it is then wrong for dm-verity too.

use ovbd_image::lsmt::SECTOR_BYTES;
use rayon::prelude::*;

use crate::{
    build::Options,
    error::{Error, Result},
    pipeline::{self, Pool},
    report::Report,
    seal::{Sealing, WINDOW_BLOCKS},
    stack::{Stack, StackReader},
    verity::{Digest, BLOCK_BYTES, DIGESTS, DIGEST_BYTES},
};

const BLOCK: u64 = BLOCK_BYTES as u64;
const BLOCK_SECTORS: u64 = BLOCK / SECTOR_BYTES;

/// Runs, and blocks of a level, that a thread takes at once.
const TOGETHER: usize = 64;

/// Blocks that changed, one after the other.
struct Run {
    first: u64,
    blocks: u64,
    /// Those of them that changed in part.
    partial: Vec<u64>,
}

/// The stack as it was when it was sealed, and what changed since.
pub(crate) struct Changes {
    old: Stack,
    root: Digest,
    runs: Vec<Run>,
    /// For each level, the lowest first, its blocks that change or are stored above the old seal.
    levels: Vec<Vec<u64>>,
}

impl Changes {
    /// Finds the layers of the stack that `root` is the root hash of.
    ///
    /// # Errors
    ///
    /// There are none, or the image has another size by now.
    pub(crate) fn find(options: &Options, sealing: &Sealing<'_>, root: Digest) -> Result<Self> {
        let layers = sealing.stack.layers();
        let geometry = &sealing.geometry;
        let highest = sealing.highest() * BLOCK_SECTORS;
        for count in (1..layers.len()).rev() {
            // A seal stores the highest block, for whatever changes changes that.
            let segments = layers[count - 1].segments();
            let mut segments = segments.iter().filter(|segment| segment.start() <= highest);
            if geometry.levels.is_empty() || segments.any(|segment| segment.end() > highest) {
                let old = Stack::open(&options.base[..count], options.parents)?;
                if sealing.is_sealed_with(&old, &root)? {
                    return Ok(Self::new(sealing, old, root, count));
                }
            }
        }
        let what = "no layer below is the seal of an image of this size with that root hash \
                    (without --old-root all of the image is read)";
        Err(Error::new(sealing.path, what))
    }

    fn new(sealing: &Sealing<'_>, old: Stack, root: Digest, count: usize) -> Self {
        let layers = sealing.stack.layers();
        let end = sealing.geometry.bytes() / SECTOR_BYTES;
        let above = layers[count..].iter().flat_map(|layer| layer.segments());
        let mut changed: Vec<(u64, u64)> = above
            .map(|segment| (segment.start().min(end), segment.end().min(end)))
            .filter(|(from, to)| from < to)
            .collect();
        changed.sort_unstable();
        changed.dedup_by(|next, before| {
            let joined = next.0 <= before.1;
            if joined {
                before.1 = before.1.max(next.1);
            }
            joined
        });
        let data_end = sealing.geometry.data_blocks;
        let image_sectors = sealing.image_bytes.div_ceil(SECTOR_BYTES);
        let mut runs: Vec<Run> = Vec::new();
        let mut tree = Vec::new();
        for (from, to) in changed {
            let (first, last) = (from / BLOCK_SECTORS, (to - 1) / BLOCK_SECTORS);
            for block in first..=last {
                if block > data_end {
                    tree.push(block);
                }
                if block >= data_end {
                    continue;
                }
                let whole = from <= block * BLOCK_SECTORS
                    && to >= ((block + 1) * BLOCK_SECTORS).min(image_sectors);
                add(&mut runs, block, !whole);
            }
        }
        let levels = levels(&sealing.geometry.levels, &runs, &tree);
        Self {
            old,
            root,
            runs,
            levels,
        }
    }

    /// The blocks of the tree that change or are stored above the old seal.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        // The highest level is the first in the image.
        self.levels.iter().rev().flatten().copied()
    }

    /// Hashes what changed into the temporary file; returns the root.
    pub(crate) fn hash(&self, sealing: &Sealing<'_>, report: &dyn Report) -> Result<Digest> {
        report.expect(self.runs.iter().map(|run| run.blocks * BLOCK).sum());
        self.check_tree(sealing)?;
        let new = Pool::<StackReader<'_>>::default();
        let old = Pool::<StackReader<'_>>::default();
        let hash_run = |run: &Run| {
            for block in &run.partial {
                let mut data = vec![0; BLOCK_BYTES];
                let read = |reader: &mut StackReader<'_>| reader.read(&mut data, block * BLOCK);
                old.with(|| Ok(self.old.reader()), read)?;
                self.check(sealing, *block, &data)?;
            }
            let start = run.first * BLOCK;
            let bytes = (sealing.image_bytes - start).min(run.blocks * BLOCK);
            let mut data = vec![0; bytes as usize];
            let read = |reader: &mut StackReader<'_>| reader.read(&mut data, start);
            new.with(|| Ok(sealing.stack.reader()), read)?;
            Ok((run.first, sealing.seal.digests(&data)))
        };
        let hash = |runs: &[Run]| runs.iter().map(hash_run).collect::<Result<Vec<_>>>();
        let mut only = None;
        pipeline::run(self.runs.chunks(TOGETHER), Ok, hash, |runs| {
            for (first, digests) in runs {
                report.add((digests.len() / DIGEST_BYTES * BLOCK_BYTES) as u64);
                match sealing.geometry.levels.first() {
                    Some((lowest, _)) => sealing.write_digests(*lowest, first, &digests)?,
                    None => only = Some(digests),
                }
            }
            Ok(())
        })?;
        if let Some(digests) = only {
            return sealing.root(&digests);
        }
        for (number, level) in self.levels.iter().enumerate() {
            let first = sealing.geometry.levels[number].0;
            let Some((above, _)) = sealing.geometry.levels.get(number + 1) else {
                return sealing.root_of_tree();
            };
            level.par_chunks(TOGETHER).try_for_each(|blocks| {
                let mut block = vec![0; BLOCK_BYTES];
                blocks.iter().try_for_each(|at| {
                    sealing.read_tree(*at, &mut block)?;
                    sealing.write_digests(*above, at - first, &sealing.seal.digests(&block))
                })
            })?;
        }
        Ok(self.root)
    }

    /// Copies the blocks of the old tree that change into the temporary file, from the highest down, each checked against
    /// the one above it.
    fn check_tree(&self, sealing: &Sealing<'_>) -> Result<()> {
        let readers = Pool::<StackReader<'_>>::default();
        for level in self.levels.iter().rev() {
            level.par_chunks(TOGETHER).try_for_each(|blocks| {
                let mut block = vec![0; BLOCK_BYTES];
                let check = |reader: &mut StackReader<'_>| {
                    blocks.iter().try_for_each(|at| {
                        reader.read(&mut block, at * BLOCK)?;
                        self.check(sealing, *at, &block)?;
                        sealing.write_tree(*at, &block)
                    })
                };
                readers.with(|| Ok(self.old.reader()), check)
            })?;
        }
        Ok(())
    }

    /// Refuses a block of the old image or of its tree that is not what was sealed.
    fn check(&self, sealing: &Sealing<'_>, at: u64, data: &[u8]) -> Result<()> {
        let levels = &sealing.geometry.levels;
        let level = levels
            .iter()
            .position(|(first, blocks)| (*first..first + blocks).contains(&at));
        // The level of data is below the lowest.
        let (index, above) = match level {
            Some(level) => (at - levels[level].0, levels.get(level + 1)),
            None => (at, levels.first()),
        };
        let wanted = match above {
            Some((above, _)) => sealing.read_digest(*above, index)?,
            None => self.root,
        };
        match sealing.seal.digests(data) == wanted {
            true => Ok(()),
            false => {
                let top = self.old.top().map_or(sealing.path, |layer| layer.path());
                let kind = if level.is_some() {
                    "the hash tree"
                } else {
                    "the image"
                };
                let what = format!("block {at} of {kind} is not what was sealed");
                Err(Error::new(top, what))
            }
        }
    }
}

/// Adds a block behind the others, or the one that is the last already.
fn add(runs: &mut Vec<Run>, block: u64, is_partial: bool) {
    let last = runs.last_mut().filter(|run| {
        let end = run.first + run.blocks;
        block + 1 == end || (block == end && run.blocks < WINDOW_BLOCKS)
    });
    let run = match last {
        Some(run) => run,
        None => {
            runs.push(Run {
                first: block,
                blocks: 0,
                partial: Vec::new(),
            });
            let at = runs.len() - 1;
            &mut runs[at]
        }
    };
    run.blocks = block + 1 - run.first;
    if is_partial && run.partial.last() != Some(&block) {
        run.partial.push(block);
    }
}

/// The blocks of each level above `runs` and `tree`, and of `tree` itself.
fn levels(geometry: &[(u64, u64)], runs: &[Run], tree: &[u64]) -> Vec<Vec<u64>> {
    let mut levels: Vec<Vec<u64>> = Vec::new();
    // Numbers of the blocks below that change, from the start of their level.
    let mut below: Vec<u64> = Vec::new();
    for (number, (first, blocks)) in geometry.iter().enumerate() {
        let mut level: Vec<u64> = match number {
            0 => runs
                .iter()
                .flat_map(|run| run.first / DIGESTS..=(run.first + run.blocks - 1) / DIGESTS)
                .collect(),
            _ => below.iter().map(|block| block / DIGESTS).collect(),
        };
        let own = tree
            .iter()
            .filter(|block| (*first..first + blocks).contains(block));
        level.extend(own.map(|block| block - first));
        level.sort_unstable();
        level.dedup();
        levels.push(level.iter().map(|block| first + block).collect());
        below = level;
    }
    levels
}
