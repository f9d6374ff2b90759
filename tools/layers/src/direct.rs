// SPDX-License-Identifier: GPL-2.0

//! Reads past the page cache.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{fs::OFlags, io::Errno};

use crate::error::{Error, Result};

/// Alignment that every direct read accepts.
pub const ALIGNMENT: usize = 4096;

/// Memory for direct reads.
#[derive(Debug, Default)]
pub struct Aligned(Vec<u8>);

impl Aligned {
    /// Room for `bytes` at least.
    pub fn new(bytes: usize) -> Self {
        Self(vec![0; bytes + ALIGNMENT])
    }

    /// The first `bytes` of it, which grows where it is smaller.
    pub fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        if self.0.len() < bytes + ALIGNMENT {
            self.0.resize(bytes + ALIGNMENT, 0);
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..start + bytes]
    }

    /// The first `bytes` of it.
    pub fn filled(&self, bytes: usize) -> &[u8] {
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &self.0[start..start + bytes]
    }
}

/// A block device, or a file where the file system can do it, that is read past the page cache.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl DirectFile {
    /// Opens a block device or file to be read.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |e| Error::io(path, "open", e);
        let direct = File::options()
            .read(true)
            .custom_flags(OFlags::DIRECT.bits() as i32)
            .open(path);
        let mut file = match direct {
            Err(e) if Errno::from_io_error(&e) == Some(Errno::INVAL) => {
                File::open(path).map_err(fail)?
            }
            result => result.map_err(fail)?,
        };
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|e| Error::io(path, "find the size", e))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            bytes,
        })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it is called.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `buffer`, which is aligned, from byte `at`.
    ///
    /// # Errors
    ///
    /// The system's; the end of the file.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        self.file
            .read_exact_at(buffer, at)
            .map_err(|e| Error::io(&self.path, "read", e).at_byte(at))
    }
}
