// SPDX-License-Identifier: GPL-2.0

//! Several blobs at once.

use std::{
    collections::HashSet,
    sync::{
        atomic::{AtomicUsize, Ordering},
        Mutex, PoisonError,
    },
};

use crate::{
    blob::BlobSource,
    document::Descriptor,
    error::{Error, Kind, Result},
    progress::Progress,
    registry::Registry,
    store::Store,
};

/// A blob that is to be sent.
pub struct Outgoing<'a> {
    /// Its digest and size.
    pub blob: Descriptor,
    /// Its bytes.
    pub source: Box<dyn BlobSource + 'a>,
    /// Repositories of the same registry that may have it.
    pub from: Vec<String>,
}

/// Fetches `blobs` into `store`, `jobs` at once; each digest once. Checks first that there is room for them.
///
/// # Errors
///
/// The first one of any of them; the others end soon after, and keep what they have.
pub fn fetch_blobs(
    registry: &Registry,
    store: &Store,
    blobs: &[Descriptor],
    jobs: usize,
    progress: &dyn Progress,
) -> Result<()> {
    let mut seen = HashSet::new();
    let blobs: Vec<&Descriptor> = blobs
        .iter()
        .filter(|blob| seen.insert(&blob.digest))
        .collect();
    let mut wanted = 0_u64;
    for blob in &blobs {
        if !store.has_blob(blob)? {
            wanted = wanted.saturating_add(blob.size);
        }
    }
    let free = store.free_bytes()?;
    if wanted > free {
        let what = format!(
            "no room: {wanted} bytes are to be fetched, and the file system has {free} left"
        );
        return Err(Error::new(Kind::Refused, store.path().display(), what));
    }
    at_once(registry, &blobs, jobs, |blob| {
        registry.fetch_blob(blob, store, progress)
    })
}

/// Sends `blobs`, `jobs` at once; each digest once. Notes about them are kept in `notes`.
///
/// # Errors
///
/// The first one of any of them; the others end soon after.
pub fn send_blobs(
    registry: &Registry,
    blobs: &[Outgoing<'_>],
    jobs: usize,
    notes: Option<&Store>,
    progress: &dyn Progress,
) -> Result<()> {
    let mut seen = HashSet::new();
    let blobs: Vec<_> = blobs
        .iter()
        .filter(|out| seen.insert(&out.blob.digest))
        .collect();
    at_once(registry, &blobs, jobs, |out| {
        registry.send_blob(&out.blob, &*out.source, &out.from, notes, progress)
    })
}

fn at_once<T: Sync>(
    registry: &Registry,
    items: &[T],
    jobs: usize,
    action: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                while let (Some(item), false) = (
                    items.get(next.fetch_add(1, Ordering::Relaxed)),
                    registry.is_stopped(),
                ) {
                    if let Err(error) = action(item) {
                        registry.http.stop.store(true, Ordering::Relaxed);
                        let mut first = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        let cancelled = |error: &Error| error.kind() == Kind::Cancelled;
                        if first.as_ref().is_none_or(cancelled) {
                            *first = Some(error);
                        }
                        return;
                    }
                }
            });
        }
    });
    // Only these are ended.
    registry.http.stop.store(false, Ordering::Relaxed);
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
