// SPDX-License-Identifier: GPL-2.0

//! The threads that fetch and copy, and where what they fetch is kept.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        mpsc::{channel, Receiver, Sender},
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
    },
    thread,
    time::{Duration, Instant},
};

use ovbd_oci::{
    chunk_range, ChunkList, Chunks, Descriptor, Error, Found, Kind, Registry, Result, Scattered,
    Store, CHUNK_BYTES,
};
use ovbd_ublk::Request;

use crate::{
    layout::Layout,
    read::{pieces, Read},
    schedule::{Blob, Job, Place, Shared, BUSY_RUN_CHUNKS},
    sources::{find_copies, Copy},
};

/// Chunks that are kept in memory, of blobs that cannot be stored.
const RECENT_CHUNKS: usize = 64;
/// Threads that are always there for those who wait, and for what is to be there first.
const SPARE: usize = 4;
/// Threads that copy what is there.
const COPIERS: usize = 2;
/// How often waiting reads are looked at, and blobs that another process has.
const STEP: Duration = Duration::from_millis(250);

/// How to fetch.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Requests at once for which nobody waits.
    pub jobs: usize,
    /// How long a read may wait until it fails; for ever if nothing.
    pub patience: Option<Duration>,
}

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// A blob is in the store, by its number: it can be read from its file.
    Complete(usize),
    /// The bytes of a blob are not those of its digest, though each is as it was sent.
    Damaged(usize, Error),
    /// The device is no more, or cannot be served any more.
    Ended(Option<String>),
}

/// How it is about a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All of it is in the store.
    Local,
    /// It is being fetched.
    Fetching,
    /// Another process fetches it; what is read of it comes from the registry each time.
    Elsewhere,
    /// The disk is full: as with [`State::Elsewhere`].
    Unstored,
    /// It is not what it should be.
    Damaged,
}

/// How far a blob is. Sizes are in bytes.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The file that it is or will be.
    pub path: PathBuf,
    /// Its size.
    pub size: u64,
    /// What of it is here.
    pub local: u64,
    /// How it is.
    pub state: State,
    /// What failed last, if it did.
    pub error: Option<String>,
}

/// A blob to serve.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The blob.
    pub blob: Descriptor,
    /// By what each chunk of it is checked before anybody sees it; without it they are believed until all are there.
    pub list: Option<ChunkList>,
}

/// Serves blobs while it fetches them.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

pub(crate) struct Inner {
    /// Repositories that have the blobs; there is one at least.
    pub(crate) sources: Vec<Registry>,
    /// Chunks that are in other blobs of the store, by their digests.
    pub(crate) copies: HashMap<Vec<u8>, Copy>,
    store: Store,
    layout: Layout,
    options: Options,
    shared: Mutex<Shared>,
    /// There is something to fetch.
    work: Condvar,
    /// There is something to copy.
    copy: Condvar,
    events: Mutex<Sender<Event>>,
}

impl Server {
    /// Looks for `blobs` in `store`; what is missing is copied from `local`, other blobs of the store with the lists of their
    /// chunks, or comes from `sources`: from the first, and from the next whenever one fails. Nothing is fetched before
    /// [`Server::start`].
    ///
    /// # Errors
    ///
    /// The system's, blobs that are too large, and no source.
    pub fn new(
        sources: Vec<Registry>,
        store: &Store,
        blobs: Vec<Wanted>,
        local: &[(Descriptor, ChunkList)],
        options: Options,
    ) -> Result<(Self, Receiver<Event>)> {
        let name = sources.first().map(|source| source.reference().to_string());
        let name =
            name.ok_or_else(|| Error::invalid(store.path().display(), "nothing to fetch from"))?;
        let layout = Layout::new(blobs.iter().map(|wanted| wanted.blob.size))
            .ok_or_else(|| Error::invalid(name, "larger than a device can be"))?;
        let mut all = Vec::new();
        for Wanted {
            blob: descriptor,
            list,
        } in blobs
        {
            let (place, state, chunks) = find(store, &descriptor)?;
            all.push(Blob {
                path: store.blob_path(&descriptor.digest),
                list: list.map(Arc::new),
                wrong: HashMap::new(),
                read: Chunks::none(descriptor.size),
                descriptor,
                place,
                state,
                chunks,
                busy: HashSet::new(),
                recent: VecDeque::new(),
                finishing: false,
                error: None,
            });
        }
        let (sender, events) = channel();
        let inner = Inner {
            sources,
            copies: find_copies(store, local),
            store: store.clone(),
            layout,
            options,
            shared: Mutex::new(Shared {
                blobs: all,
                wanted: VecDeque::new(),
                waiting: HashMap::new(),
                ready: VecDeque::new(),
                reads: Vec::new(),
                first: VecDeque::new(),
                trace: Vec::new(),
                source: 0,
                last_miss: None,
                pause: None,
                failures: 0,
                background: false,
                unasked: 0,
                fastest: Duration::MAX,
                run: BUSY_RUN_CHUNKS,
            }),
            work: Condvar::new(),
            copy: Condvar::new(),
            events: Mutex::new(sender),
        };
        Ok((Self(Arc::new(inner)), events))
    }

    /// Where the blobs are on the device.
    pub fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// The file of a blob, if all of it is in the store.
    pub fn local(&self, blob: usize) -> Option<PathBuf> {
        let shared = self.0.lock();
        let blob = shared.blobs.get(blob)?;
        (blob.state == State::Local).then(|| blob.path.clone())
    }

    /// How far each blob is.
    pub fn progress(&self) -> Vec<Progress> {
        let shared = self.0.lock();
        let progress = |blob: &Blob| {
            let size = blob.descriptor.size;
            // The last chunk may be shorter.
            let local = match blob.state {
                State::Local => size,
                _ => size.min(blob.chunks.set().saturating_mul(CHUNK_BYTES)),
            };
            Progress {
                path: blob.path.clone(),
                size,
                local,
                state: blob.state,
                error: blob.error.clone(),
            }
        };
        shared.blobs.iter().map(progress).collect()
    }

    /// Has all of a blob fetched before all others for which nobody waits.
    pub fn fetch_blob_first(&self, blob: usize) {
        let count = match self.0.lock().blobs.get(blob) {
            Some(blob) if blob.state != State::Local => blob.chunks.count(),
            _ => 0,
        };
        self.fetch_first((0..count).map(|chunk| (blob, chunk)));
    }

    /// Has chunks fetched before all others for which nobody waits.
    pub fn fetch_first(&self, chunks: impl IntoIterator<Item = (usize, u64)>) {
        self.0.lock().first.extend(chunks);
        self.0.work.notify_all();
    }

    /// Whether all of these chunks are here.
    pub fn has(&self, chunks: &[(usize, u64)]) -> bool {
        let shared = self.0.lock();
        chunks.iter().all(|(blob, chunk)| shared.has(*blob, *chunk))
    }

    /// Fetches what is read, and first both ends of each blob, which whoever maps it reads.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn start(&self) -> Result<()> {
        let ends: Vec<_> = {
            let shared = self.0.lock();
            let blobs = shared.blobs.iter().enumerate();
            blobs
                .filter(|(_, blob)| blob.state != State::Local && blob.chunks.count() > 0)
                .flat_map(|(number, blob)| [(number, blob.chunks.count() - 1), (number, 0)])
                .collect()
        };
        self.fetch_first(ends);
        for number in 0..self.0.options.jobs + SPARE {
            let is_spare = number < SPARE;
            self.spawn(move |inner| inner.fetch(is_spare))?;
        }
        for _ in 0..COPIERS {
            self.spawn(|inner| inner.copy())?;
        }
        self.spawn(|inner| inner.watch())
    }

    fn spawn(&self, run: impl FnOnce(&Inner) + Send + 'static) -> Result<()> {
        let inner = self.0.clone();
        let thread = thread::Builder::new().spawn(move || run(&inner));
        thread.map(drop).map_err(|error| {
            Error::new(
                Kind::System,
                self.0.store.path().display(),
                error.to_string(),
            )
        })
    }

    /// The chunks that somebody has read, each with the number of its blob, in the order in which they were read first.
    pub fn trace(&self) -> Vec<(usize, u64)> {
        self.0.lock().trace.clone()
    }

    /// From now on everything that is missing is fetched, too.
    pub fn fetch_all(&self) {
        self.0.lock().background = true;
        self.0.work.notify_all();
    }

    /// Puts on the disk what has come.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn sync(&self) -> Result<()> {
        let parts: Vec<_> = {
            let shared = self.0.lock();
            let parts = shared.blobs.iter().filter_map(|blob| match &blob.place {
                Place::Part(part) => Some(part.clone()),
                _ => None,
            });
            parts.collect()
        };
        parts.iter().try_for_each(|part| part.sync())
    }

    /// What the device's queue hands its reads to.
    pub fn reads(&self) -> impl FnMut(Request) + Send + 'static {
        let inner = self.0.clone();
        move |request| inner.read(request)
    }

    /// What the end of the device is told to.
    pub fn ended(&self) -> impl FnOnce(std::io::Result<()>) + Send + 'static {
        let inner = self.0.clone();
        move |result| inner.tell(Event::Ended(result.err().map(|error| error.to_string())))
    }
}

/// Where a blob can be kept, and what of it is there.
fn find(store: &Store, descriptor: &Descriptor) -> Result<(Place, State, Chunks)> {
    let none = Chunks::none(descriptor.size);
    Ok(match store.scatter(descriptor)? {
        Found::Present => {
            let file = Arc::new(store.open_blob(descriptor)?);
            (Place::Local(file), State::Local, none)
        }
        Found::Elsewhere => (Place::Nowhere, State::Elsewhere, none),
        Found::Scattered(part) => {
            let chunks = part.chunks();
            (Place::Part(Arc::from(part)), State::Fetching, chunks)
        }
    })
}

impl Inner {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: Event) {
        // Nobody listens any more: the process ends.
        let _ = self
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(event);
    }

    /// Takes a read; does not wait.
    fn read(&self, request: Request) {
        let pieces = pieces(&self.layout, request.start, request.bytes);
        if pieces.is_empty() {
            // Behind the end of a blob.
            return match request.write(&vec![0; request.bytes as usize], 0) {
                Ok(()) => request.complete(),
                Err(_) => drop(request),
            };
        }
        let covered: u64 = pieces.iter().map(|piece| piece.bytes).sum();
        if covered < request.bytes.into()
            && request.write(&vec![0; request.bytes as usize], 0).is_err()
        {
            return;
        }
        let read = Arc::new(Read::new(request, pieces.len()));
        let mut shared = self.lock();
        let mut waits = false;
        for piece in pieces {
            let key = (piece.blob, piece.chunk);
            shared.note_read(piece.blob, piece.chunk);
            if shared.has(piece.blob, piece.chunk) {
                shared.ready.push_back((piece, read.clone()));
                continue;
            }
            waits = true;
            let waiting = shared.waiting.entry(key).or_default();
            waiting.push((piece, read.clone()));
            if !shared.blobs[piece.blob].busy.contains(&piece.chunk) {
                shared.wanted.push_back(key);
            }
        }
        if waits {
            shared.last_miss = Some(Instant::now());
            shared.reads.push(read);
            self.work.notify_all();
        }
        self.copy.notify_all();
    }

    /// Copies what is there to who waits for it.
    fn copy(&self) {
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        loop {
            let mut shared = self.lock();
            let (piece, read) = loop {
                match shared.ready.pop_front() {
                    Some(next) => break next,
                    None => {
                        shared = self
                            .copy
                            .wait(shared)
                            .unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            let blob = &shared.blobs[piece.blob];
            let size = blob.descriptor.size;
            let at = chunk_range(piece.chunk, size).0 + piece.from;
            let buffer = &mut buffer[..piece.bytes as usize];
            let result = match &blob.place {
                Place::Local(file) => {
                    let file = file.clone();
                    drop(shared);
                    file.read_exact_at(buffer, at).map_err(|e| e.to_string())
                }
                Place::Part(part) => {
                    let part = part.clone();
                    drop(shared);
                    part.read(buffer, at).map_err(|e| e.to_string())
                }
                Place::Nowhere => {
                    let found = blob.recent.iter().find(|(chunk, _)| *chunk == piece.chunk);
                    let found = found.map(|(_, data)| data.clone());
                    match found {
                        Some(data) => {
                            drop(shared);
                            let from = piece.from as usize;
                            buffer.copy_from_slice(&data[from..from + piece.bytes as usize]);
                            Ok(())
                        }
                        // Gone since.
                        None => {
                            let key = (piece.blob, piece.chunk);
                            shared
                                .waiting
                                .entry(key)
                                .or_default()
                                .push((piece, read.clone()));
                            shared.wanted.push_back(key);
                            shared.reads.push(read);
                            self.work.notify_all();
                            continue;
                        }
                    }
                }
            };
            match result {
                Ok(()) => read.give(&piece, buffer),
                Err(error) => {
                    tracing::error!(%error, blob = piece.blob, at, "what was stored cannot be read");
                    read.fail();
                }
            }
        }
    }

    /// A worker.
    fn fetch(&self, is_spare: bool) {
        loop {
            let mut shared = self.lock();
            let job = loop {
                match shared.next(is_spare) {
                    Some(job) => break job,
                    None => {
                        // A pause ends without a word.
                        let waited = self.work.wait_timeout(shared, STEP);
                        shared = waited.unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
            };
            drop(shared);
            match job {
                Job::Fetch(blob, chunk, count) => self.fetch_chunks(blob, chunk, count),
                Job::Unasked(blob, chunk, count) => {
                    self.fetch_chunks(blob, chunk, count);
                    self.lock().unasked -= 1;
                }
                Job::Finish(blob, part) => self.finish(blob, &part),
            }
        }
    }

    /// A chunk has come.
    pub(crate) fn arrived(&self, number: usize, chunk: u64, data: &[u8]) {
        let part = match &self.lock().blobs[number].place {
            Place::Part(part) => Some(part.clone()),
            _ => None,
        };
        let stored = part.as_ref().map(|part| part.write(chunk, data));
        let mut shared = self.lock();
        let blob = &mut shared.blobs[number];
        blob.busy.remove(&chunk);
        blob.wrong.remove(&chunk);
        match stored {
            Some(Ok(())) => drop(blob.chunks.add(chunk)),
            Some(Err(error)) => {
                tracing::error!(%error, "serving without storing");
                blob.error = Some(error.to_string());
                blob.place = Place::Nowhere;
                blob.state = State::Unstored;
            }
            None => {}
        }
        if matches!(blob.place, Place::Nowhere) {
            blob.recent.push_back((chunk, Arc::new(data.to_vec())));
            if blob.recent.len() > RECENT_CHUNKS {
                blob.recent.pop_front();
            }
        }
        let done = blob.chunks.is_full();
        let waiting = shared.waiting.remove(&(number, chunk));
        drop(shared);
        for (piece, read) in waiting.unwrap_or_default() {
            let from = piece.from as usize;
            match data.get(from..from + piece.bytes as usize) {
                Some(data) => read.give(&piece, data),
                None => drop(read.fail()),
            }
        }
        if done {
            self.work.notify_all();
        }
    }

    /// All of a blob is there.
    fn finish(&self, number: usize, part: &Scattered) {
        let result = part.commit();
        let opened = result.and_then(|()| self.store.open_blob(part.blob()));
        let mut shared = self.lock();
        let blob = &mut shared.blobs[number];
        blob.finishing = false;
        let event = match opened {
            Ok(file) => {
                blob.place = Place::Local(Arc::new(file));
                blob.state = State::Local;
                blob.error = None;
                Event::Complete(number)
            }
            Err(error) => {
                blob.error = Some(error.to_string());
                // What was sent stays to be read, as it was when it was read first. The next pull fetches all of it again.
                part.give_up();
                blob.state = State::Damaged;
                Event::Damaged(number, error)
            }
        };
        drop(shared);
        self.tell(event);
    }

    /// Ends reads that have waited for too long, and looks for blobs that another process has.
    fn watch(&self) {
        loop {
            thread::sleep(STEP);
            let mut shared = self.lock();
            shared.reads.retain(|read| !read.is_answered());
            shared.want_wrong_again();
            self.work.notify_all();
            let late: Vec<_> = match self.options.patience {
                Some(patience) => {
                    let late = shared.reads.iter();
                    late.filter(|read| read.since.elapsed() >= patience)
                        .cloned()
                        .collect()
                }
                None => Vec::new(),
            };
            let elsewhere: Vec<_> = shared
                .blobs
                .iter()
                .enumerate()
                .filter(|(_, blob)| blob.state == State::Elsewhere)
                .map(|(number, blob)| (number, blob.descriptor.clone()))
                .collect();
            drop(shared);
            let failed = late.iter().filter(|read| read.fail()).count();
            if failed > 0 {
                tracing::error!(reads = failed, "nothing came in time: input/output error");
                // Nobody waits for what only they waited for.
                let mut shared = self.lock();
                shared.waiting.retain(|_, waiting| {
                    waiting.retain(|(_, read)| !read.is_answered());
                    !waiting.is_empty()
                });
            }
            for (number, descriptor) in elsewhere {
                self.look_again(number, &descriptor);
            }
        }
    }

    /// Looks whether the process that had a blob has completed it or let go of it.
    fn look_again(&self, number: usize, descriptor: &Descriptor) {
        let (place, state, chunks) = match find(&self.store, descriptor) {
            Ok((_, State::Elsewhere, _)) => return,
            Ok(found) => found,
            Err(error) => {
                self.lock().blobs[number].error = Some(error.to_string());
                return;
            }
        };
        let mut shared = self.lock();
        let blob = &mut shared.blobs[number];
        (blob.place, blob.state, blob.chunks) = (place, state, chunks);
        blob.recent.clear();
        drop(shared);
        self.work.notify_all();
        if state == State::Local {
            self.tell(Event::Complete(number));
        }
    }
}
