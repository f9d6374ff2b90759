// SPDX-License-Identifier: GPL-2.0

//! Where chunks come from: other blobs of the store that have the same ones, and repositories, each of which may fail or send
//! something else.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use ovbd_oci::{chunk_range, ChunkList, Descriptor, Error, Store, CHUNK_BYTES};

use crate::{schedule::RUN_CHUNKS, server::Inner};

/// How much longer than the fastest a request for which nobody waits may take and be longer the next time, or must not take:
/// who begins to wait waits for what is on the line already, and a request under way is lost when the process ends.
const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_millis(250);
/// Wait after a request that failed, twice as long after each further one, and the most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A chunk of a blob of the store.
pub struct Copy {
    file: Arc<File>,
    start: u64,
    bytes: u64,
}

/// Where the chunks of blobs of the store are. A blob that cannot be opened has none.
pub fn find_copies(store: &Store, local: &[(Descriptor, ChunkList)]) -> HashMap<Vec<u8>, Copy> {
    let mut copies = HashMap::new();
    for (blob, list) in local {
        let Ok(file) = store.open_blob(blob).map(Arc::new) else {
            continue;
        };
        for chunk in 0..blob.size.div_ceil(CHUNK_BYTES) {
            let (start, bytes) = chunk_range(chunk, blob.size);
            if let Some(hash) = list.hash(chunk) {
                let file = file.clone();
                copies.insert(hash.to_vec(), Copy { file, start, bytes });
            }
        }
    }
    copies
}

impl Inner {
    /// Fetches `count` chunks of a blob from `chunk` on, those that are in no other blob.
    pub fn fetch_chunks(&self, number: usize, chunk: u64, count: u64) {
        let (mut at, end) = (chunk, chunk + count);
        while at < end {
            if let Some(data) = self.copied(number, at) {
                self.arrived(number, at, &data);
                at += 1;
                continue;
            }
            let others = (at + 1..end).take_while(|chunk| self.copy_of(number, *chunk).is_none());
            let count = 1 + others.count() as u64;
            self.fetch_range(number, at, count);
            at += count;
        }
    }

    /// Where a chunk is in another blob.
    fn copy_of(&self, number: usize, chunk: u64) -> Option<&Copy> {
        let shared = self.lock();
        let hash = shared.blobs.get(number)?.list.as_ref()?.hash(chunk)?;
        self.copies.get(hash)
    }

    /// A chunk from another blob, if it is there and right.
    fn copied(&self, number: usize, chunk: u64) -> Option<Vec<u8>> {
        let copy = self.copy_of(number, chunk)?;
        let mut data = vec![0; copy.bytes as usize];
        copy.file.read_exact_at(&mut data, copy.start).ok()?;
        self.fits(number, chunk, &data).then_some(data)
    }

    /// Whether a chunk is what the list of its blob says; where there is none everything is.
    fn fits(&self, number: usize, chunk: u64, data: &[u8]) -> bool {
        let list = self
            .lock()
            .blobs
            .get(number)
            .and_then(|blob| blob.list.clone());
        list.is_none_or(|list| list.fits(chunk, data))
    }

    fn fetch_range(&self, number: usize, chunk: u64, count: u64) {
        let (descriptor, source) = {
            let shared = self.lock();
            let source = &self.sources[shared.source % self.sources.len()];
            (shared.blobs[number].descriptor.clone(), source)
        };
        let (start, _) = chunk_range(chunk, descriptor.size);
        let (last, bytes) = chunk_range(chunk + count - 1, descriptor.size);
        let begun = Instant::now();
        let fetched = source.range(&descriptor, start, last + bytes - start);
        let data = match fetched {
            Ok(data) => data,
            Err(error) => return self.failed(number, chunk, count, &error),
        };
        let mut wrong = Vec::new();
        for (chunk, data) in (chunk..chunk + count).zip(data.chunks(CHUNK_BYTES as usize)) {
            match self.fits(number, chunk, data) {
                true => self.arrived(number, chunk, data),
                false => wrong.push(chunk),
            }
        }
        let mut shared = self.lock();
        shared.failures = 0;
        shared.pause = None;
        let took = begun.elapsed();
        shared.fastest = shared.fastest.min(took);
        let on_the_line = took - shared.fastest;
        if on_the_line > LONG {
            shared.run = (shared.run / 2).max(1);
        } else if on_the_line < SHORT && count >= shared.run {
            shared.run = (2 * shared.run).min(RUN_CHUNKS);
        }
        if wrong.is_empty() {
            shared.blobs[number].error = None;
            return;
        }
        // Another source may have the right ones. They are asked for again after a while, and nothing else waits for them.
        shared.source = shared.source.wrapping_add(1);
        let blob = &mut shared.blobs[number];
        let what = format!(
            "{}: {} of {count} chunks from byte {start} on are not what the chunk list says",
            source.reference(),
            wrong.len()
        );
        tracing::warn!("{what}");
        blob.error = Some(what);
        for chunk in wrong {
            blob.busy.remove(&chunk);
            blob.wrong.insert(chunk, Instant::now());
        }
    }

    /// Chunks did not come: they are asked for again, after a pause.
    fn failed(&self, number: usize, chunk: u64, count: u64, error: &Error) {
        let mut shared = self.lock();
        let text = error.to_string();
        let blob = &mut shared.blobs[number];
        if blob.error.as_ref() != Some(&text) {
            tracing::warn!(%error, "trying again");
        }
        blob.error = Some(text);
        for chunk in chunk..chunk + count {
            blob.busy.remove(&chunk);
        }
        for chunk in (chunk..chunk + count).rev() {
            if shared.waiting.contains_key(&(number, chunk)) {
                shared.wanted.push_front((number, chunk));
            }
        }
        // All sources are tried before there is a longer pause.
        shared.source = shared.source.wrapping_add(1);
        let rounds = shared.failures / self.sources.len() as u32;
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(rounds.min(16)));
        shared.failures = shared.failures.saturating_add(1);
        shared.pause = Some(Instant::now() + pause.min(LONGEST_PAUSE));
    }
}
