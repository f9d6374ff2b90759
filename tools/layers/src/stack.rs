// SPDX-License-Identifier: GPL-2.0

//! A stack of layers as one block device: the merged index, and reading through it.

use std::{collections::VecDeque, ops::Range, path::Path, sync::Arc};

use ovbd_image::{
    index::{directory_len, Index, Mapping, Source},
    lsmt::{topmost_size, MAX_MERGED_SEGMENTS, SECTOR_BYTES},
    merge::{lanes_needed, merge, Lane, MergeError, MAX_LAYERS},
    segment::PackedSegment,
};

use crate::{
    blob::Content,
    error::{Error, Result},
    layer::{Layer, LayerKind, LayerPath},
    parents::{self, Ancestry, Parents},
    zfile::{Cursor, ReadAhead},
};

/// Bytes of a window: the unit in which images are read, and aligned to itself.
pub const WINDOW_BYTES: u64 = 1 << 20;

/// Layers bottom first, and which of them owns what.
pub struct Stack {
    layers: Vec<Layer>,
    index: Index<Vec<PackedSegment>, Vec<u32>>,
    virtual_bytes: u64,
}

impl Stack {
    /// Opens `paths`, bottom first, and merges their indexes.
    ///
    /// # Errors
    ///
    /// Those of [`Layer::open`] for any of them, too many layers or segments, a writable layer that is not on top,
    /// and those of [`parents::check`].
    pub fn open(paths: &[LayerPath], parents: Parents) -> Result<Self> {
        check_count(paths)?;
        let layers = paths
            .iter()
            .zip(0..=u8::MAX)
            .map(|(path, position)| Layer::open(path, position))
            .collect::<Result<Vec<_>>>()?;
        Self::new(layers, parents)
    }

    /// Merges the indexes of `layers`, whose positions are their places in the vector.
    ///
    /// # Errors
    ///
    /// As [`Stack::open`].
    pub fn new(layers: Vec<Layer>, parents: Parents) -> Result<Self> {
        let top = layers.last().map_or(Path::new(""), |layer| layer.path());
        if let Some(below) = layers.split_last().and_then(|(_, below)| {
            below
                .iter()
                .find(|layer| matches!(layer.kind(), LayerKind::Writable { .. }))
        }) {
            return Err(Error::new(
                below.path(),
                "a writable layer must be the top of the stack",
            ));
        }
        let ancestry: Vec<_> = layers.iter().map(Ancestry::of).collect();
        parents::check(&ancestry, parents)?;
        let slices: Vec<&[PackedSegment]> = layers.iter().map(Layer::segments).collect();
        let mut lanes = vec![Lane::default(); lanes_needed(layers.len())];
        let mut segments = Vec::new();
        merge(&slices, &mut lanes, |segment| {
            if segments.len() as u64 == MAX_MERGED_SEGMENTS {
                return Err(());
            }
            segments.push(segment);
            Ok(())
        })
        .map_err(|error| match error {
            MergeError::Sink(()) => Error::new(top, "the merged stack has too many segments"),
            _ => Error::new(top, "cannot merge the layers of the stack"),
        })?;
        segments.shrink_to_fit();
        let directory = vec![0; directory_len(&segments)];
        let index = Index::build(segments, directory)
            .map_err(|_| Error::new(top, "cannot index the merged stack"))?;
        let virtual_bytes = topmost_size(layers.iter().map(Layer::virtual_bytes));
        tracing::debug!(
            layers = layers.len(),
            segments = index.segments().len(),
            bytes = virtual_bytes,
            "merged"
        );
        Ok(Self {
            layers,
            index,
            virtual_bytes,
        })
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The topmost layer.
    pub fn top(&self) -> Option<&Layer> {
        self.layers.last()
    }

    /// Virtual size of the device in bytes: the topmost one that is not 0.
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// Sectors of the device; the last may be partial.
    pub fn sectors(&self) -> u64 {
        self.virtual_bytes.div_ceil(SECTOR_BYTES)
    }

    /// Bytes of the device that are stored somewhere: no more of it is not zero.
    pub fn data_bytes(&self) -> u64 {
        self.mappings(0, self.sectors())
            .filter(|mapping| matches!(mapping.source(), Source::Data { .. }))
            .map(|mapping| mapping.sectors().saturating_mul(SECTOR_BYTES))
            .fold(0, u64::saturating_add)
    }

    /// The merged segments, also those beyond the end of the device.
    pub fn segments(&self) -> &[PackedSegment] {
        self.index.segments()
    }

    /// Bytes of memory of the merged index.
    pub fn index_bytes(&self) -> usize {
        self.index.bytes()
    }

    /// What the sectors `from..to` hold, in order and without a gap.
    pub fn mappings(&self, from: u64, to: u64) -> impl Iterator<Item = Mapping> + '_ {
        self.index.range(from, to)
    }

    /// The numbers of the windows below sector `to` in which a layer has data, in order; all others are
    /// zeros.
    pub fn data_windows(&self, to: u64) -> impl Iterator<Item = u64> + Send + '_ {
        let mappings = self.mappings(0, to);
        let data = mappings.filter(|mapping| matches!(mapping.source(), Source::Data { .. }));
        windows_of(data.map(|mapping| mapping.start()..mapping.end()))
    }

    /// Reads what the bytes `from..to` of the device are made of in compressed layers into `ahead`, as far as it is not
    /// scattered and there is room.
    pub fn read_ahead(&self, from: u64, to: u64, ahead: &mut ReadAhead) {
        // The first and the last byte of each layer's content.
        let mut wanted: Vec<(usize, u64, u64)> = Vec::new();
        for mapping in self.mappings(from / SECTOR_BYTES, to.div_ceil(SECTOR_BYTES)) {
            let Source::Data { layer, stored } = mapping.source() else {
                continue;
            };
            let (layer, start) = (usize::from(layer), stored * SECTOR_BYTES);
            let end = start + mapping.sectors() * SECTOR_BYTES;
            match wanted.iter_mut().find(|(other, ..)| *other == layer) {
                Some((_, first, last)) => (*first, *last) = (start.min(*first), end.max(*last)),
                None => wanted.push((layer, start, end)),
            }
        }
        for (layer, start, end) in wanted {
            if let Content::Zfile(zfile) = self.layers[layer].content() {
                zfile.read_ahead(start, end, layer, ahead);
            }
        }
    }

    /// A reader for one thread.
    pub fn reader(&self) -> StackReader<'_> {
        StackReader {
            stack: self,
            cursors: VecDeque::new(),
            ahead: Arc::default(),
        }
    }
}

/// The numbers of the windows in which there are sectors of `ranges`, each once; both are in order.
pub(crate) fn windows_of(
    ranges: impl Iterator<Item = Range<u64>> + Send,
) -> impl Iterator<Item = u64> + Send {
    const SECTORS: u64 = WINDOW_BYTES / SECTOR_BYTES;
    let mut next = 0;
    ranges.flat_map(move |sectors| {
        let first = (sectors.start / SECTORS).max(next);
        next = sectors.end.div_ceil(SECTORS).max(next);
        first..next
    })
}

/// Refuses an empty stack and one of too many layers, before any file is opened.
///
/// # Errors
///
/// These two.
pub fn check_count(paths: &[LayerPath]) -> Result<()> {
    match paths.last() {
        None => Err(Error::new(Path::new("-"), "no layers given")),
        Some(top) if paths.len() > MAX_LAYERS => Err(Error::new(
            top.data(),
            format!("too many layers: {} (at most {MAX_LAYERS})", paths.len()),
        )),
        Some(_) => Ok(()),
    }
}

/// Layers of which one reader keeps something. Others have to be read again where a block is read in parts.
const MAX_CURSORS: usize = 8;

/// Reads from a stack; every thread has its own.
pub struct StackReader<'a> {
    stack: &'a Stack,
    /// What is kept of the layers that were read last, the last first.
    cursors: VecDeque<(usize, Box<Cursor>)>,
    ahead: Arc<ReadAhead>,
}

impl StackReader<'_> {
    /// Uses what [`Stack::read_ahead`] has read.
    pub fn take_ahead(&mut self, ahead: ReadAhead) {
        self.ahead = Arc::new(ahead);
        for (layer, cursor) in &mut self.cursors {
            cursor.take_ahead(&self.ahead, *layer);
        }
    }

    /// Gives the memory of what was read ahead back.
    pub fn give_ahead(&mut self) -> Option<ReadAhead> {
        for (_, cursor) in &mut self.cursors {
            cursor.drop_ahead();
        }
        Arc::into_inner(std::mem::take(&mut self.ahead))
    }

    /// What this reader keeps for a layer.
    fn cursor(&mut self, layer: usize) -> &mut Cursor {
        let known = self.cursors.iter().position(|(other, _)| *other == layer);
        let item = match known.and_then(|at| self.cursors.remove(at)) {
            Some(item) => item,
            None => {
                let oldest = match self.cursors.len() {
                    MAX_CURSORS.. => self.cursors.pop_back(),
                    _ => None,
                };
                let mut cursor = oldest.map_or_else(Box::default, |(_, cursor)| cursor);
                cursor.reuse();
                cursor.take_ahead(&self.ahead, layer);
                (layer, cursor)
            }
        };
        self.cursors.push_front(item);
        &mut self.cursors[0].1
    }

    /// Calls `take` with each of the blocks `first..=last` of layer number `layer`, a ZFile, as it is stored.
    ///
    /// # Errors
    ///
    /// Those of [`crate::zfile::Zfile::stored_blocks`], and a layer that is not compressed.
    pub fn stored_blocks(
        &mut self,
        layer: usize,
        first: u64,
        last: u64,
        take: impl FnMut(&[u8]),
    ) -> Result<()> {
        match self.stack.layers[layer].content() {
            Content::Zfile(zfile) => zfile.stored_blocks(self.cursor(layer), first, last, take),
            other => Err(Error::new(other.input().path(), "is not compressed")),
        }
    }

    /// Fills `buffer` from byte `offset` of the device; beyond its last segment there are zeros.
    ///
    /// # Errors
    ///
    /// Those of the layers that own what is read.
    pub fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buffer.len() as u64);
        let mut rest = buffer;
        let mut at = offset;
        for mapping in self
            .stack
            .index
            .range(offset / SECTOR_BYTES, end.div_ceil(SECTOR_BYTES))
        {
            // The range may start or end inside a sector.
            let to = (mapping.end().saturating_mul(SECTOR_BYTES)).min(end);
            let (part, after) = rest.split_at_mut((to - at) as usize);
            let skipped = at - mapping.start() * SECTOR_BYTES;
            self.read_source(mapping.source(), skipped, part)?;
            rest = after;
            at = to;
        }
        Ok(())
    }

    /// Fills `buffer` from `source`, `skip` bytes after its start.
    ///
    /// # Errors
    ///
    /// As [`StackReader::read`].
    pub fn read_source(&mut self, source: Source, skip: u64, buffer: &mut [u8]) -> Result<()> {
        let Source::Data { layer, stored } = source else {
            buffer.fill(0);
            return Ok(());
        };
        let number = usize::from(layer);
        let content = self.stack.layers[number].content();
        content.read(self.cursor(number), buffer, stored * SECTOR_BYTES + skip)
    }
}
