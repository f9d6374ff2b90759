// SPDX-License-Identifier: GPL-2.0

//! The layer: header, index, trailer, and all that fills up; and the pair of files of a writable one.

use std::{collections::HashSet, path::Path};

use ovbd_image::{
    layer_index::IndexReader,
    log::{self, LogReader},
    lsmt::{
        Entry, Header, Trailer, UuidText, ENTRY_BYTES, HEADER_BYTES, SECTOR_BYTES, STRUCT_BYTES,
    },
    Reason,
};

use super::{first_non_zero, is_noted, Findings};
use crate::{
    blob::Content,
    error::{Error, Result},
    file_range::{FileRange, CHUNK_BYTES},
    layer::{each_chunk, read_header, read_trailer},
    parents::is_same,
    report::Report,
    zfile::Cursor,
};

/// Checks header, trailer and index of a sealed layer.
pub(super) fn check(content: &Content, bad: &HashSet<u64>, findings: &mut Findings<'_>) {
    let mut cursor = Cursor::default();
    let note = |findings: &mut Findings<'_>, error: Error| {
        if matches!(content, Content::Plain(_)) || !is_noted(&error, bad) {
            findings.problem(error);
        }
    };
    let header = match read_header(content) {
        Ok(header) => Some(header),
        Err(e) => {
            // What is not a layer at either end has no trailer to complain about.
            let foreign = !content_ends_as_layer(content);
            note(findings, e);
            if foreign {
                return;
            }
            None
        }
    };
    let trailer = match read_trailer(content) {
        Ok(trailer) => trailer,
        Err(e) => return note(findings, e),
    };
    let mut reader = IndexReader::new(&trailer, 0);
    let mut errors = Vec::new();
    let mut odd = None;
    let read = each_chunk(trailer.index_bytes(), |at, buffer| {
        let at = trailer.index_offset + at;
        content.read(&mut cursor, buffer, at)?;
        entries(&mut reader, buffer, |e| errors.push(content.error(e)));
        odd = odd.or_else(|| odd_padding(buffer).map(|inside| at + inside));
        Ok(())
    });
    if let Some(at) = odd {
        let what = "an index entry that only fills up has a value";
        findings.problem(Error::new(content.input().path(), what).at(content.place(at)));
    }
    findings.verdict.entries += trailer.entries;
    errors.into_iter().for_each(|e| note(findings, e));
    if let Err(e) = read {
        note(findings, e);
    }
    if let Some(header) = header {
        if let Some(what) = difference(&header, &trailer) {
            let what = format!("header and trailer differ in their {what}");
            findings.problem(Error::new(content.input().path(), what).at(content.place(0)));
        }
    }
    match unused_bytes(content, &trailer) {
        Ok(None) => {}
        Ok(Some(at)) => {
            let what = "bytes that fill up header, index or trailer are not zero";
            findings.problem(Error::new(content.input().path(), what).at(content.place(at)));
        }
        Err(e) => note(findings, e),
    }
}

/// In what header and trailer differ. The header was written first: what was not known then is 0 or nil.
fn difference(header: &Header, trailer: &Trailer) -> Option<&'static str> {
    let size = header.virtual_size;
    let known = |uuid: Option<UuidText>| uuid.filter(|uuid| !uuid.is_nil());
    let differ = |one, other| {
        let pair = known(one).zip(known(other));
        pair.is_some_and(|(one, other)| !is_same(one, other))
    };
    if size != 0 && size != trailer.virtual_size {
        return Some("virtual sizes");
    }
    if differ(header.uuid, trailer.uuid) {
        return Some("UUIDs");
    }
    differ(header.parent_uuid, trailer.parent_uuid).then_some("parent UUIDs")
}

/// The first byte that is not zero of those that only fill up.
fn unused_bytes(content: &Content, trailer: &Trailer) -> Result<Option<u64>> {
    let at = content.bytes() - HEADER_BYTES as u64;
    // The original may leave any bytes up to the end of the sector.
    let index_end = trailer.index_offset + trailer.index_bytes();
    let index_end = index_end.next_multiple_of(SECTOR_BYTES);
    let used = STRUCT_BYTES as u64;
    let mut cursor = Cursor::default();
    for (from, to) in [
        (used, HEADER_BYTES as u64),
        (index_end, at),
        (at + used, content.bytes()),
    ] {
        let read = |buffer: &mut [u8], at| content.read(&mut cursor, buffer, at);
        if let Some(at) = first_non_zero(from, to, read)? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// The byte of the first entry that only fills up, but is not as every writer makes it.
fn odd_padding(entries: &[u8]) -> Option<u64> {
    let (entries, _) = ovbd_image::layer_index::entries(entries);
    let odd = |bytes: &[u8; ENTRY_BYTES]| {
        let entry = Entry::decode(bytes);
        entry.is_padding() && entry != Entry::PADDING
    };
    let mut entries = entries;
    entries
        .position(odd)
        .map(|number| (number * ENTRY_BYTES) as u64)
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

pub(super) fn check_pair(
    data: &Path,
    index: &Path,
    report: &dyn Report,
    findings: &mut Findings<'_>,
) {
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
