// SPDX-License-Identifier: GPL-2.0

//! A file that is read at given positions: a regular file or a block device, or the part of it that a
//! wrapper leaves.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::error::{Error, Result};

/// Bytes that are read at once where the amount is a matter of choice.
pub const CHUNK_BYTES: usize = 1 << 20;

/// A range of bytes of an open file.
#[derive(Clone, Debug)]
pub struct FileRange {
    file: Arc<File>,
    path: Arc<PathBuf>,
    start: u64,
    bytes: u64,
}

impl FileRange {
    /// Opens all of a regular file or block device.
    ///
    /// # Errors
    ///
    /// The system's, and a path that is something else.
    pub fn open(path: &Path) -> Result<Self> {
        // Look first: opening a FIFO would wait for a writer.
        let kind = std::fs::metadata(path)
            .map_err(|e| Error::io(path, "open", e))?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(
                path,
                "neither a regular file nor a block device",
            ));
        }
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        Self::of(file, path)
    }

    /// All of an open regular file or block device, which is called `path` in errors.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn of(mut file: File, path: &Path) -> Result<Self> {
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|e| Error::io(path, "find the size", e))?;
        Ok(Self {
            file: Arc::new(file),
            path: Arc::new(path.to_owned()),
            start: 0,
            bytes,
        })
    }

    /// The part of `bytes` from byte `start` on, which must lie inside.
    pub fn part(&self, start: u64, bytes: u64) -> Self {
        debug_assert!(start
            .checked_add(bytes)
            .is_some_and(|end| end <= self.bytes));
        Self {
            start: self.start + start,
            bytes,
            ..self.clone()
        }
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, all of it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes in the range.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Byte of the file at which the range starts.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Fills `buffer` from byte `offset` of the range.
    ///
    /// # Errors
    ///
    /// The system's, and a range or a file that ends before the buffer is full.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let at = self.start.saturating_add(offset);
        let inside = offset
            .checked_add(buffer.len() as u64)
            .is_some_and(|end| end <= self.bytes);
        if !inside {
            return Err(Error::new(&self.path, "ends too early").at_byte(self.start + self.bytes));
        }
        self.file
            .read_exact_at(buffer, at)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => {
                    Error::new(&self.path, "became shorter while it was read").at_byte(at)
                }
                _ => Error::io(&self.path, "read", e).at_byte(at),
            })
    }

    /// Reads `N` bytes from byte `offset` of the range.
    ///
    /// # Errors
    ///
    /// As [`FileRange::read`].
    pub fn read_array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// The first `limit` bytes, or all of a shorter range.
    ///
    /// # Errors
    ///
    /// As [`FileRange::read`].
    pub fn first(&self, limit: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes.min(limit as u64) as usize];
        self.read(&mut bytes, 0)?;
        Ok(bytes)
    }
}
