// SPDX-License-Identifier: GPL-2.0

//! What has happened since the target was constructed.

use super::device_mapper::StatusWriter;
use core::fmt::{
    self,
    Write, //
};
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// A number that only grows.
pub(super) struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
    /// Adds `count`.
    #[inline]
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// The present value.
    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The counters of a target, in the order of the status line.
#[derive(Default)]
pub(super) struct Counters {
    /// Blocks that were decompressed.
    pub(super) decompressed: Counter,
    /// Parts of blocks that came from the cache.
    pub(super) cache_hits: Counter,
    /// Blocks with a wrong CRC.
    pub(super) crc_errors: Counter,
    /// Blocks that did not decompress to their length.
    pub(super) decode_errors: Counter,
    /// Reads of the lower device that failed.
    pub(super) read_errors: Counter,
}

impl Counters {
    /// Writes the values.
    pub(super) fn write(&self, out: &mut StatusWriter<'_>) -> fmt::Result {
        write!(
            out,
            "{} {} {} {} {}",
            self.decompressed.get(),
            self.cache_hits.get(),
            self.crc_errors.get(),
            self.decode_errors.get(),
            self.read_errors.get()
        )
    }

    /// Writes the values with their names.
    pub(super) fn describe(&self, out: &mut StatusWriter<'_>) -> fmt::Result {
        write!(
            out,
            "decompressed={} cache_hits={} crc_errors={} decode_errors={} read_errors={}",
            self.decompressed.get(),
            self.cache_hits.get(),
            self.crc_errors.get(),
            self.decode_errors.get(),
            self.read_errors.get()
        )
    }
}
