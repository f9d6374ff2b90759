// SPDX-License-Identifier: GPL-2.0

//! The ZFile: header, trailer, length and every block.

use std::collections::HashSet;

use ovbd_image::zfile::{trailer_position, Geometry, HEADER_BYTES};
use rayon::prelude::*;

use super::{first_non_zero, Findings};
use crate::{
    crc::crc32c,
    error::{Error, Place},
    file_range::FileRange,
    report::Report,
    zfile::{Cursor, Zfile},
};

/// Blocks that one thread checks at a time.
const BLOCKS_PER_TASK: u64 = 256;

/// Bytes of header and trailer that have a meaning.
const STRUCT_BYTES: u64 = 96;

/// Checks that the trailer follows the jump table, says the same as a final header, and ends the file.
pub(super) fn check_ends(zfile: &Zfile, may_be_longer: bool, findings: &mut Findings<'_>) {
    let blob = zfile.input();
    let geometry = zfile.geometry();
    let fail = |what: String, at: u64| Error::new(blob.path(), what).at_byte(blob.start() + at);
    let at = geometry.index_offset() + geometry.index_bytes();
    let end = at + HEADER_BYTES as u64;
    if end > blob.bytes() {
        let what = format!("cut off: {} bytes are missing", end - blob.bytes());
        return findings.problem(fail(what, blob.bytes()));
    }
    if end < blob.bytes() && !may_be_longer {
        let what = match zfile.has_final_header() {
            true => "something follows the end of the ZFile",
            false => "unused bytes between jump table and trailer",
        };
        findings.problem(fail(what.to_owned(), end));
    }
    if zfile.has_final_header() {
        let Some(block) = findings.note(blob.read_array(at)) else {
            return;
        };
        match Geometry::parse_trailer(&block, end, crc32c) {
            Ok(trailer) if trailer == *geometry => {}
            Ok(_) => findings.problem(fail("header and trailer differ".to_owned(), at)),
            Err(e) => findings.problem(Error::format(
                blob.path(),
                e,
                Place::File(blob.start().saturating_add(e.offset())),
            )),
        }
    }
    if !geometry.has_digest() {
        // An old one of the original has anything there.
        for start in [0, at] {
            let (from, to) = (start + STRUCT_BYTES, start + HEADER_BYTES as u64);
            let found = first_non_zero(from, to, |buffer, at| blob.read(buffer, at));
            if let Some(Some(at)) = findings.note(found) {
                let what = "unused bytes of header or trailer are not zero".to_owned();
                findings.warning(fail(what, at));
            }
        }
    }
}

/// Looks at the trailer of a ZFile whose header is bad.
pub(super) fn check_trailer(blob: &FileRange, findings: &mut Findings<'_>) {
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
pub(super) fn check_blocks(
    zfile: &Zfile,
    report: &dyn Report,
    findings: &mut Findings<'_>,
) -> HashSet<u64> {
    let geometry = *zfile.geometry();
    if zfile.gap() != 0 {
        let end = geometry.index_offset() - zfile.gap();
        let error = Error::new(zfile.input().path(), "unused bytes before the jump table");
        findings.problem(error.at_byte(zfile.input().start() + end));
    }
    let mut bad = HashSet::new();
    findings.verdict.blocks += geometry.blocks();
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
