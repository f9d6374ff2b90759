// SPDX-License-Identifier: GPL-2.0

//! Notes about uploads, in the store: where a later process can go on. Who has the note of a blob is the only one that
//! sends it.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest, document::Descriptor, ingest::lock_exclusive, store::Store, url::Url, Reference,
};

/// How long an upload that was left can be gone on with, in seconds.
const AGE: u64 = 3600;
/// Most bytes of a note.
const MAX_BYTES: u64 = 1 << 16;

/// The note of an upload, locked until it is dropped.
pub(crate) struct Note {
    store: Store,
    name: String,
    file: File,
}

/// What stands in it. A location may hold a secret: only the owner can read the file.
#[derive(Serialize, Deserialize)]
struct Content {
    location: String,
    time: u64,
}

impl Note {
    /// The note of the upload of a blob to a repository. Waits while another process has it; `waiting` hears of that.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn take(
        store: &Store,
        repository: &Reference,
        blob: &Descriptor,
        waiting: impl FnOnce(),
    ) -> io::Result<Self> {
        let repository = Digest::of(repository.name().as_bytes());
        let name = format!(
            "upload-{}-{}.json",
            &repository.hex()[..16],
            blob.digest.hex()
        );
        let flags = OFlags::CREATE | OFlags::RDWR;
        let file =
            store.open_beneath(&format!("ingest/{name}"), flags, Mode::from_raw_mode(0o600))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            lock_exclusive(&file)?;
        }
        Ok(Self {
            store: store.clone(),
            name,
            file,
        })
    }

    /// Where an upload was left, if it is not too long ago.
    pub fn location(&self) -> Option<Url> {
        let mut text = Vec::new();
        (&self.file).seek(SeekFrom::Start(0)).ok()?;
        (&self.file).take(MAX_BYTES).read_to_end(&mut text).ok()?;
        let content: Content = serde_json::from_slice(&text).ok()?;
        let is_young = now().saturating_sub(content.time) < AGE;
        Url::parse(&content.location).filter(|_| is_young)
    }

    /// Writes down where the upload can be gone on with. It is no loss if that fails.
    pub fn write(&self, location: &Url) {
        let content = Content {
            location: location.whole(),
            time: now(),
        };
        let write = || -> io::Result<()> {
            let mut file = &self.file;
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&serde_json::to_vec(&content)?)
        };
        if let Err(error) = write() {
            tracing::debug!(%error, name = self.name, "cannot remember the upload");
        }
    }

    /// Removes it: there is nothing to go on with.
    pub fn remove(self) {
        // What is left is too old some day.
        self.store.remove("ingest", &self.name).ok();
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}
