// SPDX-License-Identifier: GPL-2.0

//! The raw image or block device that a layer is made from.

use std::{fs::Metadata, os::unix::fs::MetadataExt, path::Path};

use rustix::{fs::SeekFrom, io::Errno};

use crate::{
    error::{Error, Result},
    file_range::FileRange,
    stack::WINDOW_BYTES,
};

/// An open raw image.
pub struct RawSource {
    input: FileRange,
    before: Metadata,
}

impl RawSource {
    /// Opens `path`.
    ///
    /// # Errors
    ///
    /// Those of [`FileRange::open`].
    pub fn open(path: &Path) -> Result<Self> {
        let input = FileRange::open(path)?;
        let before = metadata(&input)?;
        Ok(Self { input, before })
    }

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.input.bytes()
    }

    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    ///
    /// Those of [`FileRange::read`].
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.input.read(buffer, offset)
    }

    /// The numbers of the windows in which the file is not a hole, in order.
    pub fn windows(&self) -> impl Iterator<Item = u64> + Send + '_ {
        DataWindows {
            source: self,
            next: 0,
            end: 0,
        }
    }

    /// Checks that the file is the one that was opened.
    ///
    /// # Errors
    ///
    /// Its size or its times changed.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = metadata(&self.input)?;
        let state = |m: &Metadata| (m.size(), m.mtime(), m.mtime_nsec());
        if state(&now) != state(&self.before) {
            return Err(Error::new(self.input.path(), "changed while it was read"));
        }
        Ok(())
    }
}

fn metadata(input: &FileRange) -> Result<Metadata> {
    input
        .file()
        .metadata()
        .map_err(|e| Error::io(input.path(), "look up", e))
}

/// Windows that hold data, as the filesystem tells: one extent at a time.
struct DataWindows<'a> {
    source: &'a RawSource,
    /// The next window, inside the extent if it is below `end`.
    next: u64,
    /// First window after the extent.
    end: u64,
}

impl DataWindows<'_> {
    /// Finds the next extent of data. Where the system cannot tell, all that follows is data.
    fn find(&mut self) -> Option<()> {
        let bytes = self.source.bytes();
        let from = self.next.checked_mul(WINDOW_BYTES)?;
        if from >= bytes {
            return None;
        }
        let seek = |whence| rustix::fs::seek(self.source.input.file(), whence);
        let (data, hole) = match seek(SeekFrom::Data(from)) {
            Ok(data) => (data, seek(SeekFrom::Hole(data)).unwrap_or(bytes)),
            Err(Errno::NXIO) => return None,
            Err(_) => (from, bytes),
        };
        let hole = hole.min(bytes);
        if data >= hole {
            return None;
        }
        self.next = self.next.max(data / WINDOW_BYTES);
        self.end = hole.div_ceil(WINDOW_BYTES);
        Some(())
    }
}

impl Iterator for DataWindows<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.next >= self.end {
            self.find()?;
        }
        let window = self.next;
        self.next += 1;
        Some(window)
    }
}
