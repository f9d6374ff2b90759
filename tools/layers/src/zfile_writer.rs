// SPDX-License-Identifier: GPL-2.0

//! Writing a ZFile: a stream of bytes is cut into blocks that all threads compress.
//!
//! One batch of blocks is compressed while the one before it is written; no more is in memory. The result
//! does not depend on the number of threads: blocks are independent of each other and are written in order.

use ovbd_image::zfile::{Options, Totals, BLOCK_SEED, CRC_BYTES, HEADER_BYTES, MAX_BLOCKS};
use rayon::prelude::*;

use crate::{
    codec::Compressor,
    crc::crc32c,
    error::{Error, Result},
    output::Output,
    pipeline::{Behind, Pool},
};

use std::{path::Path, sync::Arc};

/// Bytes that one thread compresses at a time.
const TASK_BYTES: usize = 256 << 10;

/// Tasks of a batch per thread.
const TASKS_PER_THREAD: usize = 4;

/// Blocks of zeros that are written at a time.
const ZERO_BLOCKS: usize = 4096;

/// What a jump table of the original can express for the blocks of a group of [`GROUP_BYTES`], without the last: the
/// sum of their lengths has 16 bits, and one value means something else.
const GROUP_LIMIT: u64 = u16::MAX as u64;

/// Uncompressed bytes of the blocks that one group of the original's jump table has.
const GROUP_BYTES: usize = 1 << 16;

/// Bytes of the buffer into which the original reads a stored block.
const BUFFER_BYTES: u32 = 1 << 16;

/// How a ZFile is made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What is recorded in it.
    pub options: Options,
    /// Compression level; the original's where there is none.
    pub level: Option<i32>,
    /// Write also what only our own readers can read.
    pub own_reader_only: bool,
}

/// Writes one ZFile to an [`Output`].
pub struct ZfileWriter<'a> {
    output: &'a Output,
    path: &'a Path,
    start: u64,
    writer: Behind<Part>,
    /// Bytes that the thread that writes was given.
    written: u64,
    options: Options,
    level: Option<i32>,
    own_reader_only: bool,
    /// Stored bytes of the blocks so far in the last group of the jump table.
    group: u64,
    compressors: Pool<Compressor>,
    buffers: Arc<Pool<Vec<u8>>>,
    /// Bytes that are not compressed yet.
    pending: Vec<u8>,
    batch_bytes: usize,
    lengths: Vec<u32>,
    original_bytes: u64,
}

/// A buffer, and how many of its bytes count.
type Part = (Vec<u8>, usize);

/// Some compressed blocks, one after the other as they are stored.
pub struct Blocks {
    data: Vec<u8>,
    /// Bytes of `data` that count.
    used: usize,
    lengths: Vec<u32>,
}

impl Blocks {
    /// None yet; they go into `data`, whose content does not matter.
    pub fn new(data: Vec<u8>) -> Self {
        Self {
            data,
            used: 0,
            lengths: Vec::new(),
        }
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.lengths.len()
    }

    /// Adds a block as another ZFile of the same options stores it, CRC included.
    pub fn add_stored(&mut self, stored: &[u8]) {
        self.room(stored.len())[..stored.len()].copy_from_slice(stored);
        self.end_block(stored.len());
    }

    /// Compresses one block, and adds it.
    ///
    /// # Errors
    ///
    /// Those of [`Compressor::compress`].
    pub fn compress(
        &mut self,
        compressor: &mut Compressor,
        options: &Options,
        block: &[u8],
    ) -> std::io::Result<()> {
        let room = self.room(room_of(options));
        let mut end = compressor.compress(block, room)?;
        if options.block_crc {
            let crc = crc32c(BLOCK_SEED, &room[..end]);
            room[end..end + CRC_BYTES as usize].copy_from_slice(&crc.to_le_bytes());
            end += CRC_BYTES as usize;
        }
        self.end_block(end);
        Ok(())
    }

    /// The next `bytes` bytes.
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.used + bytes;
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        &mut self.data[self.used..end]
    }

    fn end_block(&mut self, bytes: usize) {
        self.used += bytes;
        self.lengths.push(bytes as u32);
    }
}

/// Bytes that a compressed block can take, with its CRC.
fn room_of(options: &Options) -> usize {
    Compressor::bound(options.block_bytes as usize) + CRC_BYTES as usize
}

impl<'a> ZfileWriter<'a> {
    /// Writes to `output`, which is called `path` in errors, from byte `start` on.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn new(output: &'a Output, path: &'a Path, start: u64, settings: Settings) -> Result<Self> {
        let Settings {
            options,
            level,
            own_reader_only,
        } = settings;
        let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
        let buffers = Arc::<Pool<Vec<u8>>>::default();
        // The header is known at the end, too late for a pipe.
        let first = start + HEADER_BYTES as u64;
        if output.is_stream() {
            output.write_at(&options.first_header(crc32c), start)?;
        }
        let file = output.duplicate()?;
        let idle = Arc::clone(&buffers);
        let mut at = first;
        let writer = Behind::new(tasks, move |(data, used): Part| {
            file.write_at(&data[..used], at)?;
            at += used as u64;
            idle.put(data);
            Ok(())
        });
        Ok(Self {
            output,
            path,
            start,
            writer,
            written: first,
            options,
            level: level.filter(|level| *level != 0),
            own_reader_only,
            group: 0,
            compressors: Pool::default(),
            buffers,
            pending: Vec::new(),
            batch_bytes: TASK_BYTES * tasks,
            lengths: Vec::new(),
            original_bytes: 0,
        })
    }

    /// Appends `data` to the stream.
    ///
    /// # Errors
    ///
    /// Those of compressing and writing.
    pub fn write(&mut self, mut data: &[u8]) -> Result<()> {
        self.original_bytes += data.len() as u64;
        while !data.is_empty() {
            let room = self.batch_bytes - self.pending.len();
            let (now, later) = data.split_at(room.min(data.len()));
            self.pending.extend_from_slice(now);
            if self.pending.len() == self.batch_bytes {
                self.next_batch()?;
            }
            data = later;
        }
        Ok(())
    }

    /// Compresses all that is pending.
    fn next_batch(&mut self) -> Result<()> {
        let compressed = self
            .pending
            .par_chunks(TASK_BYTES)
            .map(|blocks| {
                self.compressors.with(
                    || Compressor::new(self.options.algorithm, self.level),
                    |compressor| {
                        let buffer = self.buffers.take().unwrap_or_default();
                        compress(compressor, &self.options, blocks, buffer)
                    },
                )
            })
            .collect::<std::io::Result<Vec<Blocks>>>()
            .map_err(|e| Error::io(self.path, "compress", e))?;
        for task in compressed {
            self.put(task)?;
        }
        self.pending.clear();
        Ok(())
    }

    fn put(&mut self, task: Blocks) -> Result<()> {
        for length in &task.lengths {
            self.check_length(*length)?;
            self.lengths.push(*length);
        }
        check_blocks(self.path, self.lengths.len() as u64)?;
        self.put_bytes(task.data, task.used)
    }

    /// Appends whole blocks that are compressed already.
    ///
    /// # Errors
    ///
    /// As [`ZfileWriter::write`], and where the stream is inside a block.
    pub fn blocks(&mut self, blocks: Blocks) -> Result<()> {
        let block_bytes = u64::from(self.options.block_bytes);
        if self.original_bytes % block_bytes != 0 {
            let what = "a block begins inside another one";
            return Err(Error::new(self.path, what));
        }
        self.next_batch()?;
        self.original_bytes += blocks.count() as u64 * block_bytes;
        self.put(blocks)
    }

    /// Buffers that are not in use, for blocks that are compressed elsewhere.
    pub fn buffers(&self) -> Arc<Pool<Vec<u8>>> {
        Arc::clone(&self.buffers)
    }

    fn put_bytes(&mut self, data: Vec<u8>, used: usize) -> Result<()> {
        self.written += used as u64;
        self.writer.put((data, used))
    }

    /// Refuses the next block if the original could not read it.
    fn check_length(&mut self, length: u32) -> Result<()> {
        if self.own_reader_only {
            return Ok(());
        }
        let block = self.lengths.len();
        let per_group = GROUP_BYTES / self.options.block_bytes as usize;
        let what = if length > BUFFER_BYTES {
            "a smaller --block-size helps"
        } else if block % per_group == 0 {
            self.group = u64::from(length);
            return Ok(());
        } else if self.group < GROUP_LIMIT {
            self.group += u64::from(length);
            return Ok(());
        } else {
            "a larger --block-size helps"
        };
        let at = block as u64 * u64::from(self.options.block_bytes);
        let what = format!(
            "the original cannot read blocks of {} bytes that compress as badly as the one at byte {at} of the \
             content; {what}, --own-reader-only writes it for readers of this project",
            self.options.block_bytes
        );
        Err(Error::new(self.path, what))
    }

    /// Appends `bytes` zeros, without compressing what is known.
    ///
    /// # Errors
    ///
    /// As [`ZfileWriter::write`].
    pub fn zeros(&mut self, mut bytes: u64) -> Result<()> {
        let block_bytes = u64::from(self.options.block_bytes);
        let zeros = vec![0; self.options.block_bytes as usize];
        // Up to the end of a block, and what is left after the last whole one, as any other data.
        let head = (block_bytes - self.original_bytes % block_bytes) % block_bytes;
        let head = head.min(bytes);
        self.write(&zeros[..head as usize])?;
        bytes -= head;
        let mut blocks = bytes / block_bytes;
        if blocks > 0 {
            self.next_batch()?;
            let fail = |e| Error::io(self.path, "compress", e);
            let mut compressor =
                Compressor::new(self.options.algorithm, self.level).map_err(fail)?;
            let one = compress(&mut compressor, &self.options, &zeros, Vec::new()).map_err(fail)?;
            while blocks > 0 {
                let now = blocks.min(ZERO_BLOCKS as u64) as usize;
                self.put(Blocks {
                    data: one.data[..one.used].repeat(now),
                    used: one.used * now,
                    lengths: one.lengths.repeat(now),
                })?;
                self.original_bytes += now as u64 * block_bytes;
                blocks -= now as u64;
            }
        }
        self.write(&zeros[..(bytes % block_bytes) as usize])
    }

    /// Writes what is left, the jump table, the trailer, and the header; returns the byte after the end.
    ///
    /// # Errors
    ///
    /// As [`ZfileWriter::write`].
    pub fn finish(mut self) -> Result<u64> {
        self.next_batch()?;
        let index_offset = self.written - self.start;
        let mut index_crc = 0;
        let lengths = std::mem::take(&mut self.lengths);
        for lengths in lengths.chunks(TASK_BYTES) {
            let bytes: Vec<u8> = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
            index_crc = crc32c(index_crc, &bytes);
            let used = bytes.len();
            self.put_bytes(bytes, used)?;
        }
        let totals = Totals {
            original_bytes: self.original_bytes,
            index_offset,
            blocks: lengths.len() as u64,
            index_crc,
        };
        let trailer = self.options.trailer(&totals, crc32c).to_vec();
        let used = trailer.len();
        self.put_bytes(trailer, used)?;
        self.writer.finish()?;
        if !self.output.is_stream() {
            let header = self.options.header(&totals, crc32c);
            self.output.write_at(&header, self.start)?;
        }
        Ok(self.written)
    }
}

/// Refuses more blocks than a ZFile can have; the file is called `path`.
///
/// # Errors
///
/// That one.
pub fn check_blocks(path: &Path, blocks: u64) -> Result<()> {
    if blocks > MAX_BLOCKS {
        let what = format!(
            "{blocks} blocks, of which a ZFile can have {MAX_BLOCKS} (a larger --block-size helps)"
        );
        return Err(Error::new(path, what));
    }
    Ok(())
}

/// Compresses `bytes`, whole blocks except at the end of the stream, into `data`, whose content does not
/// matter.
fn compress(
    compressor: &mut Compressor,
    options: &Options,
    bytes: &[u8],
    data: Vec<u8>,
) -> std::io::Result<Blocks> {
    let block_bytes = options.block_bytes as usize;
    let mut blocks = Blocks::new(data);
    // All at once, and not block by block.
    blocks.room(bytes.len().div_ceil(block_bytes) * room_of(options));
    for block in bytes.chunks(block_bytes) {
        blocks.compress(compressor, options, block)?;
    }
    Ok(blocks)
}
