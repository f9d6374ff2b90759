// SPDX-License-Identifier: GPL-2.0

//! Writing what layers change to a block device that holds what is below them, and nothing else.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use ovbd_image::{index::Source, lsmt::SECTOR_BYTES};

use crate::{
    error::{Error, Result},
    pipeline::{self, Pool},
    report::Report,
    stack::{Stack, StackReader},
};

/// Bytes that are read and written as one.
const PIECE_BYTES: u64 = 1 << 20;

/// A device that is written to.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The device, open for writing. It is as large as the stack at least.
    pub file: &'a File,
    /// What it is called in errors.
    pub path: &'a Path,
    /// Whether it holds only zeros before: what the layers make zero is zero already.
    pub blank: bool,
    /// Bytes of the aligned blocks that a discard makes read as zeros; none if a discard does nothing of the kind.
    pub discards: Option<u64>,
}

/// What was done, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Data, and zeros where nothing could be discarded.
    pub written: u64,
    /// Discarded.
    pub discarded: u64,
}

/// Something that is to be done to a range of bytes.
#[derive(Clone, Copy)]
struct Piece {
    start: u64,
    bytes: u64,
    data: bool,
}

/// What a device needs that maps blocks as they are written, a thin volume: at most, as it has nothing or shares all it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needed {
    /// Blocks that are written to, with data or zeros.
    pub written: u64,
    /// Blocks that are mapped anew, or not any more: those and the discarded ones.
    pub mapped: u64,
}

/// What [`apply`] needs of blocks of `block` bytes, where the target is `blank`, or discards blocks of `discards` bytes.
pub fn needed(stack: &Stack, block: u64, blank: bool, discards: Option<u64>) -> Needed {
    let mut needed = Needed::default();
    let mut next = 0;
    let mut write = |start: u64, end: u64| {
        let first = (start / block).max(next);
        let end = end.div_ceil(block);
        needed.written += end.saturating_sub(first);
        next = next.max(end);
    };
    let mut zero = |start: u64, end: u64, write: &mut dyn FnMut(u64, u64)| {
        let (first, last) = whole_blocks(start, end, discards).unwrap_or((end, end));
        if start < first {
            write(start, first);
        }
        if last < end {
            write(last, end);
        }
        needed.mapped += (last - first).div_ceil(block);
    };
    let mut zeros: Option<(u64, u64)> = None;
    for mapping in stack.mappings(0, stack.sectors()) {
        let (start, end) = (mapping.start() * SECTOR_BYTES, mapping.end() * SECTOR_BYTES);
        match (mapping.source(), &mut zeros) {
            (Source::Zero { .. }, _) if blank => continue,
            (Source::Zero { .. }, Some((_, last))) if *last == start => *last = end,
            (source, open) => {
                if let Some((start, end)) = open.take() {
                    zero(start, end, &mut write);
                }
                match source {
                    Source::Data { .. } => write(start, end),
                    Source::Zero { .. } => zeros = Some((start, end)),
                    Source::Hole => {}
                }
            }
        }
    }
    if let Some((start, end)) = zeros {
        zero(start, end, &mut write);
    }
    needed.mapped += needed.written;
    needed
}

/// The first and the end of the whole blocks of `block` bytes in a range, if there are any.
fn whole_blocks(start: u64, end: u64, block: Option<u64>) -> Option<(u64, u64)> {
    let block = block?;
    let (first, last) = (start.next_multiple_of(block), end / block * block);
    (first < last).then_some((first, last))
}

/// Writes all that the layers of `stack` hold to `target`, and flushes it. Where none of them owns anything the device stays
/// as it is. `check` is asked now and then whether to go on.
///
/// # Errors
///
/// Those of reading the layers and of writing, and of `check`. The device then holds some of it.
pub fn apply(
    stack: &Stack,
    target: Target<'_>,
    report: &dyn Report,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Applied> {
    let pieces = || {
        stack
            .mappings(0, stack.sectors())
            .filter_map(|mapping| {
                let data = match mapping.source() {
                    Source::Hole => return None,
                    Source::Zero { .. } if target.blank => return None,
                    Source::Zero { .. } => false,
                    Source::Data { .. } => true,
                };
                Some(Piece {
                    start: mapping.start() * SECTOR_BYTES,
                    bytes: mapping.sectors() * SECTOR_BYTES,
                    data,
                })
            })
            .flat_map(split)
    };
    report.expect(pieces().map(|piece| piece.bytes).sum());
    let readers: Pool<StackReader<'_>> = Pool::default();
    let buffers = Pool::<Vec<u8>>::default();
    let mut done = Applied::default();
    let mut zeros = Zeros { target, open: None };
    pipeline::run(
        pieces(),
        Ok,
        |piece| {
            check()?;
            if !piece.data {
                return Ok((piece, Vec::new()));
            }
            let mut data = buffers.take().unwrap_or_default();
            data.resize(piece.bytes as usize, 0);
            readers.with(
                || Ok(stack.reader()),
                |reader| reader.read(&mut data, piece.start),
            )?;
            Ok((piece, data))
        },
        |(piece, data)| {
            report.add(piece.bytes);
            if !piece.data {
                return zeros.add(piece.start, piece.bytes, &mut done);
            }
            target
                .file
                .write_all_at(&data, piece.start)
                .map_err(|e| Error::io(target.path, "write", e).at_byte(piece.start))?;
            done.written += piece.bytes;
            buffers.put(data);
            Ok(())
        },
    )?;
    zeros.end(&mut done)?;
    let synced = target.file.sync_all();
    synced.map_err(|e| Error::io(target.path, "flush", e))?;
    Ok(done)
}

/// Data in portions; zeros as they are.
fn split(piece: Piece) -> impl Iterator<Item = Piece> {
    let step = if piece.data {
        PIECE_BYTES
    } else {
        piece.bytes.max(1)
    };
    (0..piece.bytes.div_ceil(step)).map(move |number| {
        let at = number * step;
        Piece {
            start: piece.start + at,
            bytes: step.min(piece.bytes - at),
            ..piece
        }
    })
}

/// Makes ranges zero; neighbours together, as only whole blocks can be discarded.
struct Zeros<'a> {
    target: Target<'a>,
    open: Option<(u64, u64)>,
}

impl Zeros<'_> {
    fn add(&mut self, start: u64, bytes: u64, done: &mut Applied) -> Result<()> {
        match &mut self.open {
            Some((_, end)) if *end == start => {
                *end += bytes;
                Ok(())
            }
            _ => {
                self.end(done)?;
                self.open = Some((start, start + bytes));
                Ok(())
            }
        }
    }

    fn end(&mut self, done: &mut Applied) -> Result<()> {
        let Some((start, end)) = self.open.take() else {
            return Ok(());
        };
        let Some((first, last)) = whole_blocks(start, end, self.target.discards) else {
            return self.zero(start, end, done);
        };
        let discarded = ovbd_kernel::discard(self.target.file, first, last - first);
        if discarded.is_err() {
            // The pool ignores discards, or its table says so by now.
            return self.zero(start, end, done);
        }
        done.discarded += last - first;
        self.zero(start, first, done)?;
        self.zero(last, end, done)
    }

    fn zero(&self, start: u64, end: u64, done: &mut Applied) -> Result<()> {
        const ZEROS: &[u8] = &[0; 1 << 16];
        let mut at = start;
        while at < end {
            let bytes = (end - at).min(ZEROS.len() as u64);
            self.target
                .file
                .write_all_at(&ZEROS[..bytes as usize], at)
                .map_err(|e| Error::io(self.target.path, "write", e).at_byte(at))?;
            at += bytes;
        }
        done.written += end - start;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        build::Options,
        delta::{self, Known, Pair, Range},
        direct::DirectFile,
        layer::LayerPath,
        parents::Parents,
    };

    /// Data, zeros over data, and what nobody touched: over a file it is the same as through the stack.
    #[test]
    fn a_layer_over_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let mut new = vec![7_u8; 3 << 20];
        new[1 << 20..(1 << 20) + 8192].fill(0);
        new[(2 << 20)..(2 << 20) + 4096].fill(9);
        fs::write(&path, &new).unwrap();
        let file = DirectFile::open(&path).unwrap();
        let ranges = [
            (1 << 20, 8192, Known::Zeroed),
            (2 << 20, 4096, Known::WasZero),
        ]
        .map(|(start, bytes, known)| Range {
            start,
            bytes,
            known,
        });
        let pair = Pair {
            new: &file,
            old: None,
            ranges: &ranges.into_iter().collect(),
            always: false,
        };
        let written =
            delta::write(pair, folder.path(), &Options::default(), &(), &|| Ok(())).unwrap();
        let paths = [LayerPath::Sealed(written.layers[0].0.clone())];
        let stack = Stack::open(&paths, Parents::Ignored).unwrap();
        // Zeros of two blocks of 4 KiB, and data in one.
        let needed = |block: u64, blank, discards| {
            let found = needed(&stack, block, blank, discards);
            (found.written, found.mapped)
        };
        assert_eq!(needed(4096, true, None), (1, 1));
        assert_eq!(needed(4096, false, None), (3, 3));
        assert_eq!(needed(4096, false, Some(4096)), (1, 3));
        // They are no whole block of 64 KiB: what is around them is shared.
        assert_eq!(needed(64 << 10, false, Some(64 << 10)), (2, 2));
        assert_eq!(needed(2 << 20, false, None), (2, 2));
        assert_eq!(needed(4 << 20, false, None), (1, 1), "both are in one");
        let target = folder.path().join("target");
        fs::write(&target, vec![7_u8; 3 << 20]).unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(&target)
            .unwrap();
        let to = Target {
            file: &file,
            path: &target,
            blank: false,
            // A file cannot discard as a device does: zeros are written.
            discards: Some(4096),
        };
        let done = apply(&stack, to, &(), &|| Ok(())).unwrap();
        assert_eq!(
            done,
            Applied {
                written: 12288,
                discarded: 0
            }
        );
        assert!(fs::read(&target).unwrap() == new);
        let blank = Target { blank: true, ..to };
        assert_eq!(apply(&stack, blank, &(), &|| Ok(())).unwrap().written, 4096);
    }
}
