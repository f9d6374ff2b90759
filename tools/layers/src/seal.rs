// SPDX-License-Identifier: GPL-2.0

//! Sealing a stack: a layer on top of it that holds nothing but the hash tree of its content, for dm-verity.
//!
//! The layers of the stack stay as they are. The stack with the seal on top is larger by superblock and tree, which begin
//! where the image ends, rounded to 4 KiB. Only blocks of the tree are stored that are not in the stack already: a stack
//! that is sealed again after a change costs what changed, times the depth of the tree.
//!
//! All levels go through a temporary file, as the highest comes first in the layer and is known last: memory does not
//! depend on the size of the image. The file has 1/127 of it.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use ovbd_image::{
    index::Source,
    lsmt::{Identity, UuidText, SECTOR_BYTES},
};
use uuid::Uuid;

use crate::{
    build::{finish_output, start_blob, Options},
    content_hash::ContentHash,
    error::{Error, Result},
    layer::LayerPath,
    layer_writer::{check_size, LayerWriter},
    parents::Parents,
    pipeline::{self, Pool},
    report::Report,
    reseal::Changes,
    stack::{Stack, StackReader, WINDOW_BYTES},
    verity::{Digest, Geometry, Seal, Superblock, BLOCK_BYTES, DIGEST_BYTES},
};

/// What a sealed stack is opened with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The root of the tree, which says what all of the content is.
    pub root: Digest,
    /// Bytes of the image, rounded to blocks: where the superblock is.
    pub data_bytes: u64,
}

/// Makes `path`, the seal of the stack of the layers in `options.base`. If one of these is a seal, of which `old_root` is
/// the trusted root hash, only what changed above it is read.
///
/// # Errors
///
/// A stack that cannot be read, that has no room for one layer more, or that is too large with a tree, no seal with
/// `old_root` or one that is damaged where something changed, and those of writing. Nothing is left behind then.
pub fn seal(
    path: &Path,
    options: &Options,
    old_root: Option<Digest>,
    report: &dyn Report,
) -> Result<Sealed> {
    options.check().map_err(|what| Error::new(path, what))?;
    options.check_room(path)?;
    let stack = Stack::open(&options.base, options.parents)?;
    let sealing = Sealing::new(&stack, path)?;
    let output = options.create_file(path, &[])?;
    let changes = match old_root {
        Some(root) => Some(Changes::find(options, &sealing, root)?),
        None => None,
    };
    let root = match &changes {
        Some(changes) => changes.hash(&sealing, report)?,
        None => sealing.hash(report)?,
    };
    let (blob, start) = start_blob(&output, path, options)?;
    let parent_uuid = options.parent(stack.top().and_then(|layer| layer.uuid()));
    let mut identity = Identity {
        virtual_size: sealing.geometry.bytes(),
        uuid: options.uuid.unwrap_or(UuidText::NIL),
        parent_uuid,
    };
    let mut layer = LayerWriter::new(blob, path, &identity)?;
    let mut hash = ContentHash::default();
    sealing.each_new_block(changes.as_ref(), |block, data| {
        let start = block * BLOCK_BYTES as u64 / SECTOR_BYTES;
        layer.blocks(start, data, &mut hash)
    })?;
    if layer.segments() == 0 {
        return Err(Error::new(path, "the stack has this seal already"));
    }
    if options.uuid.is_none() {
        identity.uuid = hash.uuid(identity.virtual_size, parent_uuid);
    }
    let end = layer.finish(&identity)?;
    finish_output(output, options, start, end)?;
    Ok(Sealed {
        root,
        data_bytes: sealing.geometry.data_bytes(),
    })
}

/// Reads all of a stack that [`seal`] has sealed, and returns the root hash of what it holds.
///
/// # Errors
///
/// It is not sealed, or its tree is not that of what it holds, and those of reading.
pub fn check(layers: &[LayerPath], parents: Parents, report: &dyn Report) -> Result<Sealed> {
    let stack = Stack::open(layers, parents)?;
    let top = stack.top().map_or(Path::new("-"), |layer| layer.path());
    if sealed_bytes(&stack)?.is_none() {
        return Err(Error::new(top, "no seal is on top of the stack"));
    }
    let sealing = Sealing::new(&stack, top)?;
    let root = sealing.hash(report)?;
    sealing.each_new_block(None, |block, _| {
        let what = format!("block {block} of the hash tree is not that of what was sealed");
        Err(Error::new(top, what))
    })?;
    Ok(Sealed {
        root,
        data_bytes: sealing.geometry.data_bytes(),
    })
}

/// Bytes of the image that is in a sealed stack: its superblock says so, where it must be in a stack of that size. What
/// was written to a sealed stack, with its tree, has that size too.
fn sealed_bytes(stack: &Stack) -> Result<Option<u64>> {
    let Some(geometry) = Geometry::of_sealed(stack.virtual_bytes()) else {
        return Ok(None);
    };
    let mut superblock = vec![0; Superblock::BYTES];
    stack
        .reader()
        .read(&mut superblock, geometry.data_bytes())?;
    let found = Superblock::parse(&superblock).ok().flatten();
    let is_ours = found.is_some_and(|found| found.data_bytes() == Some(geometry.data_bytes()));
    Ok(is_ours.then_some(geometry.data_bytes()))
}

/// Blocks of a window.
pub(crate) const WINDOW_BLOCKS: u64 = WINDOW_BYTES / BLOCK_BYTES as u64;

pub(crate) struct Sealing<'a> {
    pub(crate) stack: &'a Stack,
    /// The image of which there is a tree: without the seal, if the stack has one on top.
    pub(crate) image_bytes: u64,
    pub(crate) geometry: Geometry,
    pub(crate) seal: Seal,
    /// All levels, each block where it is in the image, less the blocks before the tree.
    tree: File,
    pub(crate) path: &'a Path,
}

impl<'a> Sealing<'a> {
    fn new(stack: &'a Stack, path: &'a Path) -> Result<Self> {
        let bottom = stack.layers().first().and_then(|layer| layer.uuid());
        let bottom = bottom.and_then(|uuid| Uuid::parse_str(uuid.as_str()).ok());
        let image_bytes = match sealed_bytes(stack)? {
            Some(bytes) => bytes,
            None => stack.virtual_bytes(),
        };
        let geometry = Geometry::new(image_bytes)
            .ok_or_else(|| Error::new(path, "the stack has no size, or is too large"))?;
        check_size(path, geometry.bytes())?;
        Ok(Self {
            stack,
            image_bytes,
            geometry,
            seal: Seal::new(bottom.unwrap_or_default()),
            tree: tempfile::tempfile()
                .map_err(|e| Error::io(&std::env::temp_dir(), "create a file in", e))?,
            path,
        })
    }

    /// Byte of the temporary file where a block of the image is.
    fn place(&self, block: u64) -> u64 {
        (block - self.geometry.data_blocks - 1) * BLOCK_BYTES as u64
    }

    fn temporary(&self, action: &str, error: io::Error) -> Error {
        Error::io(&std::env::temp_dir(), action, error)
    }

    /// Hashes the image and all levels into the temporary file; returns the root.
    fn hash(&self, report: &dyn Report) -> Result<Digest> {
        report.expect(self.image_bytes);
        let zeros = self.seal.digests(&vec![0; WINDOW_BYTES as usize]);
        let readers = Pool::<StackReader<'_>>::default();
        let buffers = Pool::<Vec<u8>>::default();
        // Digests of a window, for the blocks of the lowest level.
        let hash = |window: u64| {
            let start = window * WINDOW_BYTES;
            let bytes = (self.image_bytes - start).min(WINDOW_BYTES);
            let sectors = start / SECTOR_BYTES..(start + bytes).div_ceil(SECTOR_BYTES);
            let mut mappings = self.stack.mappings(sectors.start, sectors.end);
            if mappings.all(|mapping| !matches!(mapping.source(), Source::Data { .. })) {
                let blocks = (bytes as usize).div_ceil(BLOCK_BYTES);
                return Ok((window, bytes, zeros[..blocks * DIGEST_BYTES].to_vec()));
            }
            let mut data = buffers.take().unwrap_or_default();
            data.resize(bytes as usize, 0);
            let read = |reader: &mut StackReader<'_>| reader.read(&mut data, start);
            readers.with(|| Ok(self.stack.reader()), read)?;
            let digests = self.seal.digests(&data);
            buffers.put(data);
            Ok((window, bytes, digests))
        };
        let Some(&(lowest, _)) = self.geometry.levels.first() else {
            let mut data = vec![0; self.image_bytes as usize];
            self.stack.reader().read(&mut data, 0)?;
            return self.root(&self.seal.digests(&data));
        };
        let windows = 0..self.image_bytes.div_ceil(WINDOW_BYTES);
        pipeline::run(windows, Ok, hash, |(window, bytes, digests)| {
            self.write_digests(lowest, window * WINDOW_BLOCKS, &digests)?;
            report.add(bytes);
            Ok(())
        })?;
        self.hash_levels()
    }

    /// Hashes each level into the one above it; returns the root.
    fn hash_levels(&self) -> Result<Digest> {
        let end = self.geometry.bytes() / BLOCK_BYTES as u64;
        self.tree
            .set_len(self.place(end))
            .map_err(|e| self.temporary("set the size of a file in", e))?;
        let above = self.geometry.levels.iter().skip(1);
        for ((first, blocks), (above, _)) in self.geometry.levels.iter().zip(above) {
            self.each_window(*first, *blocks, |at, level| {
                self.write_digests(*above, at - first, &self.seal.digests(level))
            })?;
        }
        self.root_of_tree()
    }

    /// The root hash, by the highest block of the tree.
    pub(crate) fn root_of_tree(&self) -> Result<Digest> {
        let mut highest = vec![0; BLOCK_BYTES];
        self.read_tree(self.highest(), &mut highest)?;
        self.root(&self.seal.digests(&highest))
    }

    /// The highest block of the tree; with one block of data, which has no tree, that one.
    pub(crate) fn highest(&self) -> u64 {
        let highest = self.geometry.levels.last();
        highest.map_or(0, |(first, _)| *first)
    }

    /// The root hash, as the only one of `digests`.
    pub(crate) fn root(&self, digests: &[u8]) -> Result<Digest> {
        digests
            .try_into()
            .map_err(|_| Error::new(self.path, "the tree has no root"))
    }

    /// Whether `old` is a stack of an image of this size, sealed in this way, with that root hash.
    pub(crate) fn is_sealed_with(&self, old: &Stack, root: &Digest) -> Result<bool> {
        let mut reader = old.reader();
        let mut block = vec![0; BLOCK_BYTES];
        reader.read(&mut block, self.geometry.data_bytes())?;
        if old.virtual_bytes() != self.geometry.bytes()
            || block != self.seal.superblock(&self.geometry)
        {
            return Ok(false);
        }
        reader.read(&mut block, self.highest() * BLOCK_BYTES as u64)?;
        Ok(self.seal.digests(&block) == *root)
    }

    /// Reads a block of the tree from the temporary file.
    pub(crate) fn read_tree(&self, block: u64, data: &mut [u8]) -> Result<()> {
        let read = self.tree.read_exact_at(data, self.place(block));
        read.map_err(|e| self.temporary("read a file in", e))
    }

    /// Writes a block of the tree to the temporary file.
    pub(crate) fn write_tree(&self, block: u64, data: &[u8]) -> Result<()> {
        let written = self.tree.write_all_at(data, self.place(block));
        written.map_err(|e| self.temporary("write a file in", e))
    }

    /// Reads the digest of block `index` of the level below from the level that begins at block `first`.
    pub(crate) fn read_digest(&self, first: u64, index: u64) -> Result<Digest> {
        let mut digest = [0; DIGEST_BYTES];
        let at = self.place(first) + index * DIGEST_BYTES as u64;
        let read = self.tree.read_exact_at(&mut digest, at);
        read.map_err(|e| self.temporary("read a file in", e))?;
        Ok(digest)
    }

    /// Writes digests of blocks of the level below, from `index` on, to the level that begins at block `first`.
    pub(crate) fn write_digests(&self, first: u64, index: u64, digests: &[u8]) -> Result<()> {
        let at = self.place(first) + index * DIGEST_BYTES as u64;
        let written = self.tree.write_all_at(digests, at);
        written.map_err(|e| self.temporary("write a file in", e))
    }

    /// Calls `take` with blocks of the tree, from `first` on, a window at most at a time.
    fn each_window(
        &self,
        first: u64,
        blocks: u64,
        mut take: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut window = vec![0; WINDOW_BYTES as usize];
        let mut done = 0;
        while done < blocks {
            let now = (blocks - done).min(WINDOW_BLOCKS);
            let window = &mut window[..now as usize * BLOCK_BYTES];
            self.read_tree(first + done, window)?;
            take(first + done, window)?;
            done += now;
        }
        Ok(())
    }

    /// Calls `take` with each block of superblock and tree that the stack does not hold already. Of a tree of which not all
    /// was made, those blocks are looked at that were.
    fn each_new_block(
        &self,
        changes: Option<&Changes>,
        mut take: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut reader = self.stack.reader();
        let mut below = Vec::new();
        let mut look = |first: u64, blocks: &[u8]| {
            let start = first * BLOCK_BYTES as u64;
            below.resize(blocks.len(), 0);
            reader.read(&mut below, start)?;
            let new = blocks.chunks(BLOCK_BYTES);
            for (block, (new, old)) in (first..).zip(new.zip(below.chunks(BLOCK_BYTES))) {
                if new != old {
                    take(block, new)?;
                }
            }
            Ok(())
        };
        let superblock = self.geometry.data_blocks;
        look(superblock, &self.seal.superblock(&self.geometry))?;
        if let Some(changes) = changes {
            let mut data = vec![0; BLOCK_BYTES];
            for block in changes.blocks() {
                self.read_tree(block, &mut data)?;
                look(block, &data)?;
            }
            return Ok(());
        }
        let end = self.geometry.bytes() / BLOCK_BYTES as u64;
        self.each_window(superblock + 1, end - superblock - 1, &mut look)
    }
}
