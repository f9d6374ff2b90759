// SPDX-License-Identifier: GPL-2.0

//! A blob that arrives in any order, chunk by chunk, while some of it is used already.
//!
//! ```text
//! ingest/<algorithm>-<hex>.chunks   the bytes, at their places
//! ingest/<algorithm>-<hex>.map      which of them are on the disk
//! ```
//!
//! The map has a chunk only when that is on the disk. What it does not have is fetched again, whatever the file holds
//! there: a hole and zeros look the same.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::{
    digest::{Algorithm, Digest, Hasher},
    document::Descriptor,
    error::{Error, Kind, Result},
    store::Store,
};

/// Bytes of a chunk: what one request for a few bytes fetches.
pub const CHUNK_BYTES: u64 = 256 << 10;

/// Begins a map.
const MAGIC: &[u8; 8] = b"ovbdmap\x01";
/// Magic, bytes of a chunk, bytes of the blob, and a digest of the whole map at its end.
const MAP_HEAD: usize = 24;
const MAP_TAIL: usize = 32;
/// Bytes that are read at once to hash the blob.
const BUFFER_BYTES: usize = 1 << 20;
/// Chunks that are written before the map is.
const SYNC_CHUNKS: u64 = 64;

/// What [`Store::scatter`] finds.
pub enum Found {
    /// All of the blob is in the store.
    Present,
    /// Another process writes it.
    Elsewhere,
    /// It is to be written.
    Scattered(Box<Scattered>),
}

/// A set of the chunks of a blob.
///
/// # Invariants
///
/// `words` has a bit for each of the `count` chunks; bits after those are not set, and `set` is the number of those that are.
#[derive(Clone, Debug)]
pub struct Chunks {
    words: Vec<u64>,
    count: u64,
    set: u64,
}

impl Chunks {
    /// None of the chunks of a blob of `bytes`.
    pub fn none(bytes: u64) -> Self {
        let count = bytes.div_ceil(CHUNK_BYTES);
        Self {
            words: vec![0; count.div_ceil(64) as usize],
            count,
            set: 0,
        }
    }

    /// How many chunks the blob has.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many of them are in the set.
    pub fn set(&self) -> u64 {
        self.set
    }

    /// Whether all are.
    pub fn is_full(&self) -> bool {
        self.set == self.count
    }

    /// Whether one is.
    pub fn has(&self, chunk: u64) -> bool {
        let word = self.words.get((chunk / 64) as usize);
        word.is_some_and(|word| (word >> (chunk % 64)) & 1 == 1)
    }

    /// Adds one; returns whether it is new.
    pub fn add(&mut self, chunk: u64) -> bool {
        if chunk >= self.count || self.has(chunk) {
            return false;
        }
        if let Some(word) = self.words.get_mut((chunk / 64) as usize) {
            *word |= 1 << (chunk % 64);
            self.set += 1;
        }
        true
    }

    /// The first chunk from `from` on that is missing.
    pub fn first_missing(&self, from: u64) -> Option<u64> {
        let mut chunk = from;
        while chunk < self.count {
            let word = self.words.get((chunk / 64) as usize)? >> (chunk % 64);
            let there = u64::from(word.trailing_ones());
            // As far as this word goes.
            let left = 64 - chunk % 64;
            if there < left {
                return Some(chunk + there).filter(|chunk| *chunk < self.count);
            }
            chunk += left;
        }
        None
    }
}

/// The place of a chunk in a blob of `bytes`: first byte and bytes.
pub fn chunk_range(chunk: u64, bytes: u64) -> (u64, u64) {
    let start = chunk.saturating_mul(CHUNK_BYTES).min(bytes);
    (start, CHUNK_BYTES.min(bytes - start))
}

/// The part of a blob that is there. Several threads may use it at once; one process has it.
pub struct Scattered {
    store: Store,
    blob: Descriptor,
    name: String,
    data: File,
    state: Mutex<State>,
    syncing: Mutex<()>,
    _lock: File,
}

struct State {
    /// Those that were written.
    written: Chunks,
    /// Those of them that the map has on the disk.
    mapped: u64,
    /// There is to be no map.
    given_up: bool,
}

impl Store {
    /// Begins or continues to write a blob in any order. Does not wait.
    ///
    /// # Errors
    ///
    /// The system's, and a blob of this digest that has another size.
    pub fn scatter(&self, blob: &Descriptor) -> Result<Found> {
        if self.has_blob(blob)? {
            return Ok(Found::Present);
        }
        let name = format!("{}-{}", blob.digest.algorithm().name(), blob.digest.hex());
        // That of who fetches it from front to back, too.
        let lock = self.lock_file(&format!("ingest/{name}.lock"))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Found::Elsewhere),
            Err(error) => return Err(self.fail("lock", &name, error.into())),
        }
        if self.has_blob(blob)? {
            return Ok(Found::Present);
        }
        let path = format!("ingest/{name}.chunks");
        let fail = |error| self.fail("open", &path, error);
        let flags = OFlags::CREATE | OFlags::RDWR;
        let data = self
            .open_beneath(&path, flags, Mode::from_raw_mode(0o600))
            .map_err(fail)?;
        let whole = data.metadata().map_err(fail)?.len() == blob.size;
        let written = match whole {
            true => self.read_map(&name, blob.size),
            false => None,
        };
        if written.is_none() {
            // A map of what is not there any more must not be believed.
            match self.remove("ingest", &format!("{name}.map")) {
                Err(error) if self.path().join(format!("ingest/{name}.map")).exists() => {
                    return Err(error)
                }
                _ => {}
            }
            data.set_len(blob.size).map_err(fail)?;
        }
        let written = written.unwrap_or_else(|| Chunks::none(blob.size));
        Ok(Found::Scattered(Box::new(Scattered {
            store: self.clone(),
            blob: blob.clone(),
            name,
            data,
            state: Mutex::new(State {
                mapped: written.set(),
                written,
                given_up: false,
            }),
            syncing: Mutex::default(),
            _lock: lock,
        })))
    }

    /// The map of a blob of `size` bytes; nothing where there is none that is right.
    fn read_map(&self, name: &str, size: u64) -> Option<Chunks> {
        let mut chunks = Chunks::none(size);
        let bytes = MAP_HEAD + 8 * chunks.words.len() + MAP_TAIL;
        let map = self
            .read_file(&format!("ingest/{name}.map"), bytes as u64)
            .ok()?;
        let (content, digest) = map.split_at_checked(bytes - MAP_TAIL)?;
        let right = content.starts_with(&map_head(size)) && checksum(content) == digest;
        if !right {
            return None;
        }
        let words = content.get(MAP_HEAD..)?.chunks_exact(8);
        let mut found = words.map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        for (number, word) in (0_u64..).zip(chunks.words.clone().iter().map(|_| found.next())) {
            let word = word?;
            for bit in (0..64).filter(|bit| (word >> bit) & 1 == 1) {
                chunks.add(64 * number + bit);
            }
        }
        Some(chunks)
    }
}

fn map_head(size: u64) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(CHUNK_BYTES.to_le_bytes());
    head.extend(size.to_le_bytes());
    head
}

fn checksum(content: &[u8]) -> Vec<u8> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(content);
    hex_bytes(hasher.finish().hex())
}

/// The bytes that hexadecimal digits stand for.
fn hex_bytes(digits: &str) -> Vec<u8> {
    (0..digits.len() / 2)
        .filter_map(|at| u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok())
        .collect()
}

impl Scattered {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, action: &str, error: io::Error) -> Error {
        self.store
            .fail(action, &format!("ingest/{}.chunks", self.name), error)
    }

    /// What is to be written.
    pub fn blob(&self) -> &Descriptor {
        &self.blob
    }

    /// The chunks that are there.
    pub fn chunks(&self) -> Chunks {
        self.state().written.clone()
    }

    /// Writes a chunk, all of it. It may be read from now on; it stays from the next [`Scattered::sync`] on.
    ///
    /// # Errors
    ///
    /// The system's; bytes that are more or fewer.
    pub fn write(&self, chunk: u64, bytes: &[u8]) -> Result<()> {
        let (start, length) = chunk_range(chunk, self.blob.size);
        if bytes.len() as u64 != length {
            return Err(Error::invalid(&self.blob.digest, "a chunk of another size"));
        }
        self.data
            .write_all_at(bytes, start)
            .map_err(|error| self.fail("write", error))?;
        let mut state = self.state();
        state.written.add(chunk);
        let due = state.written.set() - state.mapped >= SYNC_CHUNKS;
        drop(state);
        match due {
            true => self.sync(),
            false => Ok(()),
        }
    }

    /// Reads what is there.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        self.data
            .read_exact_at(buffer, at)
            .map_err(|error| self.fail("read", error))
    }

    /// Puts what was written on the disk, so that the next process need not fetch it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn sync(&self) -> Result<()> {
        let _turn = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.chunks();
        let state = self.state();
        if state.given_up || written.set() == state.mapped {
            return Ok(());
        }
        drop(state);
        self.data
            .sync_data()
            .map_err(|error| self.fail("write", error))?;
        let mut map = map_head(self.blob.size);
        map.extend(written.words.iter().flat_map(|word| word.to_le_bytes()));
        let sum = checksum(&map);
        map.extend(sum);
        self.write_map(&map).map_err(|error| {
            self.store
                .fail("write", &format!("ingest/{}.map", self.name), error)
        })?;
        let mut state = self.state();
        state.mapped = state.mapped.max(written.set());
        Ok(())
    }

    fn write_map(&self, map: &[u8]) -> io::Result<()> {
        let (name, new) = (
            format!("{}.map", self.name),
            format!("{}.map.part", self.name),
        );
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY;
        let file =
            self.store
                .open_beneath(&format!("ingest/{new}"), flags, Mode::from_raw_mode(0o600))?;
        file.write_all_at(map, 0)?;
        file.sync_all()?;
        let folder = self.store.folder("ingest")?;
        rustix::fs::renameat(&folder, new.as_str(), &folder, name.as_str())?;
        folder.sync_all()
    }

    /// Puts the blob into the store, all of whose chunks are there.
    ///
    /// # Errors
    ///
    /// The system's, and bytes that are not those of the digest: all of them stay as they are, and are known to be wrong by
    /// [`Kind::Invalid`].
    pub fn commit(&self) -> Result<()> {
        if !self.state().written.is_full() {
            return Err(Error::invalid(&self.blob.digest, "not all of it is there"));
        }
        let fail = |error| self.fail("read", error);
        let mut hasher = Hasher::new(self.blob.digest.algorithm());
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut at = 0;
        while at < self.blob.size {
            let length = buffer.len().min((self.blob.size - at) as usize);
            self.data
                .read_exact_at(&mut buffer[..length], at)
                .map_err(fail)?;
            hasher.update(&buffer[..length]);
            at += length as u64;
        }
        let found: Digest = hasher.finish();
        if found != self.blob.digest {
            let what = format!("the {at} bytes that were sent as this have the digest {found}");
            return Err(Error::new(Kind::Invalid, &self.blob.digest, what));
        }
        self.store
            .put_in_place(
                &self.data,
                &format!("{}.chunks", self.name),
                &self.blob.digest,
            )
            .map_err(|error| self.fail("put into the store", error))?;
        // What is left of it helps nobody.
        self.give_up();
        Ok(())
    }

    /// Makes the next process fetch all of it again.
    pub fn give_up(&self) {
        let _turn = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.state().given_up = true;
        if let Err(error) = self.store.remove("ingest", &format!("{}.map", self.name)) {
            tracing::debug!(%error, "the map stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    fn blob(bytes: &[u8]) -> Descriptor {
        Descriptor::new("application/x", Digest::of(bytes), bytes.len() as u64)
    }

    fn scattered(store: &Store, blob: &Descriptor) -> Box<Scattered> {
        match store.scatter(blob).unwrap() {
            Found::Scattered(part) => part,
            _ => panic!("there already"),
        }
    }

    fn content() -> Vec<u8> {
        let bytes = 3 * CHUNK_BYTES + 777;
        (0..bytes).map(|at| ((at * 31) >> 7) as u8).collect()
    }

    fn chunk(bytes: &[u8], number: u64) -> &[u8] {
        let (start, length) = chunk_range(number, bytes.len() as u64);
        &bytes[start as usize..(start + length) as usize]
    }

    #[test]
    fn chunks_are_counted_and_found() {
        let mut chunks = Chunks::none(200 * CHUNK_BYTES + 1);
        assert_eq!((chunks.count(), chunks.first_missing(0)), (201, Some(0)));
        for number in (0..201).filter(|number| ![3, 63, 64, 200].contains(number)) {
            assert!(chunks.add(number));
            assert!(!chunks.add(number));
        }
        assert_eq!(chunks.first_missing(0), Some(3));
        assert_eq!(chunks.first_missing(4), Some(63));
        assert_eq!(chunks.first_missing(64), Some(64));
        assert_eq!(chunks.first_missing(65), Some(200));
        assert_eq!(chunks.first_missing(201), None);
        assert!(!chunks.add(201));
        [3, 63, 64, 200].map(|number| chunks.add(number));
        assert!(chunks.is_full());
        assert_eq!(chunks.first_missing(0), None);
    }

    #[test]
    fn what_is_on_the_disk_stays_and_what_is_not_is_fetched_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path()).unwrap();
        let bytes = content();
        let blob = blob(&bytes);
        let part = scattered(&store, &blob);
        assert!(matches!(store.scatter(&blob).unwrap(), Found::Elsewhere));
        part.write(2, chunk(&bytes, 2)).unwrap();
        part.write(3, chunk(&bytes, 3)).unwrap();
        part.sync().unwrap();
        part.write(0, chunk(&bytes, 0)).unwrap();
        assert!(part.write(1, chunk(&bytes, 3)).is_err());
        assert!(part.commit().is_err());
        let mut found = vec![0; 777];
        part.read(&mut found, 3 * CHUNK_BYTES).unwrap();
        assert_eq!(found, chunk(&bytes, 3));
        // As after kill -9: nobody has told the map of chunk 0.
        drop(part);
        let part = scattered(&store, &blob);
        let there = part.chunks();
        assert_eq!(
            [0, 1, 2, 3].map(|number| there.has(number)),
            [false, false, true, true]
        );
        part.write(0, chunk(&bytes, 0)).unwrap();
        part.write(1, chunk(&bytes, 1)).unwrap();
        part.commit().unwrap();
        assert_eq!(std::fs::read(store.blob_path(&blob.digest)).unwrap(), bytes);
        assert!(matches!(store.scatter(&blob).unwrap(), Found::Present));
        let left: Vec<_> = std::fs::read_dir(folder.path().join("ingest"))
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| !name.to_string_lossy().ends_with(".lock"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn a_map_that_is_not_right_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path()).unwrap();
        let bytes = content();
        let blob = blob(&bytes);
        let name = format!("{}-{}", Algorithm::Sha256.name(), blob.digest.hex());
        let map = folder.path().join(format!("ingest/{name}.map"));
        let data = folder.path().join(format!("ingest/{name}.chunks"));
        let write = || {
            let part = scattered(&store, &blob);
            part.write(1, chunk(&bytes, 1)).unwrap();
            part.sync().unwrap();
        };
        let there = || scattered(&store, &blob).chunks().set();
        write();
        assert_eq!(there(), 1);
        let right = std::fs::read(&map).unwrap();
        for at in 0..right.len() {
            let mut wrong = right.clone();
            wrong[at] ^= 1;
            std::fs::write(&map, wrong).unwrap();
            assert_eq!(there(), 0, "byte {at}");
            write();
        }
        std::fs::write(&map, &right[1..]).unwrap();
        assert_eq!(there(), 0);
        write();
        std::fs::write(&data, b"").unwrap();
        assert_eq!(there(), 0);
    }

    #[test]
    fn wrong_bytes_get_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path()).unwrap();
        let bytes = content();
        let blob = blob(&bytes);
        let part = scattered(&store, &blob);
        for number in 0..4 {
            let mut piece = chunk(&bytes, number).to_vec();
            piece[0] ^= u8::from(number == 2);
            part.write(number, &piece).unwrap();
        }
        assert_eq!(part.commit().unwrap_err().kind(), Kind::Invalid);
        assert!(!store.blob_path(&blob.digest).exists());
        part.give_up();
        part.write(1, chunk(&bytes, 1)).unwrap();
        part.sync().unwrap();
        drop(part);
        assert_eq!(scattered(&store, &blob).chunks().set(), 0);
    }
}
