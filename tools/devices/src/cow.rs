// SPDX-License-Identifier: GPL-2.0

//! The COW store of a writable stack: what it is on, how large it must be, and whether it can be used.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{fs::OFlags, io::Errno};

use crate::{
    exceptions::{header, Header, HEADER_BYTES},
    loops::Loop,
    plan::{Device, Step},
};
use ovbd_layers::error::{Error, Result};

/// Sectors of a chunk in a new store: the block of the usual filesystems, so that a layer made of the
/// chunks holds little that was not written.
pub const CHUNK_SECTORS: u32 = 8;

const CHUNK_BYTES: u64 = CHUNK_SECTORS as u64 * 512;
const EXCEPTIONS_PER_CHUNK: u64 = CHUNK_BYTES / 16;

/// A store with less can hold no chunk: header, an area, and data.
const MIN_BYTES: u64 = 4 * CHUNK_BYTES;

/// Where writes go.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A file or block device; without it a file that goes with the stack.
    pub path: Option<PathBuf>,
    /// Bytes of a new file; enough for everything if there is no number.
    pub size: Option<u64>,
}

/// A store that can be used.
#[derive(Debug)]
pub struct Store {
    /// What must be done first.
    pub steps: Vec<Step>,
    /// The device, once that is done.
    pub device: Device,
    /// Sectors of a chunk.
    pub chunk_sectors: u32,
}

/// Variable of the loop device.
const VARIABLE: &str = "cow";

impl Store {
    /// Looks at the store for a stack of `origin_sectors`. `force` allows to overwrite what is not a store.
    ///
    /// # Errors
    ///
    /// It is too small, in use, invalid, or holds something else, and those of reading.
    pub fn prepare(
        options: &Options,
        origin_sectors: u64,
        force: bool,
        loops: &[Loop],
    ) -> Result<Self> {
        let path = options.path.as_deref();
        let found = match path.map(fs::metadata) {
            None => None,
            Some(Ok(found)) => Some(found),
            Some(Err(e)) if e.kind() == io::ErrorKind::NotFound => None,
            Some(Err(e)) => return Err(Error::io(path.unwrap_or(Path::new("")), "look up", e)),
        };
        let (Some(path), Some(found)) = (path, found) else {
            return Self::new_file(path, options.size, origin_sectors);
        };
        if options.size.is_some() {
            return Err(Error::new(path, "exists, so --size does not apply"));
        }
        let is_device = found.file_type().is_block_device();
        if !is_device && !found.is_file() {
            return Err(Error::new(
                path,
                "neither a regular file nor a block device",
            ));
        }
        if let Some(user) = loops.iter().find(|user| user.is_on(&found)) {
            let node = user.node.display();
            return Err(Error::new(path, format!("in use by {node}")));
        }
        Self::existing(path, is_device, force)
    }

    fn new_file(path: Option<&Path>, size: Option<u64>, origin_sectors: u64) -> Result<Self> {
        let bytes = size.unwrap_or_else(|| enough_for(origin_sectors));
        if bytes < MIN_BYTES {
            return Err(Error::new(
                path.unwrap_or(Path::new("--size")),
                format!("a COW store needs at least {MIN_BYTES} bytes"),
            ));
        }
        Ok(Self {
            steps: vec![Step::Cow {
                variable: VARIABLE.to_owned(),
                path: path.map(Path::to_owned),
                create: Some(bytes.next_multiple_of(CHUNK_BYTES)),
            }],
            device: Device::Loop(VARIABLE.to_owned()),
            chunk_sectors: CHUNK_SECTORS,
        })
    }

    fn existing(path: &Path, is_device: bool, force: bool) -> Result<Self> {
        // A block device that something else has open exclusively cannot be opened so again.
        let flag = if is_device {
            OFlags::EXCL
        } else {
            OFlags::empty()
        };
        let mut file = File::options()
            .read(true)
            .write(true)
            .custom_flags(flag.bits() as i32)
            .open(path)
            .map_err(|e| match Errno::from_io_error(&e) {
                Some(Errno::BUSY) => Error::new(path, "in use: mounted, or part of another device"),
                _ => Error::io(path, "open", e),
            })?;
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))
            .map_err(|e| Error::io(path, "find the size", e))?;
        if bytes < MIN_BYTES {
            let what = format!("too small: {bytes} bytes of at least {MIN_BYTES}");
            return Err(Error::new(path, what));
        }
        let mut steps = Vec::new();
        let chunk_sectors = match read_header(&mut file, path) {
            Ok(Header::Store(sectors)) => sectors,
            Ok(Header::New) => CHUNK_SECTORS,
            Err(_) if force => {
                steps.push(Step::Wipe(path.to_owned()));
                CHUNK_SECTORS
            }
            Err(e) => {
                return Err(Error::new(
                    path,
                    format!("{} (--force starts a new store)", e.what()),
                ))
            }
        };
        let device = if is_device {
            Device::Path(path.to_owned())
        } else {
            steps.push(Step::Cow {
                variable: VARIABLE.to_owned(),
                path: Some(path.to_owned()),
                create: None,
            });
            Device::Loop(VARIABLE.to_owned())
        };
        Ok(Self {
            steps,
            device,
            chunk_sectors,
        })
    }

    /// Whether two paths name the same file.
    pub fn is_same(options: &Options, other: &fs::Metadata) -> bool {
        let file = options
            .path
            .as_deref()
            .and_then(|path| fs::metadata(path).ok());
        file.is_some_and(|file| (file.dev(), file.ino()) == (other.dev(), other.ino()))
    }
}

fn read_header(file: &mut File, path: &Path) -> Result<Header> {
    let fail = |e| Error::io(path, "read", e);
    let mut block = [0; HEADER_BYTES];
    io::Seek::rewind(file).map_err(fail)?;
    file.read_exact(&mut block).map_err(fail)?;
    header(&block).map_err(|what| Error::new(path, what))
}

/// Bytes of a store that can hold every chunk of the origin.
fn enough_for(origin_sectors: u64) -> u64 {
    let chunks = origin_sectors.div_ceil(CHUNK_SECTORS.into());
    // One more than it fills, because dm-snapshot prepares the next one early.
    let areas = chunks / EXCEPTIONS_PER_CHUNK + 2;
    (1 + chunks + areas).saturating_mul(CHUNK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(enough_for(8), 4 * 4096);
        assert_eq!(enough_for(8 * 256), (1 + 256 + 3) * 4096);
        assert!(enough_for(u64::MAX) > 1 << 62);
    }
}
