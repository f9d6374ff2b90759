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
    pool::Pool,
    write_behind::WriteBehind,
};

use std::{path::Path, sync::Arc};

/// Bytes that one thread compresses at a time.
const TASK_BYTES: usize = 256 << 10;

/// Tasks of a batch per thread.
const TASKS_PER_THREAD: usize = 4;

/// Writes one ZFile to an [`Output`].
pub struct ZfileWriter<'a> {
    output: &'a Output,
    path: &'a Path,
    start: u64,
    writer: WriteBehind,
    options: Options,
    level: Option<i32>,
    compressors: Pool<Compressor>,
    buffers: Arc<Pool<Vec<u8>>>,
    /// Bytes that are not compressed yet.
    pending: Vec<u8>,
    batch_bytes: usize,
    lengths: Vec<u32>,
    original_bytes: u64,
}

/// Some compressed blocks.
struct Task {
    data: Vec<u8>,
    /// Bytes of `data` that count.
    used: usize,
    lengths: Vec<u32>,
}

impl<'a> ZfileWriter<'a> {
    /// Writes to `output`, which is called `path` in errors, from byte `start` on.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn new(
        output: &'a Output,
        path: &'a Path,
        start: u64,
        options: Options,
        level: Option<i32>,
    ) -> Result<Self> {
        let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
        let buffers = Arc::<Pool<Vec<u8>>>::default();
        // The header is known at the end.
        let first = start + HEADER_BYTES as u64;
        Ok(Self {
            output,
            path,
            start,
            writer: WriteBehind::new(output, first, tasks, Arc::clone(&buffers))?,
            options,
            level,
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
            .collect::<std::io::Result<Vec<Task>>>()
            .map_err(|e| Error::io(self.path, "compress", e))?;
        for task in compressed {
            self.lengths.extend_from_slice(&task.lengths);
            self.writer.write(task.data, task.used)?;
        }
        self.pending.clear();
        if self.lengths.len() as u64 > MAX_BLOCKS {
            return Err(Error::new(
                self.path,
                "too many blocks for a ZFile (a larger block size helps)",
            ));
        }
        Ok(())
    }

    /// Writes what is left, the jump table, the trailer, and the header; returns the byte after the end.
    ///
    /// # Errors
    ///
    /// As [`ZfileWriter::write`].
    pub fn finish(mut self) -> Result<u64> {
        self.next_batch()?;
        let index_offset = self.writer.position() - self.start;
        let mut index_crc = 0;
        for lengths in self.lengths.chunks(TASK_BYTES) {
            let bytes: Vec<u8> = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
            index_crc = crc32c(index_crc, &bytes);
            let used = bytes.len();
            self.writer.write(bytes, used)?;
        }
        let totals = Totals {
            original_bytes: self.original_bytes,
            index_offset,
            blocks: self.lengths.len() as u64,
            index_crc,
        };
        let trailer = self.options.trailer(&totals, crc32c).to_vec();
        let used = trailer.len();
        self.writer.write(trailer, used)?;
        let end = self.writer.finish()?;
        let header = self.options.header(&totals, crc32c);
        self.output.write_at(&header, self.start)?;
        Ok(end)
    }
}

/// Compresses `bytes`, whole blocks except at the end of the stream, into `data`, whose content does not
/// matter.
fn compress(
    compressor: &mut Compressor,
    options: &Options,
    bytes: &[u8],
    mut data: Vec<u8>,
) -> std::io::Result<Task> {
    let block_bytes = options.block_bytes as usize;
    let room = Compressor::bound(block_bytes) + CRC_BYTES as usize;
    let blocks = bytes.len().div_ceil(block_bytes);
    if data.len() < blocks * room {
        data.resize(blocks * room, 0);
    }
    let mut lengths = Vec::with_capacity(blocks);
    let mut start = 0;
    for block in bytes.chunks(block_bytes) {
        let mut end = start + compressor.compress(block, &mut data[start..start + room])?;
        if options.block_crc {
            let crc = crc32c(BLOCK_SEED, &data[start..end]);
            data[end..end + CRC_BYTES as usize].copy_from_slice(&crc.to_le_bytes());
            end += CRC_BYTES as usize;
        }
        lengths.push((end - start) as u32);
        start = end;
    }
    Ok(Task {
        data,
        used: start,
        lengths,
    })
}
