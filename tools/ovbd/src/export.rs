// SPDX-License-Identifier: GPL-2.0

//! Writing the content of an image to a file, a block device or a pipe.

use std::{io::Write, path::Path};

use rayon::prelude::*;

use crate::{
    error::Result,
    image::{Image, ImageReader},
    output::{Output, Stream},
    pool::Pool,
    progress::Progress,
    stack::WINDOW_BYTES,
    zeros::non_zero_runs,
};

/// Windows that one thread gets at a time when they can be written in any order.
const WINDOWS_PER_THREAD: usize = 64;

/// Bytes that are read and written at a time, so that they stay in the cache.
const PIECE_BYTES: u64 = 128 << 10;

/// Windows in memory per thread when they must be written in order.
const ORDERED_PER_THREAD: usize = 4;

/// Writes `image` to the file or block device `path`; a file is sparse where the image is zero.
///
/// Nothing is left behind on failure, except on a block device. `replace` as for [`Output::create`].
///
/// # Errors
///
/// Any block of the image that cannot be read, and those of writing.
pub fn to_file(image: &Image, path: &Path, replace: bool, progress: &Progress) -> Result<()> {
    let output = Output::create(path, replace)?;
    output.set_size(image.bytes())?;
    let readers = Readers::new(image);
    let mut windows = image.windows();
    loop {
        let batch = take(&mut windows, WINDOWS_PER_THREAD);
        if batch.is_empty() {
            break;
        }
        // The first error in the order of the image, not of the threads.
        let results: Vec<Result<()>> = batch
            .par_iter()
            .map(|window| {
                readers.with(|reader| {
                    let start = window * WINDOW_BYTES;
                    for start in (start..start + WINDOW_BYTES).step_by(PIECE_BYTES as usize) {
                        let data = reader.piece(start)?;
                        progress.add(data.len() as u64);
                        non_zero_runs(data, |at, run| output.write_at(run, start + at as u64))?;
                    }
                    Ok(())
                })
            })
            .collect();
        results.into_iter().collect::<Result<()>>()?;
    }
    output.finish()
}

/// Writes all of `image` to `writer`, which is called `name` in errors.
///
/// # Errors
///
/// As [`to_file`].
pub fn to_writer(
    image: &Image,
    writer: &mut (dyn Write + Send),
    name: &Path,
    progress: &Progress,
) -> Result<()> {
    let readers = Readers::new(image);
    let buffers = Pool::<Vec<u8>>::default();
    let mut stream = Stream::to_writer(writer, name);
    let mut windows = image.windows();
    let mut read = || -> Result<Vec<(u64, Vec<u8>)>> {
        take(&mut windows, ORDERED_PER_THREAD)
            .par_iter()
            .map(|window| {
                readers.with(|reader| {
                    let at = window * WINDOW_BYTES;
                    let mut data = buffers.take().unwrap_or_default();
                    data.resize((image.bytes() - at).min(WINDOW_BYTES) as usize, 0);
                    reader.reader.read(&mut data, at)?;
                    progress.add(data.len() as u64);
                    Ok((at, data))
                })
            })
            .collect::<Vec<Result<_>>>()
            .into_iter()
            .collect()
    };
    let mut batch = read()?;
    while !batch.is_empty() {
        // One batch is written while the next is read.
        let (next, written) = rayon::join(&mut read, || {
            batch.into_iter().try_for_each(|(at, data)| {
                zeros_until(&mut stream, at)?;
                stream.write(&data)?;
                buffers.put(data);
                Ok(())
            })
        });
        written?;
        batch = next?;
    }
    zeros_until(&mut stream, image.bytes())
}

fn zeros_until(stream: &mut Stream<'_>, end: u64) -> Result<()> {
    const ZEROS: &[u8] = &[0; 1 << 16];
    while stream.position() < end {
        let n = (end - stream.position()).min(ZEROS.len() as u64);
        stream.write(&ZEROS[..n as usize])?;
    }
    Ok(())
}

fn take(windows: &mut dyn Iterator<Item = u64>, per_thread: usize) -> Vec<u64> {
    windows
        .take(per_thread * rayon::current_num_threads())
        .collect()
}

/// Readers of one image, one per thread.
struct Readers<'a> {
    image: &'a Image,
    pool: Pool<WindowReader<'a>>,
}

impl<'a> Readers<'a> {
    fn new(image: &'a Image) -> Self {
        Self {
            image,
            pool: Pool::default(),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut WindowReader<'a>) -> Result<T>) -> Result<T> {
        let make = || {
            Ok(WindowReader {
                reader: self.image.reader(),
                bytes: self.image.bytes(),
                buffer: Vec::new(),
            })
        };
        self.pool.with(make, work)
    }
}

struct WindowReader<'a> {
    reader: ImageReader<'a>,
    bytes: u64,
    buffer: Vec<u8>,
}

impl WindowReader<'_> {
    /// Reads a piece that starts at byte `at`; it is shorter at the end of the image, and empty beyond.
    fn piece(&mut self, at: u64) -> Result<&[u8]> {
        let n = self.bytes.saturating_sub(at).min(PIECE_BYTES) as usize;
        self.buffer.resize(n, 0);
        self.reader.read(&mut self.buffer, at.min(self.bytes))?;
        Ok(&self.buffer)
    }
}
