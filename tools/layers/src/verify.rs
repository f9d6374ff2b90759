// SPDX-License-Identifier: GPL-2.0

//! Checking every checksum, bound and invariant of a stack, and listing all that is wrong.

use std::{collections::HashSet, path::Path};

use ovbd_image::{
    layer_index::IndexReader,
    log::{self, LogReader},
    lsmt::{Header, Trailer, ENTRY_BYTES, HEADER_BYTES},
    zfile::{trailer_position, Geometry},
    Reason,
};
use rayon::prelude::*;

use crate::{
    blob::{unwrap_tar, Blob, Content},
    crc::crc32c,
    error::{Error, Place, Result},
    file_range::{FileRange, CHUNK_BYTES},
    layer::{each_chunk, read_header, read_trailer, Layer, LayerPath},
    parents::Parents,
    report::Report,
    stack::{check_count, Stack},
    zfile::{Cursor, Zfile},
};

/// Blocks that one thread checks at a time.
const BLOCKS_PER_TASK: u64 = 256;

/// Something worth telling about a stack.
#[derive(Debug)]
pub enum Finding {
    /// Something is wrong.
    Problem(Error),
    /// Something is unusual, but everything reads as it should.
    Warning(Error),
}

/// Collects what is found.
struct Findings<'a> {
    sink: &'a mut dyn FnMut(Finding),
    problems: u64,
}

impl Findings<'_> {
    fn problem(&mut self, error: Error) {
        self.problems += 1;
        (self.sink)(Finding::Problem(error));
    }

    fn warning(&mut self, error: Error) {
        (self.sink)(Finding::Warning(error));
    }

    /// The value, or `None` after the error was noted.
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.problem(error)).ok()
    }
}

/// Checks the layers `paths`, bottom first, and their stack; returns the number of problems.
///
/// A single ZFile may hold anything; everything else must be layers.
pub fn verify(
    paths: &[LayerPath],
    parents: Parents,
    report: &dyn Report,
    sink: &mut dyn FnMut(Finding),
) -> u64 {
    let mut findings = Findings { sink, problems: 0 };
    findings.note(check_count(paths));
    for path in paths {
        match path {
            LayerPath::Sealed(path) => sealed(path, paths.len() == 1, report, &mut findings),
            LayerPath::Writable { data, index } => writable(data, index, report, &mut findings),
        }
    }
    // Only a stack whose layers are right can be wrong as a stack.
    if findings.problems == 0 {
        stack(paths, parents, &mut findings);
    }
    findings.problems
}

fn stack(paths: &[LayerPath], parents: Parents, findings: &mut Findings<'_>) {
    if let [LayerPath::Sealed(path)] = paths {
        match Blob::open(path).and_then(|opened| opened.is_layer()) {
            Ok(true) => {}
            // A ZFile around something else; there is no stack.
            Ok(false) => return,
            Err(e) => return findings.problem(e),
        }
    }
    let Some(stack) = findings.note(Stack::open(paths, parents)) else {
        return;
    };
    if stack
        .layers()
        .iter()
        .all(|layer| layer.virtual_bytes() == 0)
    {
        let top = stack.top().map_or(Path::new(""), Layer::path);
        findings.warning(Error::new(top, "no layer records a virtual size"));
    }
}

fn sealed(path: &Path, alone: bool, report: &dyn Report, findings: &mut Findings<'_>) {
    let Some(file) = findings.note(FileRange::open(path)) else {
        return;
    };
    let Some((_, blob)) = findings.note(unwrap_tar(&file)) else {
        return;
    };
    let Some(first) = findings.note(blob.first(512)) else {
        return;
    };
    if !Zfile::recognise(&first, blob.bytes()) {
        layer(&Content::Plain(blob), &HashSet::new(), findings);
        report.add(file.bytes());
        return;
    }
    match Zfile::open(blob.clone()) {
        Ok(zfile) => {
            let bad = blocks(&zfile, report, findings);
            let content = Content::Zfile(Box::new(zfile));
            let opened = Blob {
                file_bytes: file.bytes(),
                tar: None,
                content,
            };
            // A content that cannot be recognised because its first block is bad was noted already.
            match opened.is_layer() {
                Ok(false) if alone => {}
                Ok(_) => layer(&opened.content, &bad, findings),
                Err(e) if is_noted(&e, &bad) => {}
                Err(e) => findings.problem(e),
            }
        }
        Err(error) => {
            let header_is_bad = error
                .place()
                .is_some_and(|at| matches!(at, Place::File(at) if at < blob.start() + 512));
            findings.problem(error);
            if header_is_bad {
                trailer_of(&blob, findings);
            }
        }
    }
}

/// Looks at the trailer of a ZFile whose header is bad.
fn trailer_of(blob: &FileRange, findings: &mut Findings<'_>) {
    let Ok(at) = trailer_position(blob.bytes()) else {
        return;
    };
    let Some(block) = findings.note(blob.read_array(at)) else {
        return;
    };
    if let Err(e) = Geometry::parse_trailer(&block, blob.bytes(), crc32c) {
        let at = Place::File(blob.start().saturating_add(e.offset()));
        findings.problem(Error::format(blob.path(), e, at));
    }
}

/// Checks every block; returns the bytes of the file at which bad ones were found.
fn blocks(zfile: &Zfile, report: &dyn Report, findings: &mut Findings<'_>) -> HashSet<u64> {
    let geometry = *zfile.geometry();
    if zfile.gap() != 0 {
        let end = geometry.index_offset() - zfile.gap();
        let error = Error::new(zfile.input().path(), "unused bytes before the jump table");
        findings.problem(error.at_byte(zfile.input().start() + end));
    }
    let mut bad = HashSet::new();
    let per_batch = BLOCKS_PER_TASK * 16 * rayon::current_num_threads() as u64;
    let mut first = 0;
    while first < geometry.blocks() {
        let end = geometry.blocks().min(first + per_batch);
        let tasks: Vec<u64> = (first..end).step_by(BLOCKS_PER_TASK as usize).collect();
        let errors: Vec<Vec<Error>> = tasks
            .par_iter()
            .map_init(Cursor::default, |cursor, task| {
                let mut errors = Vec::new();
                let last = end.min(task + BLOCKS_PER_TASK) - 1;
                zfile.check_blocks(cursor, *task, last, |e| errors.push(e));
                let span = zfile.extent(last).zip(zfile.extent(*task));
                report.add(span.map_or(0, |(last, first)| last.offset - first.offset));
                errors
            })
            .collect();
        for error in errors.into_iter().flatten() {
            if let Some(Place::File(at)) = error.place() {
                bad.insert(at);
            }
            findings.problem(error);
        }
        first = end;
    }
    bad
}

fn is_noted(error: &Error, bad: &HashSet<u64>) -> bool {
    matches!(error.place(), Some(Place::File(at)) if bad.contains(&at))
}

/// Checks header, trailer and index of a sealed layer.
fn layer(content: &Content, bad: &HashSet<u64>, findings: &mut Findings<'_>) {
    let mut cursor = Cursor::default();
    let note = |findings: &mut Findings<'_>, error: Error| {
        if !(matches!(content, Content::Zfile(_)) && is_noted(&error, bad)) {
            findings.problem(error);
        }
    };
    if let Err(e) = read_header(content) {
        // What is not a layer at either end has no trailer to complain about.
        let foreign = !content_ends_as_layer(content);
        note(findings, e);
        if foreign {
            return;
        }
    }
    let trailer = match read_trailer(content) {
        Ok(trailer) => trailer,
        Err(e) => return note(findings, e),
    };
    let mut reader = IndexReader::new(&trailer, 0);
    let mut errors = Vec::new();
    let read = each_chunk(trailer.index_bytes(), |at, buffer| {
        content.read(&mut cursor, buffer, trailer.index_offset + at)?;
        entries(&mut reader, buffer, |e| errors.push(content.error(e)));
        Ok(())
    });
    errors.into_iter().for_each(|e| note(findings, e));
    if let Err(e) = read {
        note(findings, e);
    }
}

fn content_ends_as_layer(content: &Content) -> bool {
    let Ok(at) = Trailer::position(content.bytes()) else {
        return false;
    };
    let mut first = [0; 24];
    content.read(&mut Cursor::default(), &mut first, at).is_ok() && Header::recognise(&first)
}

/// Gives every entry to the reader, and every error to `findings`.
fn entries(reader: &mut IndexReader, bytes: &[u8], mut findings: impl FnMut(ovbd_image::Error)) {
    for entry in bytes.chunks_exact(ENTRY_BYTES) {
        let mut array = [0; ENTRY_BYTES];
        array.copy_from_slice(entry);
        if let Err(e) = reader.push(&array) {
            findings(e);
            // All other entries of such a layer would say the same.
            if e.reason() == Reason::TurboLayer {
                return;
            }
        }
    }
}

fn writable(data: &Path, index: &Path, report: &dyn Report, findings: &mut Findings<'_>) {
    let (data, index) = (FileRange::open(data), FileRange::open(index));
    let data = findings.note(data).map(Content::Plain);
    let index = findings.note(index).map(Content::Plain);
    let mut cursor = Cursor::default();
    if let Some(data) = &data {
        let header = data
            .read_array(&mut cursor, 0)
            .and_then(|block| log::check_data_header(&block).map_err(|e| data.error(e)));
        findings.note(header);
        report.add(data.bytes());
    }
    let (Some(data), Some(index)) = (data, index) else {
        return;
    };
    let reader = index.read_array(&mut cursor, 0).and_then(|block| {
        LogReader::new(&block, index.bytes(), data.bytes(), 0).map_err(|e| index.error(e))
    });
    let Some(mut reader) = findings.note(reader) else {
        return;
    };
    let bytes = LogReader::entries(index.bytes()) * ENTRY_BYTES as u64;
    let read = each_chunk(bytes, |at, buffer| {
        index.read(&mut cursor, buffer, HEADER_BYTES as u64 + at)?;
        for entry in buffer.chunks_exact(ENTRY_BYTES) {
            let mut array = [0; ENTRY_BYTES];
            array.copy_from_slice(entry);
            if let Err(e) = reader.push(&array) {
                findings.problem(index.error(e));
            }
        }
        Ok(())
    });
    findings.note(read);
}

const _: () = assert!(CHUNK_BYTES % ENTRY_BYTES == 0);
