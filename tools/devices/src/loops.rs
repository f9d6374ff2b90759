// SPDX-License-Identifier: GPL-2.0

//! Loop devices: attaching them, and which files they are attached to.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use ovbd_kernel::{
    loops::{self, Attached, Part, Status, CONTROL},
    Number,
};

use crate::programs::run;
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    sysfs,
};

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
    /// Whether it is attached to `file`.
    pub fn is_on(&self, file: FileId) -> bool {
        FileId::of_loop(&self.status) == file
    }
}

/// All loop devices that are attached to something.
///
/// # Errors
///
/// One of them cannot be asked.
pub fn all() -> Result<Vec<Loop>> {
    let mut found = Vec::new();
    for (node, number) in sysfs::loops()? {
        let status = loops::status(&node);
        let status = status.map_err(|e| Error::io(&node, "ask for its file", e))?;
        if let Some(status) = status {
            found.push(Loop {
                node,
                number,
                status,
                backing: sysfs::backing_file(number).unwrap_or_default(),
            });
        }
    }
    Ok(found)
}
