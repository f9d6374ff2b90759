// SPDX-License-Identifier: GPL-2.0

//! How a blob enters a store: written to a part under another name, and renamed when size and digest are right and it is on
//! the disk. A part stays when its writer ends, and the next one goes on with it.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, sync::Arc};

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::{
    blob::{BlobSource, FilePart},
    digest::{Digest, Hasher},
    direct_file::DirectFile,
    document::Descriptor,
    error::{Error, Result},
    store::Store,
};

/// Bytes that are read at once to hash what is there.
const BUFFER_BYTES: usize = 256 << 10;

/// What [`Store::ingest`] finds.
pub enum Ingested {
    /// The blob is in the store.
    Present,
    /// It is to be written.
    Part(Box<Ingest>),
}

/// The part of a blob that is not in the store yet. One process at a time has it. What it has stays for the next one when it
/// is dropped; of what a process that is killed has, the last MiB may be lost.
///
/// # Invariants
///
/// `hasher` has all bytes that were given to `part`.
pub struct Ingest {
    store: Store,
    blob: Descriptor,
    name: String,
    part: DirectFile,
    hasher: Hasher,
    _lock: File,
}

impl Store {
    /// Begins or continues to write a blob. Waits while another process does; `waiting` hears of it.
    ///
    /// # Errors
    ///
    /// The system's, and a blob of this digest that has another size.
    pub fn ingest(&self, blob: &Descriptor, waiting: impl FnOnce()) -> Result<Ingested> {
        if self.has_blob(blob)? {
            return Ok(Ingested::Present);
        }
        let name = format!("{}-{}", blob.digest.algorithm().name(), blob.digest.hex());
        let lock = self.lock_file(&format!("ingest/{name}.lock"))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            lock_exclusive(&lock).map_err(|error| self.fail("lock", "ingest", error))?;
        }
        if self.has_blob(blob)? {
            return Ok(Ingested::Present);
        }
        let part_name = format!("{name}.part");
        let path = format!("ingest/{part_name}");
        let flags = OFlags::CREATE | OFlags::RDWR;
        let part = self
            .open_beneath(&path, flags, Mode::from_raw_mode(0o600))
            .map_err(|error| self.fail("open", &path, error))?;
        let fail = |action, error| self.fail(action, &path, error);
        let (have, hasher) = resume(&part, blob).map_err(|error| fail("go on with", error))?;
        let part = DirectFile::new(part, have, blob.size).map_err(|error| fail("read", error))?;
        // INVARIANT: All that is there was hashed.
        Ok(Ingested::Part(Box::new(Ingest {
            store: self.clone(),
            blob: blob.clone(),
            name: part_name,
            part,
            hasher,
            _lock: lock,
        })))
    }

    /// Gives `part`, the file `name` of the folder `ingest`, the name of the blob that it is, when it is on the disk.
    pub(crate) fn put_in_place(&self, part: &File, name: &str, digest: &Digest) -> io::Result<()> {
        let folder = format!("blobs/{}", digest.algorithm().name());
        self.move_synced(part, name, &folder, digest.hex())
    }

    /// Makes `part`, the file `name` of the folder `ingest`, the file `called` of `folder`, when it is on the disk.
    pub(crate) fn move_synced(
        &self,
        part: &File,
        name: &str,
        folder: &str,
        called: &str,
    ) -> io::Result<()> {
        part.sync_all()?;
        let from = self.folder("ingest")?;
        let to = self.folder(folder)?;
        rustix::fs::renameat(&from, name, &to, called)?;
        // Only now: a part that cannot be written to could not be gone on with.
        part.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
        to.sync_all()
    }

    /// Path of the file `name` beside the parts of transfers, where a program may make what is to be a blob. Nobody sweeps
    /// it: it is there when it is complete, and may be all that there is of something.
    pub fn new_blob_path(&self, name: &str) -> PathBuf {
        self.path().join("ingest").join(name)
    }

    /// Makes a blob of such a file, without copying it; None if it is not there.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn take(&self, name: &str) -> Result<Option<Digest>> {
        let path = format!("ingest/{name}");
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let file = match self.open_beneath(&path, flags, Mode::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| self.fail("open", &path, error))?,
        };
        let take = || -> io::Result<Digest> {
            let part = FilePart::new(Arc::new(file.try_clone()?), 0, file.metadata()?.len());
            let (digest, _) = (&part as &dyn BlobSource).digests(|_| ())?;
            self.put_in_place(&file, name, &digest)?;
            Ok(digest)
        };
        let taken = take().map_err(|error| self.fail("put into the store", &path, error))?;
        Ok(Some(taken))
    }

    /// Puts `bytes`, described by `blob`, into the store.
    ///
    /// # Errors
    ///
    /// The system's, and bytes that are not as described.
    pub fn put(&self, blob: &Descriptor, bytes: &[u8]) -> Result<()> {
        match self.ingest(blob, || ())? {
            Ingested::Present => Ok(()),
            Ingested::Part(mut part) => {
                part.restart()?;
                part.write(bytes)?;
                part.commit()
            }
        }
    }
}

pub(crate) fn lock_exclusive(file: &File) -> io::Result<()> {
    loop {
        match rustix::fs::flock(file, FlockOperation::LockExclusive) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

/// Hashes what an earlier process has left, which goes where it cannot be right; returns how much it is.
fn resume(part: &File, blob: &Descriptor) -> io::Result<(u64, Hasher)> {
    let mut hasher = Hasher::new(blob.digest.algorithm());
    let there = part.metadata()?.len();
    if there > blob.size {
        part.set_len(0)?;
        return Ok((0, hasher));
    }
    let mut buffer = vec![0; BUFFER_BYTES.min(there as usize)];
    let mut have = 0;
    while have < there {
        let length = buffer.len().min((there - have) as usize);
        let count = part.read_at(&mut buffer[..length], have)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        have += count as u64;
    }
    Ok((have, hasher))
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // Only to save the next one some work.
        if let Err(error) = self.part.flush() {
            tracing::debug!(%error, name = self.name, "not all of it stays");
        }
    }
}

impl Ingest {
    fn fail(&self, action: &str, error: io::Error) -> Error {
        self.store
            .fail(action, &format!("ingest/{}", self.name), error)
    }

    /// What is to be written.
    pub fn blob(&self) -> &Descriptor {
        &self.blob
    }

    /// Bytes that are there.
    pub fn have(&self) -> u64 {
        self.part.position()
    }

    /// Forgets what is there.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn restart(&mut self) -> Result<()> {
        self.part
            .clear()
            .map_err(|error| self.fail("empty", error))?;
        // INVARIANT: Both have nothing.
        self.hasher = Hasher::new(self.blob.digest.algorithm());
        Ok(())
    }

    /// Where to put the next bytes: at least one, and at most one more than the blob has.
    ///
    /// # Errors
    ///
    /// The system's, of writing those before.
    pub fn space(&mut self) -> Result<&mut [u8]> {
        let left = self.blob.size - self.have();
        let (store, name) = (&self.store, &self.name);
        let space = self.part.space();
        let space = space.map_err(|error| store.fail("write", &format!("ingest/{name}"), error))?;
        let most = usize::try_from(left)
            .map_or(space.len(), |left| left.saturating_add(1).min(space.len()));
        Ok(&mut space[..most])
    }

    /// The first `count` bytes of the space are those that follow.
    ///
    /// # Errors
    ///
    /// More bytes than the blob has: none of them is taken.
    pub fn advance(&mut self, count: usize) -> Result<()> {
        if count as u64 > self.blob.size - self.have() {
            return Err(Error::invalid(
                &self.blob.digest,
                format!(
                    "longer than the {} bytes that the manifest says",
                    self.blob.size
                ),
            ));
        }
        // INVARIANT: Both get the same.
        self.hasher.update(self.part.advance(count));
        Ok(())
    }

    /// Adds `bytes`.
    ///
    /// # Errors
    ///
    /// The system's, and more bytes than the blob has.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let space = self.space()?;
            let count = space.len().min(bytes.len());
            space[..count].copy_from_slice(&bytes[..count]);
            self.advance(count)?;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    /// The digest of what is there.
    pub fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }

    /// Puts the complete blob into the store, where it has its name at last.
    ///
    /// # Errors
    ///
    /// The system's, and bytes that are not those of the digest.
    pub fn commit(mut self) -> Result<()> {
        let have = self.have();
        if have != self.blob.size {
            let what = format!("{have} bytes, and the manifest says {}", self.blob.size);
            return Err(Error::invalid(&self.blob.digest, what));
        }
        let found = self.digest();
        if found != self.blob.digest {
            return Err(Error::invalid(
                &self.blob.digest,
                format!("its {have} bytes have the digest {found}"),
            ));
        }
        let mut finish = || -> io::Result<()> {
            self.part.flush()?;
            self.store
                .put_in_place(self.part.file(), &self.name, &self.blob.digest)
        };
        finish().map_err(|error| {
            self.store.fail(
                "put into the store",
                &format!("ingest/{}", self.name),
                error,
            )
        })
    }

    /// Removes the part.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn discard(self) -> Result<()> {
        self.store.remove("ingest", &self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(store: &Store, blob: &Descriptor) -> Box<Ingest> {
        match store.ingest(blob, || ()).unwrap() {
            Ingested::Part(part) => part,
            Ingested::Present => panic!("present"),
        }
    }

    #[test]
    fn nothing_unverified_gets_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path()).unwrap();
        let blob = Descriptor::of("x", b"0123456789");
        let mut short = part(&store, &blob);
        short.write(b"01234").unwrap();
        assert!(short.commit().is_err());
        // The next one goes on, and is stopped at one byte too many.
        let mut rest = part(&store, &blob);
        assert_eq!(rest.have(), 5);
        assert!(rest.write(b"567890").is_err());
        rest.write(b"5678X").unwrap();
        assert!(rest
            .commit()
            .unwrap_err()
            .what()
            .contains("have the digest"));
        assert!(!store.has_blob(&blob).unwrap());
        let mut wrong = part(&store, &blob);
        wrong.restart().unwrap();
        wrong.write(b"0123456789").unwrap();
        wrong.commit().unwrap();
        assert!(store.has_blob(&blob).unwrap());
        assert!(matches!(
            store.ingest(&blob, || ()).unwrap(),
            Ingested::Present
        ));
        let other_size = Descriptor { size: 9, ..blob };
        assert!(store.ingest(&other_size, || ()).is_err());
    }

    #[test]
    fn one_writes_and_the_others_wait() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path()).unwrap();
        let bytes = vec![7; 100_000];
        let blob = Descriptor::of("x", &bytes);
        let written = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    if let Ingested::Part(mut part) = store.ingest(&blob, || ()).unwrap() {
                        written.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        part.write(&bytes).unwrap();
                        part.commit().unwrap();
                    }
                });
            }
        });
        assert_eq!(written.into_inner(), 1);
    }
}
