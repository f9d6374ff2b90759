// SPDX-License-Identifier: GPL-2.0

//! Making one layer of neighbouring layers, from their indexes.
//!
//! The merged index says what is left of each layer, so what the new one holds is known before any data is read: nothing
//! but that is read, and no image is made. Blocks of a ZFile that the new one needs whole are copied as they are stored,
//! once their CRC is checked; all others are decompressed and compressed again. What the layers below own is not known
//! here, so zeroed segments stay.
//!
//! The new layer has the UUID of the topmost one and the parent of the lowest one: it takes their place, and layers above
//! and stores of running stacks fit on it. Of layers that are no neighbours it has no UUID, as it is not what the topmost one
//! was over the others.

use std::{path::Path, slice, sync::Arc};

use ovbd_image::{
    index::Source,
    lsmt::{Identity, UuidText, DATA_START, SECTOR_BYTES},
    segment::PackedSegment,
    zfile::Options as ZfileOptions,
};

use crate::{
    blob::Content,
    build::{finish_output, start_blob, Options},
    codec::Compressor,
    error::{Error, Result},
    layer::Layer,
    layer_writer::{BlobWriter, LayerWriter},
    parents::{self, Ancestry, Parents},
    pipeline::{self, Pool},
    report::Report,
    stack::{Stack, StackReader},
    zfile_writer::Blocks,
};

/// Sectors of the new blob that are made as one: whole blocks of every size.
const CHUNK_SECTORS: u64 = (1 << 20) / SECTOR_BYTES;

/// The layer that was made.
#[derive(Clone, Copy, Debug)]
pub struct Squashed {
    /// Its UUID.
    pub uuid: UuidText,
    /// The UUID of the layer below.
    pub parent_uuid: UuidText,
    /// Bytes of the device.
    pub virtual_bytes: u64,
    /// Segments.
    pub segments: u64,
    /// Bytes that they store, before compression.
    pub data_bytes: u64,
    /// Of these, in blocks that were copied.
    pub copied_bytes: u64,
}

/// Makes `path`, one layer that holds what the layers in `options.base` do; `-` is standard output. With
/// `keep_compression`, that is the one of most of the data, where it is compressed.
///
/// # Errors
///
/// Layers that cannot be read or are no neighbours, segments that share data, more segments than a layer can have, and
/// those of writing. Nothing is left behind then.
pub fn squash(
    path: &Path,
    options: &Options,
    keep_compression: bool,
    report: &dyn Report,
) -> Result<Squashed> {
    options.check().map_err(|what| Error::new(path, what))?;
    let stack = Stack::open(&options.base, options.parents)?;
    let kept = keep_compression.then(|| compression_of_most(&stack));
    let options = Options {
        zfile: kept.flatten().or(options.zfile),
        ..options.clone()
    };
    let output = options.create(path, &[])?;
    let (blob, start) = start_blob(&output, path, &options)?;
    let idle = match &blob {
        BlobWriter::Plain(_) => Arc::default(),
        BlobWriter::Zfile(zfile) => zfile.buffers(),
    };
    let ancestry: Vec<_> = stack.layers().iter().map(Ancestry::of).collect();
    let are_neighbours = parents::check(&ancestry, Parents::Neighbours).is_ok();
    let top = stack.top().and_then(Layer::uuid);
    let own = options.uuid.or(top.filter(|_| are_neighbours));
    let bottom = stack.layers().first();
    let identity = Identity {
        virtual_size: stack.virtual_bytes(),
        uuid: own.unwrap_or(UuidText::NIL),
        parent_uuid: options.parent(bottom.and_then(Layer::parent_uuid)),
    };
    let mut layer = LayerWriter::new(blob, path, &identity)?;
    // What is below is not known.
    layer.set_blank(0);
    let mut data_bytes = 0;
    for segment in stack.segments() {
        let (start, sectors) = (segment.start(), u64::from(segment.sectors()));
        match segment.zeroed() {
            true => layer.zeros(start, sectors)?,
            false => {
                layer.announce(start, sectors)?;
                data_bytes += sectors * SECTOR_BYTES;
            }
        }
    }
    let contents = stack.layers().iter().map(|layer| layer.content().bytes());
    let stored = contents.fold(0, u64::saturating_add);
    if data_bytes > stored {
        // A few bytes could fill the disk.
        let what = format!("would store {data_bytes} bytes, more than the {stored} of all layers: their segments share data");
        return Err(Error::new(path, what));
    }
    let segments = layer.segments();
    report.expect(data_bytes);
    let encoder = Encoder::new(&stack, &options, idle, path);
    let mut copied_bytes = 0;
    pipeline::run(
        Chunks::of(&stack),
        Ok,
        |chunk| encoder.encode(&chunk),
        |encoded| {
            let blob = layer.blob();
            blob.write(&encoded.head)?;
            if let (Some(blocks), BlobWriter::Zfile(zfile)) = (encoded.blocks, &mut *blob) {
                zfile.blocks(blocks)?;
            }
            blob.write(&encoded.tail)?;
            copied_bytes += encoded.copied_bytes;
            report.add(encoded.bytes);
            Ok(())
        },
    )?;
    let end = layer.finish(&identity)?;
    finish_output(output, &options, start, end)?;
    Ok(Squashed {
        uuid: identity.uuid,
        parent_uuid: identity.parent_uuid,
        virtual_bytes: identity.virtual_size,
        segments,
        data_bytes,
        copied_bytes,
    })
}

/// How a layer is compressed; `None` if it is not.
fn compression(layer: &Layer) -> Option<ZfileOptions> {
    match layer.content() {
        Content::Plain(_) | Content::Joined(_) => None,
        Content::Zfile(zfile) => Some(zfile.options()),
    }
}

/// How the layer is compressed of which most is left.
fn compression_of_most(stack: &Stack) -> Option<ZfileOptions> {
    let mut sectors = vec![0_u64; stack.layers().len()];
    for segment in stack.segments().iter().filter(|segment| !segment.zeroed()) {
        sectors[usize::from(segment.layer())] += u64::from(segment.sectors());
    }
    let layers = stack.layers().iter().zip(sectors);
    layers
        .max_by_key(|(_, sectors)| *sectors)
        .and_then(|(layer, _)| compression(layer))
}

/// Sectors that are stored one after the other in one layer.
#[derive(Clone, Copy, Debug)]
struct Piece {
    layer: u8,
    stored: u64,
    sectors: u64,
}

/// What a part of the new blob is made of.
struct Chunk {
    /// Its first sector.
    at: u64,
    sectors: u64,
    pieces: Vec<Piece>,
}

/// The data of all segments in order, cut where the new blob has whole chunks.
struct Chunks<'a> {
    segments: slice::Iter<'a, PackedSegment>,
    /// What is left of the segment that is next.
    rest: Option<Piece>,
    at: u64,
}

impl<'a> Chunks<'a> {
    fn of(stack: &'a Stack) -> Self {
        Self {
            segments: stack.segments().iter(),
            rest: None,
            at: DATA_START,
        }
    }

    fn piece(&mut self) -> Option<Piece> {
        self.rest.take().or_else(|| {
            let segment = self.segments.find(|segment| !segment.zeroed())?;
            Some(Piece {
                layer: segment.layer(),
                stored: segment.stored(),
                sectors: segment.sectors().into(),
            })
        })
    }
}

impl Iterator for Chunks<'_> {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let mut chunk = Chunk {
            at: self.at,
            sectors: 0,
            pieces: Vec::new(),
        };
        let most = CHUNK_SECTORS - self.at % CHUNK_SECTORS;
        while chunk.sectors < most {
            let Some(mut piece) = self.piece() else {
                break;
            };
            let sectors = piece.sectors.min(most - chunk.sectors);
            if sectors < piece.sectors {
                self.rest = Some(Piece {
                    stored: piece.stored + sectors,
                    sectors: piece.sectors - sectors,
                    ..piece
                });
                piece.sectors = sectors;
            }
            chunk.sectors += sectors;
            match chunk.pieces.last_mut() {
                // A segment is shorter than a block can be: what it continues is one piece with it.
                Some(last)
                    if last.layer == piece.layer && last.stored + last.sectors == piece.stored =>
                {
                    last.sectors += sectors;
                }
                _ => chunk.pieces.push(piece),
            }
        }
        self.at += chunk.sectors;
        (chunk.sectors > 0).then_some(chunk)
    }
}

/// A chunk as it goes into the blob.
struct Encoded {
    /// What comes before the first whole block; everything where the blob is not compressed.
    head: Vec<u8>,
    blocks: Option<Blocks>,
    /// What comes after the last whole block.
    tail: Vec<u8>,
    bytes: u64,
    copied_bytes: u64,
}

struct Encoder<'a> {
    stack: &'a Stack,
    path: &'a Path,
    zfile: Option<ZfileOptions>,
    level: Option<i32>,
    /// Of each layer, whether its blocks are as those of the new one.
    alike: Vec<bool>,
    readers: Pool<StackReader<'a>>,
    compressors: Pool<Compressor>,
    idle: Arc<Pool<Vec<u8>>>,
    buffers: Pool<Vec<u8>>,
}

impl<'a> Encoder<'a> {
    fn new(stack: &'a Stack, options: &Options, idle: Arc<Pool<Vec<u8>>>, path: &'a Path) -> Self {
        let is_alike = |layer: &Layer| {
            let own = compression(layer);
            own.is_some() && own == options.zfile
        };
        Self {
            stack,
            path,
            zfile: options.zfile,
            level: options.level.filter(|level| *level != 0),
            alike: stack.layers().iter().map(is_alike).collect(),
            readers: Pool::default(),
            compressors: Pool::default(),
            idle,
            buffers: Pool::default(),
        }
    }

    fn encode(&self, chunk: &Chunk) -> Result<Encoded> {
        self.readers.with(
            || Ok(self.stack.reader()),
            |reader| self.encode_with(chunk, reader),
        )
    }

    fn encode_with(&self, chunk: &Chunk, reader: &mut StackReader<'_>) -> Result<Encoded> {
        let mut walk = Walk {
            pieces: &chunk.pieces,
            skip: 0,
        };
        let bytes = chunk.sectors * SECTOR_BYTES;
        let mut encoded = Encoded {
            head: Vec::new(),
            blocks: None,
            tail: Vec::new(),
            bytes,
            copied_bytes: 0,
        };
        let Some(zfile) = self.zfile else {
            encoded.head = walk.read(reader, bytes)?;
            return Ok(encoded);
        };
        let block_bytes = u64::from(zfile.block_bytes);
        let inside = chunk.at * SECTOR_BYTES % block_bytes;
        let head = ((block_bytes - inside) % block_bytes).min(bytes);
        encoded.head = walk.read(reader, head)?;
        let mut left = (bytes - head) / block_bytes;
        let tail = bytes - head - left * block_bytes;
        let mut blocks = Blocks::new(self.idle.take().unwrap_or_default());
        while left > 0 {
            let (alike, most) = walk.blocks(&self.alike, block_bytes);
            let count = most.min(left);
            if let (Some((layer, first)), 1..) = (alike, count) {
                let add = |stored: &[u8]| blocks.add_stored(stored);
                reader.stored_blocks(layer, first, first + count - 1, add)?;
                walk.advance(count * block_bytes);
                encoded.copied_bytes += count * block_bytes;
                left -= count;
                continue;
            }
            // Where pieces meet inside a block it is at least that one.
            let count = count.max(1);
            let mut data = self.buffers.take().unwrap_or_default();
            data.resize((count * block_bytes) as usize, 0);
            walk.read_into(reader, &mut data)?;
            let compressor = || Compressor::new(zfile.algorithm, self.level);
            self.compressors
                .with(compressor, |compressor| {
                    data.chunks(block_bytes as usize)
                        .try_for_each(|block| blocks.compress(compressor, &zfile, block))
                })
                .map_err(|e| Error::io(self.path, "compress", e))?;
            self.buffers.put(data);
            left -= count;
        }
        // All of it may be inside one block.
        encoded.blocks = Some(blocks).filter(|blocks| blocks.count() > 0);
        encoded.tail = walk.read(reader, tail)?;
        Ok(encoded)
    }
}

/// What of a chunk comes next.
struct Walk<'a> {
    pieces: &'a [Piece],
    /// Bytes of the first piece that were passed.
    skip: u64,
}

impl Walk<'_> {
    /// Whole blocks of which the next bytes are, by layer and number of the first, where that layer is alike; and how many
    /// blocks of the same kind follow before the piece ends.
    fn blocks(&self, alike: &[bool], block_bytes: u64) -> (Option<(usize, u64)>, u64) {
        let Some(piece) = self.pieces.first() else {
            return (None, 0);
        };
        let layer = usize::from(piece.layer);
        let from = piece.stored * SECTOR_BYTES + self.skip;
        let count = (piece.sectors * SECTOR_BYTES - self.skip) / block_bytes;
        let whole = alike[layer] && from % block_bytes == 0;
        (whole.then_some((layer, from / block_bytes)), count)
    }

    fn read(&mut self, reader: &mut StackReader<'_>, bytes: u64) -> Result<Vec<u8>> {
        let mut data = vec![0; bytes as usize];
        self.read_into(reader, &mut data)?;
        Ok(data)
    }

    fn read_into(&mut self, reader: &mut StackReader<'_>, mut buffer: &mut [u8]) -> Result<()> {
        while let (Some(piece), false) = (self.pieces.first(), buffer.is_empty()) {
            let left = piece.sectors * SECTOR_BYTES - self.skip;
            let count = left.min(buffer.len() as u64);
            let (now, later) = buffer.split_at_mut(count as usize);
            let source = Source::Data {
                layer: piece.layer,
                stored: piece.stored,
            };
            reader.read_source(source, self.skip, now)?;
            self.advance(count);
            buffer = later;
        }
        Ok(())
    }

    /// Goes `bytes` on, to the end of the first piece at most.
    fn advance(&mut self, bytes: u64) {
        self.skip += bytes;
        if let Some((piece, others)) = self.pieces.split_first() {
            if self.skip == piece.sectors * SECTOR_BYTES {
                (self.pieces, self.skip) = (others, 0);
            }
        }
    }
}
