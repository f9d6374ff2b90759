// SPDX-License-Identifier: GPL-2.0

//! Squashing runs of an image's layers in the store, so that a machine that boots from it makes fewer devices.
//!
//! The image stays as it is, and so do its layers: [`crate::names::Found::layers`] takes the file of a run in their place.
//! Nobody needs it, so what cannot be made is a warning.

use anyhow::Result;
use ovbd_devices::Interrupt;
use ovbd_layers::{build::Options, output::remove_temporaries, parents::Parents, squash::squash};
use ovbd_oci::{Descriptor, Digest, Error, Kind, Store};

use crate::{
    names::{blobs, Found},
    report::Report,
    watch::Watch,
};

/// Squashes the runs of an image that are not squashed yet. Who calls this protects the store meanwhile.
///
/// # Errors
///
/// The image cannot be read, and a signal came, which else ends the program. What cannot be squashed is a warning.
pub fn squash_runs(found: &Found, interrupt: &Interrupt, report: &Report) -> Result<()> {
    let (mut first, mut failed) = (None, 0);
    for part in found.parts()? {
        let Some(run) = part.run.as_ref().filter(|run| !found.is_squashed(run)) else {
            continue;
        };
        let _watch = Watch::begin(interrupt, remove_temporaries);
        report.begin("squashing", 0);
        if let Err(error) = squash_run(&found.store, &part.layers, run, report) {
            failed += part.layers.len();
            first.get_or_insert(error);
        }
        // One that came at the very end.
        interrupt.check(found.store.path())?;
    }
    if let Some(error) = first {
        let name = found.named.name.as_deref().unwrap_or_default();
        let what = format!("{name}: {failed} layers are not squashed and stay as many devices");
        report.warning(&error.context(what));
    }
    Ok(())
}

fn squash_run(store: &Store, layers: &[Descriptor], run: &Digest, report: &Report) -> Result<()> {
    let stored: u64 = layers.iter().map(|layer| layer.size).sum();
    check_room(store, stored, stored)?;
    let options = Options {
        base: blobs(store, layers)?,
        parents: Parents::Neighbours,
        // Where most of the data is not compressed, the file is not either.
        zfile: None,
        ..Options::default()
    };
    let path = store.begin_squashed(run)?;
    squash(&path, &options, true, report)?;
    // It can be larger than the layers, if some of them are compressed and it is not.
    let made = std::fs::metadata(&path).map_err(|e| Error::io(&path, "look at", e))?;
    if let Err(error) = check_room(store, made.len(), 0) {
        store.drop_squashed(run)?;
        return Err(error);
    }
    Ok(store.keep_squashed(run)?)
}

/// Refuses what leaves less room than it takes, as the next layers need some; `more` bytes of it are not there yet.
fn check_room(store: &Store, bytes: u64, more: u64) -> Result<()> {
    let free = store.free_bytes()?;
    if bytes.saturating_add(more) <= free {
        return Ok(());
    }
    let what = format!(
        "no room: {bytes} bytes for a squashed file and as many to stay free, and the file system has {} for both",
        free + (bytes - more)
    );
    Err(Error::new(Kind::Refused, store.path().display(), what).into())
}
