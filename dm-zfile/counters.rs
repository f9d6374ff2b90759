// SPDX-License-Identifier: GPL-2.0

//! What has happened since the target was constructed.

use super::{
    device_mapper::StatusWriter,
    lower_read, //
};
use core::fmt::{
    self,
    Write, //
};
use kernel::prelude::*;

/// What is counted.
#[derive(Clone, Copy)]
pub(super) enum Count {
    /// Blocks that were decompressed.
    Decompressed,
    /// Parts of blocks that came from the cache.
    CacheHits,
    /// Blocks with a wrong CRC.
    CrcErrors,
    /// Blocks that did not decompress to their length.
    DecodeErrors,
    /// Reads of the lower device that failed.
    ReadErrors,
}

/// All of them with their names, in the order of the status line.
const ALL: [(Count, &str); 5] = [
    (Count::Decompressed, "decompressed"),
    (Count::CacheHits, "cache_hits"),
    (Count::CrcErrors, "crc_errors"),
    (Count::DecodeErrors, "decode_errors"),
    (Count::ReadErrors, "read_errors"),
];

/// The counters of a target.
pub(super) struct Counters(lower_read::Counters<{ ALL.len() }>);

impl Counters {
    /// Nothing has happened yet.
    pub(super) fn new() -> Result<Self> {
        Ok(Self(lower_read::Counters::new()?))
    }

    /// Adds `count`.
    #[inline]
    pub(super) fn add(&self, what: Count, count: u64) {
        self.0.add(what as usize, count);
    }

    /// Writes the values.
    pub(super) fn write(&self, out: &mut StatusWriter<'_>) -> fmt::Result {
        for (number, (what, _)) in ALL.iter().enumerate() {
            let space = if number == 0 { "" } else { " " };
            write!(out, "{space}{}", self.0.get(*what as usize))?;
        }
        Ok(())
    }

    /// Writes the values with their names.
    pub(super) fn describe(&self, out: &mut StatusWriter<'_>) -> fmt::Result {
        for (number, (what, name)) in ALL.iter().enumerate() {
            let space = if number == 0 { "" } else { " " };
            write!(out, "{space}{name}={}", self.0.get(*what as usize))?;
        }
        Ok(())
    }
}
