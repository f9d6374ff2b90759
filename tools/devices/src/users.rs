// SPDX-License-Identifier: GPL-2.0

//! Who uses a block device: mounts, other devices, programs.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use ovbd_kernel::Number;

/// A mount of a device.
#[derive(Debug)]
pub struct Mount {
    /// Number that files on it report as their device; some file systems have their own.
    pub number: Number,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Whether the file system refuses writes.
    pub read_only: bool,
}

/// Where a device is mounted.
pub fn mounts(device: Number) -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| mount(line, device))
        .collect()
}

fn mount(line: &str, device: Number) -> Option<Mount> {
    // ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [OPTIONAL]... - TYPE SOURCE SUPER-OPTIONS
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ');
    let number: Number = mount.nth(2)?.parse().ok()?;
    let point = mount.nth(1)?;
    let mut filesystem = filesystem.split(' ');
    let source = filesystem.nth(1)?;
    let options = filesystem.next()?;
    (number == device || block_number(Path::new(source)) == Some(device)).then(|| Mount {
        number,
        point: unescape(point).into(),
        read_only: options.split(',').any(|option| option == "ro"),
    })
}

/// Blanks and backslashes are octal in the list of mounts.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, c)| text.replace(code, c))
}

/// Number of a block device; `None` for anything else.
pub fn block_number(path: &Path) -> Option<Number> {
    let found = fs::metadata(path).ok()?;
    found
        .file_type()
        .is_block_device()
        .then(|| Number::new(found.rdev()))
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

/// The devices that are made of a device.
pub fn holders(device: Number) -> Vec<Number> {
    let Ok(folder) = fs::read_dir(device.sysfs().join("holders")) else {
        return Vec::new();
    };
    folder
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.ok()?.path().join("dev")).ok()?;
            text.trim_end().parse().ok()
        })
        .collect()
}

/// Why a device cannot go away, apart from the holders in `known`.
pub fn why_in_use(device: Number, known: &[Number]) -> Option<String> {
    if let Some(mount) = mounts(device).first() {
        return Some(format!("mounted on {}", mount.point.display()));
    }
    let holder = holders(device)
        .into_iter()
        .find(|number| !known.contains(number))?;
    Some(format!("used by {}", device_name(holder)))
}

/// The programs that have a device open, as `name (pid)`.
pub fn programs(device: Number) -> Vec<String> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for process in processes.flatten().map(|entry| entry.path()) {
        let Ok(files) = fs::read_dir(process.join("fd")) else {
            continue;
        };
        if files
            .flatten()
            .any(|file| block_number(&file.path()) == Some(device))
        {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            let id = process.file_name().unwrap_or_default().to_string_lossy();
            found.push(format!("{} ({id})", name.trim_end()));
        }
    }
    found
}
