// SPDX-License-Identifier: GPL-2.0

//! The raw image, block device or pipe that a layer is made from.

use std::{
    fs::{File, Metadata},
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rustix::{
    fs::{OFlags, SeekFrom},
    io::Errno,
};

use ovbd_kernel::Number;

use crate::{
    block_device::{above, block_number},
    error::{name, Error, Result},
    file_id::FileId,
    file_range::FileRange,
    foreign,
    layer_writer::LayerWriter,
    mounts::{mounts, swaps},
    stack::WINDOW_BYTES,
    sysfs::{device_name, holders},
};

/// An open raw image.
pub struct RawSource {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    /// Can be read anywhere, again and again.
    Seekable { input: FileRange, before: Metadata },
    /// Can be read once, in order.
    Stream(Mutex<Piped>),
}

struct Piped {
    file: File,
    /// Bytes that were read.
    read: u64,
    /// Whether these are all.
    ended: bool,
}

impl RawSource {
    /// Opens `path`; `-` is standard input. `allow_mounted` takes what is mounted for writing.
    ///
    /// # Errors
    ///
    /// Those of opening, and a source that may be written meanwhile.
    pub fn open(path: &Path, allow_mounted: bool) -> Result<Self> {
        let fail = |e| Error::io(path, "open", e);
        let is_standard = path == Path::new("-");
        let file = match is_standard {
            true => File::from(io::stdin().as_fd().try_clone_to_owned().map_err(fail)?),
            false => File::open(path).map_err(fail)?,
        };
        let path = match is_standard {
            true => Path::new("standard input"),
            false => path,
        };
        let before = metadata(&file, path)?;
        let kind = before.file_type();
        if kind.is_dir() {
            let what = "neither a regular file nor a block device nor a pipe";
            return Err(Error::new(path, what));
        }
        let path = path.to_owned();
        // Of standard input what was read before does not count.
        let started = is_standard && rustix::fs::tell(&file).is_ok_and(|at| at != 0);
        if started || (!kind.is_file() && !kind.is_block_device()) {
            let piped = Piped {
                file,
                read: 0,
                ended: false,
            };
            let kind = Kind::Stream(Mutex::new(piped));
            return Ok(Self { path, kind });
        }
        if !allow_mounted {
            check_not_written(&path, &before)?;
        }
        let input = FileRange::of(file, &path)?;
        let kind = Kind::Seekable { input, before };
        Ok(Self { path, kind })
    }

    /// What it is called.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the image; of a pipe those that were read.
    pub fn bytes(&self) -> u64 {
        match &self.kind {
            Kind::Seekable { input, .. } => input.bytes(),
            Kind::Stream(piped) => lock(piped).read,
        }
    }

    /// The file or device, if it is one.
    pub fn file(&self) -> Option<&File> {
        match &self.kind {
            Kind::Seekable { input, .. } => Some(input.file()),
            Kind::Stream(_) => None,
        }
    }

    /// Whether it can be read only once, and its size is not known before.
    pub fn is_stream(&self) -> bool {
        matches!(self.kind, Kind::Stream(_))
    }

    /// What it is if it is no raw image, as far as its first bytes show. Of a pipe it is not known.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn foreign_kind(&self) -> Result<Option<&'static str>> {
        match &self.kind {
            Kind::Seekable { input, .. } => {
                let first = input.first(foreign::LOOK_BYTES)?;
                Ok(foreign::kind(&first, input.bytes()))
            }
            Kind::Stream(_) => Ok(None),
        }
    }

    /// Reads a window into `buffer`, which gets its size; the last one may be shorter. Windows of a pipe are read in
    /// order.
    ///
    /// # Errors
    ///
    /// Those of [`FileRange::read`].
    pub fn read_window(&self, window: u64, buffer: &mut Vec<u8>) -> Result<()> {
        match &self.kind {
            Kind::Seekable { input, .. } => {
                let at = window * WINDOW_BYTES;
                buffer.resize((input.bytes() - at).min(WINDOW_BYTES) as usize, 0);
                input.read(buffer, at)
            }
            Kind::Stream(piped) => {
                let mut piped = lock(piped);
                buffer.clear();
                let read = (&piped.file).take(WINDOW_BYTES).read_to_end(buffer);
                let read =
                    read.map_err(|e| Error::io(&self.path, "read", e).at_byte(piped.read))?;
                piped.read += read as u64;
                piped.ended = (read as u64) < WINDOW_BYTES;
                Ok(())
            }
        }
    }

    /// Stores `data`, which is in the file from byte `at` on, in a layer, which then may share the blocks of the file.
    ///
    /// # Errors
    ///
    /// Those of [`LayerWriter::unmapped_copy`].
    pub fn copy_to(&self, layer: &mut LayerWriter<'_>, data: &[u8], at: u64) -> Result<()> {
        match &self.kind {
            Kind::Seekable { input, .. } => layer.unmapped_copy(data, input.file(), at),
            Kind::Stream(_) => layer.unmapped(data),
        }
    }

    /// The numbers of the windows in which the file is not a hole, in order. Of a pipe the last may be empty.
    pub fn windows(&self) -> Box<dyn Iterator<Item = u64> + Send + '_> {
        match &self.kind {
            Kind::Seekable { input, .. } => Box::new(DataWindows {
                input,
                next: 0,
                end: 0,
            }),
            Kind::Stream(piped) => Box::new((0..).take_while(|_| !lock(piped).ended)),
        }
    }

    /// Checks that the file is the one that was opened.
    ///
    /// # Errors
    ///
    /// Its size or its times changed.
    pub fn check_unchanged(&self) -> Result<()> {
        let Kind::Seekable { input, before } = &self.kind else {
            return Ok(());
        };
        let now = metadata(input.file(), &self.path)?;
        let state = |m: &Metadata| (m.size(), m.mtime(), m.mtime_nsec());
        if state(&now) != state(before) {
            return Err(Error::new(&self.path, "changed while it was read"));
        }
        Ok(())
    }
}

fn lock(piped: &Mutex<Piped>) -> std::sync::MutexGuard<'_, Piped> {
    piped.lock().unwrap_or_else(PoisonError::into_inner)
}

fn metadata(file: &File, path: &Path) -> Result<Metadata> {
    file.metadata().map_err(|e| Error::io(path, "look up", e))
}

/// Refuses a file or device that somebody may be writing to: what is read would be of no one moment.
fn check_not_written(path: &Path, found: &Metadata) -> Result<()> {
    let refuse = |what: String| {
        let what = format!("{what}: what is read may be torn (--allow-mounted goes on)");
        Err(Error::new(path, what))
    };
    let id = FileId::of(found);
    let devices = above(id)?;
    let via = |number: Number| match FileId::of_device(number) == id {
        true => String::new(),
        false => format!(" as {}", device_name(number)),
    };
    let mounts = mounts()?;
    let swaps = swaps()?;
    if swaps
        .iter()
        .any(|swap| FileId::at(swap).is_ok_and(|other| other == Some(id)))
    {
        return refuse("swap is on it".to_owned());
    }
    let mut seen = false;
    for number in &devices {
        for mount in mounts.iter().filter(|mount| mount.is_on(*number)) {
            if !mount.read_only {
                let point = name(&mount.point);
                return refuse(format!("mounted for writing on {point}{}", via(*number)));
            }
            seen = true;
        }
        if swaps.iter().any(|swap| block_number(swap) == Some(*number)) {
            return refuse(format!("swap is on it{}", via(*number)));
        }
    }
    // Who has it exclusively was seen, or is out of sight.
    if let (FileId::Device(device), false) = (id, seen) {
        let exclusive = File::options()
            .read(true)
            .custom_flags(OFlags::EXCL.bits() as i32)
            .open(path);
        let busy = exclusive.is_err_and(|e| Errno::from_io_error(&e) == Some(Errno::BUSY));
        if busy && holders(Number::new(device))?.is_empty() {
            return refuse("in use, perhaps mounted in another mount namespace".to_owned());
        }
    }
    Ok(())
}

/// Windows that hold data, as the filesystem tells: one extent at a time.
struct DataWindows<'a> {
    input: &'a FileRange,
    /// The next window, inside the extent if it is below `end`.
    next: u64,
    /// First window after the extent.
    end: u64,
}

impl DataWindows<'_> {
    /// Finds the next extent of data. Where the system cannot tell, all that follows is data.
    fn find(&mut self) -> Option<()> {
        let bytes = self.input.bytes();
        let from = self.next.checked_mul(WINDOW_BYTES)?;
        if from >= bytes {
            return None;
        }
        let seek = |whence| rustix::fs::seek(self.input.file(), whence);
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
