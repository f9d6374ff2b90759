// SPDX-License-Identifier: GPL-2.0

//! What sysfs tells of block devices: their names and numbers, what they are made of, and what is made of them.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use ovbd_kernel::Number;

use crate::error::{Error, Result};

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

/// The number of a device from its folder.
pub fn read_number(folder: &Path) -> Option<Number> {
    let text = fs::read_to_string(folder.join("dev")).ok()?;
    text.trim_end().parse().ok()
}

/// The paths of all that is in a folder.
///
/// # Errors
///
/// The system's.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io(folder, "list", e);
    let entries = fs::read_dir(folder).map_err(fail)?;
    entries
        .map(|entry| entry.map(|entry| entry.path()).map_err(fail))
        .collect()
}

/// The numbers of the devices whose folders are in `folder`.
fn numbers(folder: &Path) -> Result<Vec<Number>> {
    let entries = list(folder)?;
    Ok(entries.iter().filter_map(|one| read_number(one)).collect())
}

/// The devices that are made of a device directly: mapped and md devices, and its partitions.
///
/// # Errors
///
/// sysfs cannot be read.
pub fn holders(device: Number) -> Result<Vec<Number>> {
    let folder = device.sysfs();
    let look = || {
        let mut found = numbers(&folder.join("holders"))?;
        let real = fs::read_link(&folder).map_err(|e| Error::io(&folder, "look up", e))?;
        // The name of a partition is that of its disk with a number; nothing else there begins so.
        let disk = real.file_name().unwrap_or_default().as_bytes();
        for entry in list(&folder)? {
            let name = entry.file_name().unwrap_or_default().as_bytes();
            if name.starts_with(disk) && entry.join("partition").exists() {
                found.extend(read_number(&entry));
            }
        }
        Ok(found)
    };
    match look() {
        // A device that is gone has no holders.
        Err(_) if !folder.exists() => Ok(Vec::new()),
        result => result,
    }
}

/// The devices that a mapped or md device is made of directly, and the disk of a partition.
///
/// # Errors
///
/// sysfs cannot be read. A device that is gone is made of none.
pub fn parts(device: Number) -> Result<Vec<Number>> {
    let Ok(folder) = fs::canonicalize(device.sysfs()) else {
        return Ok(Vec::new());
    };
    if folder.join("partition").exists() {
        return Ok(folder.parent().and_then(read_number).into_iter().collect());
    }
    let slaves = folder.join("slaves");
    match slaves.exists() {
        true => numbers(&slaves),
        false => Ok(Vec::new()),
    }
}

/// The loop devices that have a file: node and number.
///
/// # Errors
///
/// sysfs cannot be read.
pub fn loops() -> Result<Vec<(PathBuf, Number)>> {
    let mut found = Vec::new();
    for folder in list(Path::new("/sys/block"))? {
        let name = folder.file_name().unwrap_or_default();
        // Without a file it does not have that folder.
        if name.as_bytes().starts_with(b"loop") && folder.join("loop").exists() {
            let node = Path::new("/dev").join(name);
            found.extend(read_number(&folder).map(|number| (node, number)));
        }
    }
    Ok(found)
}

/// The name of the file that a loop device was attached to: for people, it may be that of another file by now.
pub fn backing_file(number: Number) -> Option<PathBuf> {
    let mut name = fs::read(number.sysfs().join("loop/backing_file")).ok()?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Some(OsString::from_vec(name).into())
}

/// The devices of each btrfs that is mounted: only one of them is in the list of mounts.
pub fn btrfs_families() -> Vec<Vec<Number>> {
    let file_systems = list(Path::new("/sys/fs/btrfs")).unwrap_or_default();
    file_systems
        .iter()
        .filter_map(|folder| numbers(&folder.join("devices")).ok())
        .collect()
}
