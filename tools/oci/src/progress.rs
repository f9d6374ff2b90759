// SPDX-License-Identifier: GPL-2.0

//! What a transfer tells about itself while it runs.

use std::time::Duration;

use crate::digest::Digest;

/// Something happened to a blob.
#[derive(Debug)]
pub enum Event<'a> {
    /// Its transfer begins.
    Started {
        /// Bytes of it.
        size: u64,
    },
    /// This many of its bytes are there, more or fewer than before.
    At(u64),
    /// Nothing happens for a time.
    Waiting {
        /// The time.
        time: Duration,
        /// Why.
        why: &'a str,
    },
    /// Another process transfers it.
    Elsewhere,
    /// It is there now, by a transfer.
    Done,
    /// It is there, and was before.
    Present,
    /// The registry took it from another of its repositories.
    Mounted {
        /// The repository.
        from: &'a str,
    },
}

/// Hears of a transfer, from several threads.
pub trait Progress: Sync {
    /// `event` happened to `blob`.
    fn event(&self, blob: &Digest, event: Event<'_>);
}

/// Hears nothing.
pub struct NoProgress;

impl Progress for NoProgress {
    fn event(&self, _blob: &Digest, _event: Event<'_>) {}
}
