// SPDX-License-Identifier: GPL-2.0

//! What is known of the blobs and of who waits for them, and what is to be fetched next.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs::File,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use ovbd_oci::{ChunkList, Chunks, Descriptor, Scattered};

use crate::{
    read::{Piece, Read},
    server::State,
};

/// Most chunks that one request fetches where nobody waits, so that its latency counts little: 4 MiB.
pub const RUN_CHUNKS: u64 = 16;
/// The same while somebody has been waiting a moment ago: what comes in between must not take long.
pub const BUSY_RUN_CHUNKS: u64 = 2;
/// How long ago that may be.
const BUSY: Duration = Duration::from_millis(500);
/// Chunks that are fetched with one that follows what is there: a program reads a file.
const AHEAD_CHUNKS: u64 = 4;
/// How long a chunk that came wrong is not asked for again.
pub const WRONG_PAUSE: Duration = Duration::from_secs(1);

/// Where the bytes of a blob are kept.
pub enum Place {
    Local(Arc<File>),
    Part(Arc<Scattered>),
    Nowhere,
}

/// A blob, what of it is here, and what is being done about the rest.
pub struct Blob {
    pub descriptor: Descriptor,
    pub path: PathBuf,
    pub place: Place,
    pub state: State,
    pub chunks: Chunks,
    /// By what each chunk is checked when it comes.
    pub list: Option<Arc<ChunkList>>,
    /// Chunks that were not what the list says, and when they last came.
    pub wrong: HashMap<u64, Instant>,
    /// Chunks that somebody has read.
    pub read: Chunks,
    /// Chunks that are being fetched.
    pub busy: HashSet<u64>,
    /// Those that came last, where they cannot be stored.
    pub recent: VecDeque<(u64, Arc<Vec<u8>>)>,
    /// Whether it is being checked against its digest.
    pub finishing: bool,
    pub error: Option<String>,
}

/// A piece of a read.
pub type Wait = (Piece, Arc<Read>);

/// What all threads know.
pub struct Shared {
    pub blobs: Vec<Blob>,
    /// Chunks that somebody waits for.
    pub wanted: VecDeque<(usize, u64)>,
    pub waiting: HashMap<(usize, u64), Vec<Wait>>,
    /// Pieces that are there, to be copied.
    pub ready: VecDeque<Wait>,
    pub reads: Vec<Arc<Read>>,
    /// Chunks to fetch before the others.
    pub first: VecDeque<(usize, u64)>,
    /// Chunks in the order in which somebody read them first.
    pub trace: Vec<(usize, u64)>,
    /// Which of the sources is asked: the next one after each failure.
    pub source: usize,
    /// When somebody last had to wait.
    pub last_miss: Option<Instant>,
    /// No request is made before this time, after those that failed.
    pub pause: Option<Instant>,
    pub failures: u32,
    pub background: bool,
    /// Requests under way for which nobody waits.
    pub unasked: usize,
    /// Chunks that one request fetches where nobody waits.
    pub run: u64,
    /// The least time that a request took: what is more is the line's.
    pub fastest: Duration,
}

/// What a worker does next.
pub enum Job {
    /// Fetch chunks of a blob, from one on; nobody waits for them.
    Unasked(usize, u64, u64),
    /// Fetch chunks of a blob, from one on.
    Fetch(usize, u64, u64),
    /// Check a blob and put it into the store.
    Finish(usize, Arc<Scattered>),
}

impl Shared {
    /// Whether a chunk can be read here at once.
    pub fn has(&self, blob: usize, chunk: u64) -> bool {
        self.blobs.get(blob).is_some_and(|blob| match blob.place {
            Place::Local(_) => true,
            Place::Part(_) => blob.chunks.has(chunk),
            Place::Nowhere => blob.recent.iter().any(|(found, _)| *found == chunk),
        })
    }

    /// Remembers that somebody reads a chunk.
    pub fn note_read(&mut self, number: usize, chunk: u64) {
        if self
            .blobs
            .get_mut(number)
            .is_some_and(|blob| blob.read.add(chunk))
        {
            self.trace.push((number, chunk));
        }
    }

    /// Takes as many chunks as are missing from `chunk` on, at most `most`.
    fn take(&mut self, number: usize, chunk: u64, most: u64) -> Option<Job> {
        let free = |shared: &Self, chunk| {
            let blob = &shared.blobs[number];
            let was_wrong = blob.wrong.get(&chunk);
            chunk < blob.chunks.count()
                && !shared.has(number, chunk)
                && !blob.busy.contains(&chunk)
                && was_wrong.is_none_or(|at| at.elapsed() >= WRONG_PAUSE)
        };
        let count = (0..most)
            .take_while(|more| free(self, chunk + more))
            .count() as u64;
        let blob = self.blobs.get_mut(number)?;
        blob.busy.extend(chunk..chunk + count);
        (count > 0).then_some(Job::Fetch(number, chunk, count))
    }

    /// Asks again for chunks that came wrong a while ago and that somebody waits for.
    pub fn want_wrong_again(&mut self) {
        let waiting = self.waiting.keys();
        let due = waiting.filter(|(number, chunk)| {
            let blob = &self.blobs[*number];
            let at = blob.wrong.get(chunk);
            at.is_some_and(|at| at.elapsed() >= WRONG_PAUSE)
                && !blob.busy.contains(chunk)
                && !self.wanted.contains(&(*number, *chunk))
        });
        let due: Vec<_> = due.copied().collect();
        self.wanted.extend(due);
    }

    /// What to do next; what nobody has asked for is not for a spare thread.
    pub fn next(&mut self, is_spare: bool) -> Option<Job> {
        if self.pause.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        while let Some((number, chunk)) = self.wanted.pop_front() {
            let follows = chunk > 0 && {
                let blob = &self.blobs[number];
                blob.chunks.has(chunk - 1) || blob.busy.contains(&(chunk - 1))
            };
            let most = match follows && matches!(self.blobs[number].place, Place::Part(_)) {
                true => AHEAD_CHUNKS,
                false => 1,
            };
            if let Some(job) = self.take(number, chunk, most) {
                return Some(job);
            }
        }
        for number in 0..self.blobs.len() {
            let blob = &mut self.blobs[number];
            if let Place::Part(part) = &blob.place {
                if blob.chunks.is_full() && !blob.finishing && blob.state == State::Fetching {
                    blob.finishing = true;
                    return Some(Job::Finish(number, part.clone()));
                }
            }
        }
        while let Some((number, chunk)) = self.first.pop_front() {
            // What follows goes with it.
            let mut count = 1;
            while count < RUN_CHUNKS && self.first.front() == Some(&(number, chunk + count)) {
                self.first.pop_front();
                count += 1;
            }
            if number >= self.blobs.len() {
                continue;
            }
            if let Some(Job::Fetch(number, chunk, taken)) = self.take(number, chunk, count) {
                let rest = (chunk + taken..chunk + count).rev();
                rest.for_each(|chunk| self.first.push_front((number, chunk)));
                return Some(Job::Fetch(number, chunk, taken));
            }
            // The first of them is there or on its way.
            let rest = (chunk + 1..chunk + count).rev();
            rest.for_each(|chunk| self.first.push_front((number, chunk)));
        }
        if !self.background || is_spare {
            return None;
        }
        let was_busy = self.last_miss.is_some_and(|at| at.elapsed() < BUSY);
        let most = match was_busy {
            // One of them is enough to use a line that those who wait leave unused.
            true if self.unasked > 0 => return None,
            true => self.run.min(BUSY_RUN_CHUNKS),
            false => self.run,
        };
        for number in 0..self.blobs.len() {
            if self.blobs[number].state != State::Fetching {
                continue;
            }
            let mut from = 0;
            while let Some(chunk) = self.blobs[number].chunks.first_missing(from) {
                if let Some(Job::Fetch(number, chunk, count)) = self.take(number, chunk, most) {
                    self.unasked += 1;
                    return Some(Job::Unasked(number, chunk, count));
                }
                from = chunk + 1;
            }
        }
        None
    }
}
