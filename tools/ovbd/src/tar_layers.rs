// SPDX-License-Identifier: GPL-2.0

//! What images that are made of tars while they are pulled have in common.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use anyhow::{Context, Result};
use ovbd_layers::tar::verbatim::Made;
use ovbd_oci::{
    annotations::{DIFF_ID, FS_TYPE, TAR_BYTES},
    Algorithm, Descriptor, Hasher, Ingested, Store, OCI_LAYER,
};
use tempfile::TempDir;

use crate::{documents::note_blob, report::Report};

/// Bytes that are copied at once.
const BUFFER_BYTES: usize = 1 << 20;

/// A folder for layers that are not complete; it goes when it is dropped.
///
/// # Errors
///
/// The system's.
pub fn scratch_folder() -> Result<TempDir> {
    let folder = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    tempfile::tempdir_in(&folder)
        .with_context(|| format!("{}: cannot make a folder in it", folder.to_string_lossy()))
}

/// Puts `file`, a layer over a tar with the file system `fs_type`, into the store, and removes it. Returns it with the
/// annotations of such a layer.
///
/// # Errors
///
/// The system's.
pub fn keep(store: &Store, file: &Path, made: &Made, fs_type: &str) -> Result<Descriptor> {
    let fail = || format!("{}: cannot read", file.display());
    let opened = File::open(file).with_context(fail)?;
    let size = opened.metadata().with_context(fail)?.len();
    let mut hasher = Hasher::new(Algorithm::Sha256);
    each_piece(&opened, size, |piece| {
        hasher.update(piece);
        Ok(())
    })
    .with_context(fail)?;
    let mut layer = Descriptor::new(OCI_LAYER, hasher.finish(), size);
    if let Ingested::Part(mut part) = store.ingest(&layer, || ())? {
        part.restart()?;
        each_piece(&opened, size, |piece| Ok(part.write(piece)?)).with_context(fail)?;
        part.commit()?;
    }
    std::fs::remove_file(file).with_context(|| format!("{}: cannot remove", file.display()))?;
    note_blob(&mut layer);
    for (name, value) in [
        (FS_TYPE, fs_type.to_owned()),
        (DIFF_ID, made.diff_id.to_string()),
        (TAR_BYTES, made.tar_bytes.to_string()),
    ] {
        layer.annotations.insert(name.to_owned(), value);
    }
    Ok(layer)
}

/// Calls `take` with the first `size` bytes of a file.
fn each_piece(file: &File, size: u64, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = 0;
    while at < size {
        let piece = &mut buffer[..(size - at).min(BUFFER_BYTES as u64) as usize];
        file.read_exact_at(piece, at)?;
        take(piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Progress of one layer among several: how much there is in all was said before.
pub struct Added<'a>(pub &'a Report);

impl ovbd_layers::report::Report for Added<'_> {
    fn expect(&self, _bytes: u64) {}

    fn add(&self, bytes: u64) {
        self.0.add(bytes);
    }

    fn warn(&self, error: &ovbd_layers::Error) {
        self.0.warn(error);
    }
}
