// SPDX-License-Identifier: GPL-2.0

//! A new file that appears under its name only when it is complete and on the disk.
//!
//! Until then it has no name at all (`O_TMPFILE`), so that nothing is left behind however the program
//! ends; where the filesystem cannot do that, it has a temporary name that is removed on failure.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, CWD};
use tempfile::{NamedTempFile, TempPath};

use crate::error::{Error, Result};

/// Where a result is written.
pub enum Output {
    /// A file that does not have its name yet.
    File(NewFile),
    /// A block device, overwritten in place.
    Device(File, PathBuf),
}

impl Output {
    /// Prepares to write `path`. `replace` allows an existing file, or the content of a block device, to
    /// be overwritten.
    ///
    /// # Errors
    ///
    /// Something is there and must not be replaced, and the system's.
    pub fn create(path: &Path, replace: bool) -> Result<Self> {
        let kind = match fs::metadata(path) {
            Ok(found) => Some(found.file_type()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(path, "look up", e)),
        };
        match kind {
            Some(kind) if !kind.is_file() && !kind.is_block_device() => Err(Error::new(
                path,
                "exists and is neither a regular file nor a block device",
            )),
            Some(_) if !replace => Err(Error::new(path, "already exists (--force replaces it)")),
            Some(kind) if kind.is_block_device() => {
                let file = File::options()
                    .write(true)
                    .open(path)
                    .map_err(|e| Error::io(path, "open", e))?;
                Ok(Output::Device(file, path.to_owned()))
            }
            _ => NewFile::create(path, replace).map(Output::File),
        }
    }

    /// As [`Output::create`], for something whose end must be the end of its file.
    ///
    /// # Errors
    ///
    /// As [`Output::create`], and a block device.
    pub fn create_file(path: &Path, replace: bool) -> Result<Self> {
        match Self::create(path, replace)? {
            Output::Device(..) => Err(Error::new(path, "is a block device, not a file")),
            output => Ok(output),
        }
    }

    /// Gives the output its size; what is not written reads as zeros.
    ///
    /// # Errors
    ///
    /// The system's, and a block device that is too small.
    pub fn set_size(&self, bytes: u64) -> Result<()> {
        match self {
            Output::File(new) => new
                .file
                .set_len(bytes)
                .map_err(|e| Error::io(&new.path, "set the size", e)),
            Output::Device(file, path) => clear_device(file, path, bytes),
        }
    }

    /// Writes `data` at byte `offset`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let (file, path) = self.file();
        file.write_all_at(data, offset)
            .map_err(|e| Error::io(path, "write", e).at_byte(offset))
    }

    /// The same file under another descriptor, and what it is called in errors.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn duplicate(&self) -> Result<(File, PathBuf)> {
        let (file, path) = self.file();
        let file = file.try_clone().map_err(|e| Error::io(path, "open", e))?;
        Ok((file, path.to_owned()))
    }

    /// What is written, and what it is called in errors.
    fn file(&self) -> (&File, &Path) {
        match self {
            Output::File(new) => (&new.file, &new.path),
            Output::Device(file, path) => (file, path),
        }
    }

    /// Brings everything to the disk and gives the file its name.
    ///
    /// # Errors
    ///
    /// The system's, and a file of that name that appeared meanwhile.
    pub fn finish(self) -> Result<()> {
        match self {
            Output::File(new) => new.finish(),
            Output::Device(file, path) => file.sync_all().map_err(|e| Error::io(&path, "sync", e)),
        }
    }
}

/// Makes the first `bytes` of a device read as zeros.
fn clear_device(file: &File, path: &Path, bytes: u64) -> Result<()> {
    let size = io::Seek::seek(&mut &*file, io::SeekFrom::End(0))
        .map_err(|e| Error::io(path, "find the size", e))?;
    if size < bytes {
        return Err(Error::new(
            path,
            format!("too small: {size} bytes for an image of {bytes}"),
        ));
    }
    // The kernel zeroes whole sectors; a partial last one is written.
    let whole = bytes / 512 * 512;
    for flag in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
        if whole != 0
            && rustix::fs::fallocate(file, flag | FallocateFlags::KEEP_SIZE, 0, whole).is_ok()
        {
            return write_zeros(file, path, whole, bytes);
        }
    }
    write_zeros(file, path, 0, bytes)
}

fn write_zeros(file: &File, path: &Path, from: u64, to: u64) -> Result<()> {
    let zeros = vec![0; (to - from).min(1 << 20) as usize];
    let mut at = from;
    while at < to {
        let n = (to - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..n as usize], at)
            .map_err(|e| Error::io(path, "write", e).at_byte(at))?;
        at += n;
    }
    Ok(())
}

/// A file that does not have its name yet.
pub struct NewFile {
    file: File,
    path: PathBuf,
    replace: bool,
    /// The temporary name, where it needs one; dropping it removes the file.
    temporary: Option<TempPath>,
}

impl NewFile {
    fn create(path: &Path, replace: bool) -> Result<Self> {
        let fail = |e| Error::io(path, "create", e);
        let directory = directory(path);
        let (file, temporary) = match unnamed(directory) {
            Some(file) => (file, None),
            None => {
                let (file, name) = named(directory).map_err(fail)?.into_parts();
                (file, Some(name))
            }
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            replace,
            temporary,
        })
    }

    fn finish(self) -> Result<()> {
        let path = &self.path;
        let fail = |e| Error::io(path, "create", e);
        self.file
            .sync_all()
            .map_err(|e| Error::io(path, "sync", e))?;
        let link = |name: &Path| {
            let from = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            rustix::fs::linkat(CWD, from, CWD, name, AtFlags::SYMLINK_FOLLOW)
                .map_err(io::Error::from)
        };
        match (self.temporary, self.replace) {
            (Some(name), true) => name.persist(path).map_err(|e| fail(e.error))?,
            (Some(name), false) => name.persist_noclobber(path).map_err(|e| fail(e.error))?,
            (None, false) => link(path).map_err(fail)?,
            (None, true) => {
                // A link cannot replace a name, a rename can; borrow a name for the time between.
                let name = named(directory(path)).map_err(fail)?.into_temp_path();
                fs::remove_file(&name).map_err(fail)?;
                link(&name).map_err(fail)?;
                name.persist(path).map_err(|e| fail(e.error))?;
            }
        }
        File::open(directory(path))
            .and_then(|directory| directory.sync_all())
            .map_err(|e| Error::io(path, "sync the directory of", e))
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// A file without a name, where the filesystem and /proc allow to give it one later.
fn unnamed(directory: &Path) -> Option<File> {
    if !Path::new("/proc/self/fd").exists() {
        return None;
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o666);
    let file = rustix::fs::open(directory, flags, mode).ok()?;
    Some(File::from(file))
}

fn named(directory: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(".ovbd-")
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(directory)
}

/// A stream of bytes into an [`Output`] or a pipe, in order.
pub struct Stream<'a> {
    to: Sink<'a>,
    written: u64,
}

enum Sink<'a> {
    Output(&'a Output),
    Writer(&'a mut dyn Write, &'a Path),
}

impl<'a> Stream<'a> {
    /// Writes to `output` from byte `start` on.
    pub fn new(output: &'a Output, start: u64) -> Self {
        Self {
            to: Sink::Output(output),
            written: start,
        }
    }

    /// Writes to `writer`, which is called `name` in errors.
    pub fn to_writer(writer: &'a mut dyn Write, name: &'a Path) -> Self {
        Self {
            to: Sink::Writer(writer, name),
            written: 0,
        }
    }

    /// Byte at which the next write goes.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        match &mut self.to {
            Sink::Output(output) => output.write_at(data, self.written)?,
            Sink::Writer(writer, name) => writer
                .write_all(data)
                .map_err(|e| Error::io(name, "write", e).at_byte(self.written))?,
        }
        self.written += data.len() as u64;
        Ok(())
    }
}
