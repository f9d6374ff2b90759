// SPDX-License-Identifier: GPL-2.0

//! Making one layer of a TurboOCI layer and the tar that it points into: header, the tar, what the blob has besides, index
//! and trailer. It is like one that was made of the tar, and the tar can be checked and taken out again in the same way.

use std::path::Path;

use ovbd_image::{
    lsmt::{Entry, DATA_START, HEADER_BYTES, SECTOR_BYTES},
    turbo,
};
use sha2::{Digest as _, Sha256};

use super::{original::DiffId, source::TarSource, verbatim::Made};
use crate::{
    blob::Blob,
    build::{finish_output, start_blob, Options},
    error::{Error, Result},
    layer::{each_chunk, Layer},
    layer_writer::LayerWriter,
    report::Report,
    turbo::{identity, wrong_entry, Index},
    zeros::GRANULE_BYTES,
    zfile::Cursor,
};

/// Makes `path` of the TurboOCI layer `blob` and its `target`, a tar of `max_bytes` at most that may be compressed. It has
/// the UUIDs of the layer, because it reads the same.
///
/// # Errors
///
/// A blob that is no layer, or points at what is in neither of the two; those of reading and writing. Nothing is left behind
/// then.
pub fn join(
    blob: &Path,
    target: &Path,
    path: &Path,
    options: &Options,
    max_bytes: u64,
    report: &dyn Report,
) -> Result<Made> {
    options.check().map_err(|what| Error::new(path, what))?;
    let head = Blob::open(blob)?.content;
    let mut index = Index::read(&head)?;
    let source = TarSource::open(target)?;
    let output = options.create_file(path, &[blob, target])?;
    let (out, start) = start_blob(&output, path, options)?;
    let identity = identity(&index.trailer);
    let mut layer = LayerWriter::new(out, path, &identity)?;
    // Of the layers below nothing is known here.
    layer.set_blank(0);

    let mut hash = Sha256::new();
    let mut stored = 0;
    let tar_bytes = source.each_window(max_bytes, report, |window| {
        hash.update(window);
        stored += source.store(&mut layer, window, stored)?;
        Ok(())
    })?;
    layer.set_tar_bytes(tar_bytes);
    let tar_sectors = stored / SECTOR_BYTES;
    let padding = stored.next_multiple_of(GRANULE_BYTES as u64) - stored;
    layer.unmapped(&vec![0; padding as usize])?;

    // All of it once: entries may share it.
    let data_bytes = index.trailer.index_offset - HEADER_BYTES as u64;
    each_chunk(data_bytes, |at, buffer| {
        head.read(&mut Cursor::default(), buffer, HEADER_BYTES as u64 + at)?;
        layer.unmapped(buffer)
    })?;

    let rebased = turbo::rebase(&mut index.entries, &index.trailer, tar_sectors);
    rebased.map_err(|wrong| wrong_entry(&head, (target, tar_bytes), wrong))?;
    let head_end = index.trailer.index_offset / SECTOR_BYTES;
    let head_at = (stored + padding) / SECTOR_BYTES;
    for entry in index.entries.iter().map(Entry::decode) {
        let (at, sectors) = (entry.start, u64::from(entry.sectors));
        if entry.is_padding() || sectors == 0 {
            continue;
        } else if entry.zeroed {
            layer.zeros(at, sectors)?;
        } else if entry.stored >= head_end {
            layer.map(at, sectors, DATA_START + (entry.stored - head_end))?;
        } else {
            layer.map(at, sectors, head_at + entry.stored)?;
        }
    }
    let made = Made {
        diff_id: DiffId(hash.finalize().into()),
        tar_bytes,
        stored_bytes: data_bytes,
        segments: layer.segments(),
    };
    let end = layer.finish(&identity)?;
    // The order of the entries is checked here.
    Layer::sealed(output.written(start, end - start)?, 0)?;
    finish_output(output, options, start, end)?;
    Ok(made)
}
