// SPDX-License-Identifier: GPL-2.0

//! Writing the content of an image to a file, a block device or a pipe.

use std::{io::Write, path::Path};

use crate::{
    error::Result,
    output::{Output, Rules, Stream},
    pipeline::{run_and_take_behind, Pool},
    report::Report,
    stack::WINDOW_BYTES,
    stack_or_zfile::StackOrZfile,
    zeros::non_zero_runs,
    zfile::ReadAhead,
};

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
    writer: &mut (dyn Write + Send),
    name: &Path,
    report: &dyn Report,
) -> Result<()> {
    in_order(image, Stream::to_writer(writer, name), report)
}

/// Writes every byte of `image`.
fn in_order(image: &StackOrZfile, mut stream: Stream<'_>, report: &dyn Report) -> Result<()> {
    each_window(image, report, |start, data| {
        stream.zeros(start - stream.position())?;
        stream.write(data)
    })?;
    stream.zeros(image.bytes() - stream.position())
}

/// Calls `write` with the first byte and the content of every window that holds data, in order; all threads
/// read ahead of it. The first error in the order of the image ends it.
pub(crate) fn each_window(
    image: &StackOrZfile,
    report: &dyn Report,
    mut write: impl FnMut(u64, &[u8]) -> Result<()> + Send,
) -> Result<()> {
    let readers = Pool::default();
    let buffers = Pool::<Vec<u8>>::default();
    let compressed = Pool::<ReadAhead>::default();
    // The system copies what is read; all threads are to decompress meanwhile.
    let read = |window| {
        let mut ahead = compressed.take().unwrap_or_default();
        ahead.clear();
        image.read_ahead(window, &mut ahead);
        Ok((window * WINDOW_BYTES, ahead))
    };
    let decompress = |(start, ahead): (u64, ReadAhead)| {
        let mut data = buffers.take().unwrap_or_default();
        data.resize((image.bytes() - start).min(WINDOW_BYTES) as usize, 0);
        readers.with(
            || Ok(image.reader()),
            |one| {
                one.take_ahead(ahead);
                let read = one.read(&mut data, start);
                if let Some(ahead) = one.give_ahead() {
                    compressed.put(ahead);
                }
                read.map(|()| (start, data))
            },
        )
    };
    run_and_take_behind(image.windows(), read, decompress, |(start, data)| {
        write(start, &data)?;
        report.add(data.len() as u64);
        buffers.put(data);
        Ok(())
    })
}
