// SPDX-License-Identifier: GPL-2.0

//! Loop devices: attaching them, and which files they are attached to.

use std::{
    fs::{self, File},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use ovbd_kernel::{
    loops::{self, Attached, Part, Status, CONTROL},
    Number,
};

use crate::programs::run;
use ovbd_layers::error::{Error, Result};

pub use ovbd_layers::block_device::{backing_file, read_number};

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

/// Attaches a part of a file; `writable` if the file was opened so.
///
/// # Errors
///
/// The system's; they name `path`.
pub fn attach(file: &File, path: &Path, writable: bool, part: Part) -> Result<Attached> {
    let attached = loops::attach(file, writable, part)
        .map_err(|e| Error::io(path, "attach a loop device to", e))?;
    tracing::debug!(node = %attached.node.display(), path = %path.display(), "attached");
    Ok(attached)
}

/// A loop device in use.
#[derive(Clone, Debug)]
pub struct Loop {
    /// Device node.
    pub node: PathBuf,
    /// Number.
    pub number: Number,
    /// What it is attached to.
    pub status: Status,
    /// The name that its file had then. The file may be gone, or have another name here.
    pub backing: PathBuf,
}

impl Loop {
    /// Whether it is attached to the file or block device of `metadata`.
    pub fn is_on(&self, metadata: &fs::Metadata) -> bool {
        match metadata.file_type().is_block_device() {
            true => self.status.block_device == Some(Number::new(metadata.rdev())),
            false => {
                let file = (Number::new(metadata.dev()), metadata.ino());
                file == (self.status.device, self.status.inode)
            }
        }
    }
}

/// All loop devices that are attached to something.
///
/// # Errors
///
/// One of them cannot be asked.
pub fn all() -> Result<Vec<Loop>> {
    let folder = Path::new("/sys/block");
    let fail = |e| Error::io(folder, "list", e);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        // Without a file it does not have this folder.
        if !entry.path().join("loop").exists() {
            continue;
        }
        let Some(number) = read_number(&entry.path()) else {
            continue;
        };
        let node = Path::new("/dev").join(entry.file_name());
        let status = loops::status(&node);
        let status = status.map_err(|e| Error::io(&node, "ask for its file", e))?;
        if let Some(status) = status {
            found.push(Loop {
                node,
                number,
                status,
                backing: backing_file(number).unwrap_or_default(),
            });
        }
    }
    Ok(found)
}
