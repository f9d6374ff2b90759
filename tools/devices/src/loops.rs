// SPDX-License-Identifier: GPL-2.0

//! Loop devices: attaching them, and which files they are attached to.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use loopdev::{LoopControl, LoopDevice};
use rustix::io::Errno;

use crate::dmsetup::{run, Number};
use ovbd_layers::error::{Error, Result};

/// Major number of loop devices.
const MAJOR: u32 = 7;

const CONTROL: &str = "/dev/loop-control";

/// An attached loop device. It detaches itself when this is dropped and nothing else has it open.
#[derive(Debug)]
pub struct Attached {
    /// Holds the device until a mapped device does.
    _device: LoopDevice,
    /// Device node.
    pub node: PathBuf,
}

/// Loads the module that makes loop devices, where it is missing.
///
/// # Errors
///
/// It cannot be loaded.
pub fn prepare() -> Result<()> {
    if !Path::new("/sys/module/loop").exists() {
        run("modprobe", ["loop"])
            .map_err(|_| Error::new(Path::new(CONTROL), "no loop devices: modprobe loop failed"))?;
    }
    Ok(())
}

/// Attaches `bytes` of a file, 0 for all of it, from byte `offset` on; read-only if the file was opened so.
///
/// Reads and writes bypass the page cache of the file system below where it can do that: the mapped devices
/// have their own.
///
/// # Errors
///
/// The system's; they name `path`.
pub fn attach(file: &File, path: &Path, offset: u64, bytes: u64) -> Result<Attached> {
    let fail = |e| Error::io(path, "attach a loop device to", e);
    let control = LoopControl::open().map_err(|e| Error::io(Path::new(CONTROL), "open", e))?;
    // Another program can take the free device first.
    let device = loop {
        let device = control.next_free().map_err(fail)?;
        let options = device.with().offset(offset).size_limit(bytes);
        match options.autoclear(true).attach_fd(file.as_raw_fd()) {
            Err(e) if Errno::from_io_error(&e) == Some(Errno::BUSY) => {}
            result => {
                result.map_err(fail)?;
                break device;
            }
        }
    };
    // Whether the file system can do it only the attempt shows.
    let direct = device.set_direct_io(true).is_ok();
    let node = device
        .path()
        .ok_or_else(|| fail(io::ErrorKind::NotFound.into()))?;
    tracing::debug!(node = %node.display(), path = %path.display(), direct, "attached");
    Ok(Attached {
        _device: device,
        node,
    })
}

/// The file that a loop device is attached to.
pub fn backing_file(number: Number) -> Option<PathBuf> {
    if number.0 != MAJOR {
        return None;
    }
    let name = fs::read_to_string(number.sysfs().join("loop/backing_file")).ok()?;
    Some(name.trim_end_matches('\n').into())
}

/// A loop device in use.
#[derive(Debug)]
pub struct Loop {
    /// Device node.
    pub node: PathBuf,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Device and inode number of the file.
    file: (u64, u64),
}

impl Loop {
    /// Whether it is attached to the file of `metadata`.
    pub fn is_on(&self, metadata: &fs::Metadata) -> bool {
        self.file == (metadata.dev(), metadata.ino())
    }
}

/// All loop devices that are attached to files with names.
pub fn all() -> Vec<Loop> {
    let Ok(folder) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    folder
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let backing = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            let file = fs::metadata(backing.trim_end_matches('\n')).ok()?;
            let read_only = fs::read_to_string(entry.path().join("ro")).ok()?;
            Some(Loop {
                node: Path::new("/dev").join(entry.file_name()),
                read_only: read_only.trim() == "1",
                file: (file.dev(), file.ino()),
            })
        })
        .collect()
}
