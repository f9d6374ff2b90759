// SPDX-License-Identifier: GPL-2.0

//! Block devices and who uses them: mounts, swap, and the devices that are made of other devices.
//!
//! All of it is read from /proc and /sys. What they do not tell is an error: not to know a user is not to have none.

use std::{
    collections::HashSet,
    ffi::OsString,
    fmt, fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::{
    error::{Error, Result},
    file_id::FileId,
};

/// Number of a block device: major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Number(pub u32, pub u32);

impl Number {
    /// From the form in which system calls have it.
    pub fn new(device: u64) -> Self {
        Self(rustix::fs::major(device), rustix::fs::minor(device))
    }

    /// That of the block device at `path`; `None` for anything else.
    pub fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        found
            .file_type()
            .is_block_device()
            .then(|| Self::new(found.rdev()))
    }

    /// The device's folder in sysfs.
    pub fn sysfs(self) -> PathBuf {
        format!("/sys/dev/block/{self}").into()
    }

    /// The name by which people know it.
    pub fn name(self) -> String {
        let read = |file: &str| fs::read_to_string(self.sysfs().join(file)).ok();
        if let Some(name) = read("dm/name") {
            return format!("/dev/mapper/{}", name.trim_end());
        }
        read("uevent")
            .and_then(|text| {
                let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
                name.map(|name| format!("/dev/{name}"))
            })
            .unwrap_or_else(|| self.to_string())
    }

    /// The device as a file.
    pub fn file_id(self) -> FileId {
        FileId::Device(rustix::fs::makedev(self.0, self.1))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0, self.1)
    }
}

impl FromStr for Number {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        Ok(Self(
            major.parse().map_err(|_| ())?,
            minor.parse().map_err(|_| ())?,
        ))
    }
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Number that files on it report as their device; some file systems have their own.
    pub number: Number,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Kind of file system.
    pub kind: String,
    /// What it says it is on; a device in most cases.
    pub source: PathBuf,
    /// Whether the file system refuses writes, through all mounts of it.
    pub read_only: bool,
}

impl Mount {
    /// Whether it is on `device`, as far as number and source show.
    pub fn is_on(&self, device: Number) -> bool {
        self.number == device || Number::of(&self.source) == Some(device)
    }
}

/// All mounts that this process sees.
///
/// # Errors
///
/// The list cannot be read or is not understood.
pub fn mounts() -> Result<Vec<Mount>> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    // Names need not be UTF-8, which is why no crate reads the list.
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| mount(line).ok_or_else(|| Error::new(path, "a line that is not understood")))
        .collect()
}

fn mount(line: &[u8]) -> Option<Mount> {
    // ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [OPTIONAL]... - TYPE SOURCE SUPER-OPTIONS
    let mut words = line.split(|byte| *byte == b' ');
    let number = std::str::from_utf8(words.nth(2)?).ok()?.parse().ok()?;
    let point = unescape(words.nth(1)?);
    words.find(|word| *word == b"-")?;
    let kind = String::from_utf8_lossy(words.next()?).into_owned();
    let source = unescape(words.next()?);
    let read_only = words
        .next()?
        .split(|byte| *byte == b',')
        .any(|option| option == b"ro");
    Some(Mount {
        number,
        point: point.into(),
        kind,
        source: source.into(),
        read_only,
    })
}

/// Undoes the octal codes that blanks and backslashes have in lists of the kernel.
fn unescape(text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        let code = match rest {
            [b'\\', digits @ ..] => digits
                .get(..3)
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| u8::from_str_radix(digits, 8).ok()),
            _ => None,
        };
        out.push(code.unwrap_or(*first));
        rest = if code.is_some() { &rest[4..] } else { after };
    }
    OsString::from_vec(out)
}

/// A device or file that is swapped on.
///
/// # Errors
///
/// The list cannot be read.
pub fn swaps() -> Result<Vec<PathBuf>> {
    let path = Path::new("/proc/swaps");
    let text = match fs::read(path) {
        Ok(text) => text,
        // A kernel without swap.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(path, "read", e)),
    };
    let names = text
        .split(|byte| *byte == b'\n')
        .skip(1)
        .filter_map(|line| line.split(|byte| *byte == b' ' || *byte == b'\t').next())
        .filter(|name| !name.is_empty());
    Ok(names.map(|name| unescape(name).into()).collect())
}

/// A loop device that is attached.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Its number.
    pub number: Number,
    /// The file below it, as its name says: the file may be gone, or have another name here.
    pub backing: PathBuf,
    /// Whether it refuses writes.
    pub read_only: bool,
}

/// All loop devices that are attached.
///
/// # Errors
///
/// sysfs cannot be read.
pub fn loops() -> Result<Vec<Attached>> {
    let mut found = Vec::new();
    for entry in list(Path::new("/sys/block"))? {
        let Ok(backing) = fs::read(entry.join("loop/backing_file")) else {
            continue;
        };
        let Some(number) = number_in(&entry) else {
            continue;
        };
        let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
        let read_only = fs::read(entry.join("ro")).is_ok_and(|text| text.starts_with(b"1"));
        found.push(Attached {
            number,
            backing: OsString::from_vec(backing.to_vec()).into(),
            read_only,
        });
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
            .filter_map(|entry| number_in(entry))
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
            .filter_map(|entry| number_in(entry)),
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
    let loops: Vec<(FileId, Number)> = loops()?
        .iter()
        .filter_map(|user| Some((FileId::at(&user.backing).ok()??, user.number)))
        .collect();
    let families = btrfs_families();
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut next = vec![file];
    while let Some(file) = next.pop() {
        if !seen.insert(file) {
            continue;
        }
        let on_it = loops.iter().filter(|(backing, _)| *backing == file);
        next.extend(on_it.map(|(_, number)| number.file_id()));
        if let FileId::Device(device) = file {
            let number = Number::new(device);
            found.push(number);
            next.extend(holders(number)?.into_iter().map(Number::file_id));
            let family = families.iter().filter(|family| family.contains(&number));
            next.extend(family.flatten().map(|number| number.file_id()));
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
                        .filter_map(|entry| number_in(entry))
                        .map(Number::file_id),
                );
                if let Some(disk) = disk_of(&folder) {
                    next.push(disk.file_id());
                }
                if let Ok(backing) = fs::read(folder.join("loop/backing_file")) {
                    let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
                    let path = Path::new(std::ffi::OsStr::from_bytes(backing));
                    next.extend(FileId::at(path).ok().flatten());
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
    number_in(fs::canonicalize(folder).ok()?.parent()?)
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
                .filter_map(|entry| number_in(entry))
                .collect()
        })
        .collect()
}

fn number_in(folder: &Path) -> Option<Number> {
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
    fn lines_of_mounts() {
        let line = b"36 35 98:0 /mnt1 /mnt\\0402\xff\\134 rw,noatime master:1 - ext4 /dev/a\\011b ro,errors=continue";
        let mount = mount(line).unwrap();
        assert_eq!(mount.number, Number(98, 0));
        assert_eq!(mount.point.as_os_str().as_bytes(), b"/mnt 2\xff\\");
        assert_eq!(mount.source, Path::new("/dev/a\tb"));
        assert_eq!(mount.kind, "ext4");
        assert!(mount.read_only);
        assert!(super::mount(b"36 35 98:0 / / rw").is_none());
    }

    #[test]
    fn this_machine_has_mounts() {
        assert!(!mounts().unwrap().is_empty());
        swaps().unwrap();
        loops().unwrap();
    }

    #[test]
    fn a_file_is_below_itself() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let id = FileId::at(file.path()).unwrap().unwrap();
        assert!(below(id).contains(&id));
        assert_eq!(above(id).unwrap(), []);
    }
}
