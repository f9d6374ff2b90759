// SPDX-License-Identifier: GPL-2.0

//! Block devices and who uses them: mounts, swap, and the devices that are made of other devices.
//!
//! All of it is read from /proc and /sys. What they do not tell is an error: not to know a user is not to have none.

use std::{collections::HashSet, path::Path};

use ovbd_kernel::{loops::status, Number};

use crate::{
    error::Result,
    file_id::FileId,
    sysfs::{backing_file, btrfs_families, holders, loops, parts},
};

/// Number of the block device at `path`; `None` for anything else.
pub fn block_number(path: &Path) -> Option<Number> {
    match FileId::at(path) {
        Ok(Some(FileId::Device(device))) => Some(Number::new(device)),
        _ => None,
    }
}

/// The file or device that a loop device is attached to. The kernel tells it to root; for others its name must do.
fn file_of_loop(node: &Path, number: Number) -> Option<FileId> {
    match status(node) {
        Ok(Some(status)) => Some(FileId::of_loop(&status)),
        Ok(None) => None,
        Err(_) => FileId::at(&backing_file(number)?).ok().flatten(),
    }
}

/// All loop devices that are attached, with what they are attached to.
fn attached_loops() -> Result<Vec<(FileId, Number)>> {
    let attached = loops()?.into_iter();
    Ok(attached
        .filter_map(|(node, number)| Some((file_of_loop(&node, number)?, number)))
        .collect())
}

/// Every device through which `file`, a device or a file, or a part of it can be reached, itself first if it is one:
/// partitions, mapped and md devices, loop devices, and the other devices of a btrfs.
///
/// # Errors
///
/// /proc or /sys cannot be read.
pub fn above(file: FileId) -> Result<Vec<Number>> {
    let loops = attached_loops()?;
    let families = btrfs_families();
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut next = vec![file];
    while let Some(file) = next.pop() {
        if !seen.insert(file) {
            continue;
        }
        let on_it = loops.iter().filter(|(backing, _)| *backing == file);
        next.extend(on_it.map(|(_, number)| FileId::of_device(*number)));
        if let FileId::Device(device) = file {
            let number = Number::new(device);
            found.push(number);
            next.extend(holders(number)?.into_iter().map(FileId::of_device));
            let family = families.iter().filter(|family| family.contains(&number));
            next.extend(family.flatten().map(|number| FileId::of_device(*number)));
        }
    }
    Ok(found)
}

/// Every device that `file` is a part of or stored on, itself first if it is one: the disk of a partition, the
/// devices that a mapped or md device is made of, the file of a loop device, the device of a file's file system.
pub fn below(file: FileId) -> HashSet<FileId> {
    let loops = attached_loops().unwrap_or_default();
    let mut seen = HashSet::new();
    let mut next = vec![file];
    while let Some(file) = next.pop() {
        if !seen.insert(file) {
            continue;
        }
        match file {
            FileId::File(file_system, _) => next.push(FileId::Device(file_system)),
            FileId::Device(device) => {
                let number = Number::new(device);
                let parts = parts(number).unwrap_or_default();
                next.extend(parts.into_iter().map(FileId::of_device));
                let file = loops.iter().find(|(_, found)| *found == number);
                next.extend(file.map(|(file, _)| *file));
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_below_itself() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let id = FileId::at(file.path()).unwrap().unwrap();
        assert!(below(id).contains(&id));
        assert_eq!(above(id).unwrap(), []);
    }
}
