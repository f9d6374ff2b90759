// SPDX-License-Identifier: GPL-2.0

//! Block devices and who uses them: mounts, swap, and the devices that are made of other devices.
//!
//! All of it is read from /proc and /sys. What they do not tell is an error: not to know a user is not to have none.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use ovbd_kernel::{loops, Number};

use crate::{
    error::{Error, Result},
    file_id::FileId,
};

/// Number of the block device at `path`; `None` for anything else.
pub fn block_number(path: &Path) -> Option<Number> {
    match FileId::at(path) {
        Ok(Some(FileId::Device(device))) => Some(Number::new(device)),
        _ => None,
    }
}

/// The name by which people know a block device.
pub fn device_name(number: Number) -> String {
    let read = |file: &str| fs::read_to_string(number.sysfs().join(file)).ok();
    if let Some(name) = read("dm/name") {
        return format!("/dev/mapper/{}", name.trim_end());
    }
    read("uevent")
        .and_then(|text| {
            let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
            name.map(|name| format!("/dev/{name}"))
        })
        .unwrap_or_else(|| number.to_string())
}

/// The name of the file that a loop device was attached to: for people, it may be that of another file by now.
pub fn backing_file(number: Number) -> Option<PathBuf> {
    let mut name = fs::read(number.sysfs().join("loop/backing_file")).ok()?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Some(OsString::from_vec(name).into())
}

/// The file or device that a loop device is attached to. The kernel tells it to root; for others its name must do.
fn file_of_loop(folder: &Path, number: Number) -> Option<FileId> {
    let node = Path::new("/dev").join(folder.file_name()?);
    match loops::status(&node) {
        Ok(Some(status)) => Some(match status.block_device {
            Some(device) => FileId::of_device(device),
            None => {
                let device = rustix::fs::makedev(status.device.0, status.device.1);
                FileId::File(device, status.inode)
            }
        }),
        Ok(None) => None,
        Err(_) => FileId::at(&backing_file(number)?).ok().flatten(),
    }
}

/// All loop devices that are attached, with what they are attached to.
fn attached_loops() -> Result<Vec<(FileId, Number)>> {
    let mut found = Vec::new();
    for entry in list(Path::new("/sys/block"))? {
        // Without a file it does not have this folder.
        if !entry.join("loop").exists() {
            continue;
        }
        if let Some(number) = read_number(&entry) {
            found.extend(file_of_loop(&entry, number).map(|file| (file, number)));
        }
    }
    Ok(found)
}

/// The devices that are made of a device directly: mapped and md devices, and its partitions.
///
/// # Errors
///
/// sysfs cannot be read.
pub fn holders(device: Number) -> Result<Vec<Number>> {
    let folder = device.sysfs();
    let mut found: Vec<Number> = match list(&folder.join("holders")) {
        Ok(entries) => entries
            .iter()
            .filter_map(|entry| read_number(entry))
            .collect(),
        // A device that is gone has no holders.
        Err(_) if !folder.exists() => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let partitions = list(&folder)?;
    found.extend(
        partitions
            .iter()
            .filter(|entry| entry.join("partition").exists())
            .filter_map(|entry| read_number(entry)),
    );
    Ok(found)
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
    let mut seen = HashSet::new();
    let mut next = vec![file];
    while let Some(file) = next.pop() {
        if !seen.insert(file) {
            continue;
        }
        match file {
            FileId::File(file_system, _) => next.push(FileId::Device(file_system)),
            FileId::Device(device) => {
                let folder = Number::new(device).sysfs();
                let slaves = list(&folder.join("slaves")).unwrap_or_default();
                next.extend(
                    slaves
                        .iter()
                        .filter_map(|entry| read_number(entry))
                        .map(FileId::of_device),
                );
                if let Some(disk) = disk_of(&folder) {
                    next.push(FileId::of_device(disk));
                }
                if let (true, Ok(real)) = (folder.join("loop").exists(), fs::canonicalize(&folder))
                {
                    next.extend(file_of_loop(&real, Number::new(device)));
                }
            }
        }
    }
    seen
}

/// The disk of a partition.
fn disk_of(folder: &Path) -> Option<Number> {
    if !folder.join("partition").exists() {
        return None;
    }
    read_number(fs::canonicalize(folder).ok()?.parent()?)
}

/// The devices of each btrfs that is mounted: only one of them is in the list of mounts.
fn btrfs_families() -> Vec<Vec<Number>> {
    let file_systems = list(Path::new("/sys/fs/btrfs")).unwrap_or_default();
    file_systems
        .iter()
        .filter_map(|folder| list(&folder.join("devices")).ok())
        .map(|devices| {
            devices
                .iter()
                .filter_map(|entry| read_number(entry))
                .collect()
        })
        .collect()
}

/// The number of a device from its folder in sysfs.
pub fn read_number(folder: &Path) -> Option<Number> {
    fs::read_to_string(folder.join("dev"))
        .ok()?
        .trim_end()
        .parse()
        .ok()
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io(folder, "list", e);
    let entries = fs::read_dir(folder).map_err(fail)?;
    entries
        .map(|entry| entry.map(|entry| entry.path()).map_err(fail))
        .collect()
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
