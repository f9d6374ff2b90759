// SPDX-License-Identifier: GPL-2.0

//! Whether two names are the same file: by device and inode, never by the names.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use ovbd_kernel::{loops::Status, Number};

use crate::error::{Error, Result};

/// What makes a file or block device the one it is, whatever links, names or nodes lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileId {
    /// A block device: the number that any of its nodes has.
    Device(u64),
    /// Anything else: number of the file system, and inode.
    File(u64, u64),
}

impl FileId {
    /// That of a block device.
    pub fn of_device(number: Number) -> Self {
        FileId::Device(rustix::fs::makedev(number.0, number.1))
    }

    /// That of an open or looked up file.
    pub fn of(found: &Metadata) -> Self {
        match found.file_type().is_block_device() {
            true => FileId::Device(found.rdev()),
            false => FileId::File(found.dev(), found.ino()),
        }
    }

    /// That of what a loop device is attached to.
    pub fn of_loop(status: &Status) -> Self {
        match status.block_device {
            Some(device) => Self::of_device(device),
            None => {
                let file_system = rustix::fs::makedev(status.device.0, status.device.1);
                FileId::File(file_system, status.inode)
            }
        }
    }

    /// That of the file to which `path` leads, through links; `None` if there is none.
    ///
    /// # Errors
    ///
    /// The system does not tell.
    pub fn at(path: &Path) -> Result<Option<Self>> {
        match fs::metadata(path) {
            Ok(found) => Ok(Some(Self::of(&found))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(path, "look up", e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn links_lead_to_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let [file, copy, hard, soft, none] =
            ["file", "copy", "hard", "soft", "none"].map(|name| folder.path().join(name));
        fs::write(&file, "x").unwrap();
        fs::copy(&file, &copy).unwrap();
        fs::hard_link(&file, &hard).unwrap();
        symlink("file", &soft).unwrap();
        let id = |path: &Path| FileId::at(path).unwrap();
        assert_eq!(id(&file), id(&hard));
        assert_eq!(id(&file), id(&soft));
        assert_ne!(id(&file), id(&copy));
        assert_eq!(id(&none), None);
    }
}
