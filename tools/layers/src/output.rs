// SPDX-License-Identifier: GPL-2.0

//! Where a result goes: a new file, a block device, or a pipe.
//!
//! A new file appears under its name only when it is complete and on the disk. Until then it has no name at all
//! (`O_TMPFILE`), so that nothing is left behind however the program ends; where the filesystem cannot do that, it
//! has a temporary name, which is removed on failure and by [`remove_temporaries`].

use std::{
    fs::{self, File},
    io::{self, Write},
    mem,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileExt, FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rustix::{
    fs::{AtFlags, FallocateFlags, Mode, OFlags, CWD},
    io::Errno,
};
use tempfile::TempPath;

use crate::{
    blob::Blob,
    error::{Error, Result},
    file_range::FileRange,
    overwrite,
};

/// What a result may replace, and what it is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules<'a> {
    /// Replace a file that exists.
    pub replace: bool,
    /// Overwrite what a block device holds.
    pub overwrite_device: bool,
    /// The files and devices that are read: none of them may be the output, nor be less readable.
    pub inputs: &'a [PathBuf],
}

/// Where a result is written.
pub enum Output {
    /// A file that does not have its name yet.
    File(NewFile),
    /// A block device, overwritten in place.
    Device(File, PathBuf),
    /// A pipe or the like: every byte goes after the one before it.
    Stream(File, PathBuf),
}

impl Output {
    /// Prepares to write `path`: a file, a block device, a pipe or a character device.
    ///
    /// # Errors
    ///
    /// Something is there that must not be replaced, or that is read; a device in use; a link to nothing; and the
    /// system's.
    pub fn create(path: &Path, rules: Rules<'_>) -> Result<Self> {
        let found = match fs::metadata(path) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if fs::symlink_metadata(path).is_ok() {
                    return Err(Error::new(path, "a link to nothing"));
                }
                return NewFile::create(path, rules, 0o666).map(Output::File);
            }
            Err(e) => return Err(Error::io(path, "look up", e)),
        };
        let kind = found.file_type();
        if kind.is_dir() {
            return Err(Error::new(path, "a directory"));
        }
        let inputs = rules.inputs.iter().map(PathBuf::as_path);
        overwrite::check_is_no_input(path, inputs)?;
        if kind.is_block_device() {
            let file = overwrite::open_device(path, rules.overwrite_device)?;
            return Ok(Output::Device(file, path.to_owned()));
        }
        if !kind.is_file() {
            let file = File::options().write(true).open(path);
            let file = file.map_err(|e| Error::io(path, "open", e))?;
            return Ok(Output::Stream(file, path.to_owned()));
        }
        if !rules.replace {
            return Err(Error::new(path, "already exists (--force replaces it)"));
        }
        // A link stays one: what it points to is replaced.
        let path = fs::canonicalize(path).map_err(|e| Error::io(path, "look up", e))?;
        NewFile::create(&path, rules, found.permissions().mode()).map(Output::File)
    }

    /// As [`Output::create`], for something whose end must be the end of its file.
    ///
    /// # Errors
    ///
    /// As [`Output::create`], and a block device.
    pub fn create_file(path: &Path, rules: Rules<'_>) -> Result<Self> {
        if fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()) {
            return Err(Error::new(path, "is a block device, not a file"));
        }
        Self::create(path, rules)
    }

    /// Standard output.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn standard() -> Result<Self> {
        let path = Path::new("standard output");
        let file = io::stdout().as_fd().try_clone_to_owned();
        let file = file.map_err(|e| Error::io(path, "open", e))?;
        Ok(Output::Stream(file.into(), path.to_owned()))
    }

    /// Whether bytes can only be appended.
    pub fn is_stream(&self) -> bool {
        matches!(self, Output::Stream(..))
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
                .map_err(|e| Error::io(&new.path, "set the size of", e)),
            Output::Device(file, path) => clear_device(file, path, bytes),
            Output::Stream(_, path) => Err(Error::new(path, "a pipe has no size")),
        }
    }

    /// Writes `data` at byte `offset`, which for a stream is the end of what was written before.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let (mut file, path) = self.file();
        let written = match self {
            Output::Stream(..) => file.write_all(data),
            _ => file.write_all_at(data, offset),
        };
        written.map_err(|e| Error::io(path, "write", e).at_byte(offset))
    }

    /// The same under another descriptor, for another thread.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn duplicate(&self) -> Result<Self> {
        let (file, path) = self.file();
        let file = file.try_clone().map_err(|e| Error::io(path, "open", e))?;
        Ok(match self {
            Output::Stream(_, path) => Output::Stream(file, path.clone()),
            // The name is given by the original.
            Output::File(NewFile { path, .. }) | Output::Device(_, path) => {
                Output::Device(file, path.clone())
            }
        })
    }

    /// What is written, and what it is called in errors.
    fn file(&self) -> (&File, &Path) {
        match self {
            Output::File(new) => (&new.file, &new.path),
            Output::Device(file, path) | Output::Stream(file, path) => (file, path),
        }
    }

    /// The blob of `bytes` that was written from byte `start` on, although it may have no name yet.
    ///
    /// # Errors
    ///
    /// Those of [`Blob::of`].
    pub fn written(&self, start: u64, bytes: u64) -> Result<Blob> {
        let (file, path) = self.file();
        let file = file.try_clone().map_err(|e| Error::io(path, "open", e))?;
        Blob::of(FileRange::of(file, path)?.part(start, bytes))
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
            Output::Stream(..) => Ok(()),
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
    temporary: Option<Temporary>,
}

impl NewFile {
    /// `limit` has the bits of the access mode that the file can have at most.
    fn create(path: &Path, rules: Rules<'_>, limit: u32) -> Result<Self> {
        let fail = |e| Error::io(path, "create", e);
        let inputs = rules.inputs.iter().map(PathBuf::as_path);
        let mode = overwrite::common_mode(inputs)? & (0o600 | limit);
        let directory = directory(path);
        let (file, temporary) = match unnamed(directory, mode) {
            Some(file) => (file, None),
            None => {
                let (file, name) = Temporary::create(directory, mode).map_err(fail)?;
                (file, Some(name))
            }
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            replace: rules.replace,
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
            (Some(name), replace) => name.persist(path, replace).map_err(fail)?,
            (None, false) => link(path).map_err(fail)?,
            (None, true) => {
                // A link cannot replace a name, a rename can; borrow a name for the time between.
                let (_, name) = Temporary::create(directory(path), 0o600).map_err(fail)?;
                fs::remove_file(name.path()).map_err(fail)?;
                link(name.path()).map_err(fail)?;
                name.persist(path, true).map_err(fail)?;
            }
        }
        File::open(directory(path))
            .and_then(|directory| directory.sync_all())
            .map_err(|e| Error::io(path, "sync the directory of", e))
    }
}

/// The temporary names that exist now.
static TEMPORARIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes all files that still have a temporary name, for a program that is about to end: no more are made.
pub fn remove_temporaries() {
    let names = TEMPORARIES.lock().unwrap_or_else(PoisonError::into_inner);
    for name in names.iter() {
        // There is nobody left to tell.
        let _ = fs::remove_file(name);
    }
    mem::forget(names);
}

/// A temporary name. The file is removed when this is dropped.
struct Temporary(Option<TempPath>);

impl Temporary {
    fn create(directory: &Path, mode: u32) -> io::Result<(File, Self)> {
        let mut names = TEMPORARIES.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, name) = tempfile::Builder::new()
            .prefix(".ovbd-")
            .permissions(fs::Permissions::from_mode(mode))
            .tempfile_in(directory)?
            .into_parts();
        names.push(name.to_path_buf());
        Ok((file, Self(Some(name))))
    }

    fn path(&self) -> &Path {
        self.0.as_deref().unwrap_or(Path::new(""))
    }

    fn persist(mut self, path: &Path, replace: bool) -> io::Result<()> {
        let own = self.path().to_owned();
        let Some(name) = self.0.take() else {
            return Ok(());
        };
        let result = match replace {
            true => name.persist(path),
            false => name.persist_noclobber(path),
        };
        forget_temporary(&own);
        result.map_err(|e| e.error)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(name) = self.0.take() {
            let own = name.to_path_buf();
            drop(name);
            forget_temporary(&own);
        }
    }
}

fn forget_temporary(name: &Path) {
    let mut names = TEMPORARIES.lock().unwrap_or_else(PoisonError::into_inner);
    names.retain(|other| other != name);
}

/// The folder that a file of this name is in.
pub fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// A file without a name, where the filesystem and /proc allow to give it one later.
fn unnamed(directory: &Path, mode: u32) -> Option<File> {
    if !Path::new("/proc/self/fd").exists() {
        return None;
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(mode);
    let file = rustix::fs::open(directory, flags, mode).ok()?;
    Some(File::from(file))
}

/// A stream of bytes into an [`Output`] or a pipe, in order.
pub struct Stream<'a> {
    to: Sink<'a>,
    written: u64,
}

enum Sink<'a> {
    Output(&'a Output),
    Writer(&'a mut (dyn Write + Send), &'a Path),
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
    pub fn to_writer(writer: &'a mut (dyn Write + Send), name: &'a Path) -> Self {
        Self {
            to: Sink::Writer(writer, name),
            written: 0,
        }
    }

    /// Writes `bytes` zeros.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn zeros(&mut self, mut bytes: u64) -> Result<()> {
        const ZEROS: &[u8] = &[0; 1 << 16];
        while bytes > 0 {
            let now = bytes.min(ZEROS.len() as u64);
            self.write(&ZEROS[..now as usize])?;
            bytes -= now;
        }
        Ok(())
    }

    /// Leaves out `bytes`, which read as zeros: in a new file that takes no space. More must be written behind them.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn hole(&mut self, bytes: u64) -> Result<()> {
        match self.to {
            Sink::Output(Output::File(_)) => {
                self.written += bytes;
                Ok(())
            }
            _ => self.zeros(bytes),
        }
    }

    /// Byte at which the next write goes.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Lets the system copy `bytes` of `from` from byte `at` on, which it may do by sharing blocks; false, with nothing
    /// written, if it cannot.
    ///
    /// # Errors
    ///
    /// The system's, once it has begun.
    pub fn copy(&mut self, from: &File, mut at: u64, bytes: u64) -> Result<bool> {
        let Sink::Output(Output::File(NewFile { file, path, .. })) = &self.to else {
            return Ok(false);
        };
        let end = self.written + bytes;
        while self.written < end {
            let (left, begun) = ((end - self.written) as usize, self.written + bytes > end);
            match rustix::fs::copy_file_range(
                from,
                Some(&mut at),
                file,
                Some(&mut self.written),
                left,
            ) {
                Ok(0) | Err(_) if !begun => return Ok(false),
                Ok(0) => return Err(Error::new(path, "its source became shorter")),
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(Error::io(path, "write", e.into()).at_byte(self.written)),
            }
        }
        Ok(true)
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
