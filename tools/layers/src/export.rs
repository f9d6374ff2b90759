// SPDX-License-Identifier: GPL-2.0

//! Writing the content of an image to a file, a block device or a pipe.

use std::{io::Write, path::Path, sync::mpsc::sync_channel, thread};

use rayon::prelude::*;

use crate::{
    error::Result,
    output::{Output, Rules, Stream},
    pool::Pool,
    report::Report,
    stack::WINDOW_BYTES,
    stack_or_zfile::StackOrZfile,
    zeros::non_zero_runs,
    zfile::ReadAhead,
};

/// Windows of a batch per thread; one batch is read while the one before it is written.
const WINDOWS_PER_THREAD: usize = 2;

/// Writes `image` to the file, block device or pipe `path`; a file is sparse where the image is zero.
///
/// Nothing is left behind on failure, except on a block device. `rules` as for [`Output::create`].
///
/// # Errors
///
/// Any block of the image that cannot be read, and those of writing.
pub fn to_file(
    image: &StackOrZfile,
    path: &Path,
    rules: Rules<'_>,
    report: &dyn Report,
) -> Result<()> {
    let output = Output::create(path, rules)?;
    if output.is_stream() {
        return in_order(image, Stream::new(&output, 0), report);
    }
    output.set_size(image.bytes())?;
    each_window(image, report, |start, data| {
        non_zero_runs(data, |at, run| output.write_at(run, start + at as u64))
    })?;
    output.finish()
}

/// Writes all of `image` to `writer`, which is called `name` in errors.
///
/// # Errors
///
/// As [`to_file`].
pub fn to_writer(
    image: &StackOrZfile,
    writer: &mut dyn Write,
    name: &Path,
    report: &dyn Report,
) -> Result<()> {
    in_order(image, Stream::to_writer(writer, name), report)
}

/// Writes every byte of `image`.
fn in_order(image: &StackOrZfile, mut stream: Stream<'_>, report: &dyn Report) -> Result<()> {
    each_window(image, report, |start, data| {
        zeros_until(&mut stream, start)?;
        stream.write(data)
    })?;
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

/// Calls `write` with the first byte and the content of every window that holds data, in order; all threads
/// read ahead of it. The first error in the order of the image ends it.
fn each_window(
    image: &StackOrZfile,
    report: &dyn Report,
    mut write: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let size = WINDOWS_PER_THREAD * rayon::current_num_threads();
    let readers = Pool::default();
    let buffers = Pool::<Vec<u8>>::default();
    let compressed = Pool::<Vec<u8>>::default();
    let read = |(window, ahead): (u64, Vec<(usize, ReadAhead)>)| {
        let start = window * WINDOW_BYTES;
        let mut data = buffers.take().unwrap_or_default();
        data.resize((image.bytes() - start).min(WINDOW_BYTES) as usize, 0);
        let read = readers.with(
            || Ok(image.reader()),
            |one| {
                one.take_ahead(ahead, &compressed);
                one.read(&mut data, start)
            },
        );
        read.map(|()| (start, data))
    };
    let windows = image.windows();
    let (queue, ready) = sync_channel(size);
    let (ahead, fetched) = sync_channel(size);
    let read_ahead = |window| (window, image.read_ahead(window, &compressed));
    thread::scope(|scope| {
        // The system copies what is read; all threads are to decompress meanwhile.
        scope.spawn(move || {
            windows
                .map(read_ahead)
                .try_for_each(|item| ahead.send(item))
        });
        scope.spawn(move || loop {
            let batch: Vec<_> = fetched.iter().take(size).collect();
            let results: Vec<Result<(u64, Vec<u8>)>> = batch.into_par_iter().map(read).collect();
            let over = results.is_empty();
            if over || results.into_iter().any(|item| queue.send(item).is_err()) {
                return;
            }
        });
        // Dropped with the loop, so that the thread does not go on after an error.
        for item in ready {
            let (start, data) = item?;
            write(start, &data)?;
            report.add(data.len() as u64);
            buffers.put(data);
        }
        Ok(())
    })
}
