// SPDX-License-Identifier: GPL-2.0

//! What is mounted and what is swapped on.
//!
//! Read from /proc, whose names need not be UTF-8. What cannot be read or understood is an error: not to know a user is
//! not to have none.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use ovbd_kernel::Number;

use crate::{
    block_device::block_number,
    error::{Error, Result},
};

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Number of the mount, which `statx` gives for every file on it. No other mount has it, in any namespace.
    pub id: u64,
    /// Number that the file system has as a device; some have one of their own, and others for their parts.
    pub number: Number,
    /// The root folder of the namespace in which it is mounted, as seen from here.
    pub root: PathBuf,
    /// Where it is mounted, from that root on.
    pub point: PathBuf,
    /// Kind of file system.
    pub kind: String,
    /// What it says it is on; a device in most cases.
    pub source: PathBuf,
    /// The block device of that name.
    pub source_device: Option<Number>,
    /// Options of the file system.
    pub options: Vec<u8>,
    /// Whether the file system refuses writes, through all mounts of it.
    pub read_only: bool,
}

impl Mount {
    /// Whether it is on `device`, as far as number and source show.
    pub fn is_on(&self, device: Number) -> bool {
        self.number == device || self.source_device == Some(device)
    }

    /// A path of its namespace, as seen from here.
    pub fn seen_from_here(&self, path: &Path) -> PathBuf {
        match path.strip_prefix("/") {
            Ok(rest) => self.root.join(rest),
            Err(_) => path.to_owned(),
        }
    }
}

/// All mounts, in every mount namespace in which a program runs; those of our own first.
///
/// # Errors
///
/// A list cannot be read or is not understood.
pub fn mounts() -> Result<Vec<Mount>> {
    let own = Path::new("/proc/self");
    let mut all = read(own, Path::new("/"))?;
    let mut ids: HashSet<u64> = all.iter().map(|mount| mount.id).collect();
    for process in other_namespaces(own)? {
        match read(&process, &process.join("root")) {
            Ok(more) => all.extend(more.into_iter().filter(|mount| ids.insert(mount.id))),
            // It ended, and perhaps its namespace with it. If others are in there, one more look finds one.
            Err(_) if !process.join("ns/mnt").exists() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// A process of every mount namespace but our own.
fn other_namespaces(own: &Path) -> Result<Vec<PathBuf>> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt"));
    let mine = namespace(own).map_err(|e| Error::io(own, "find the mount namespace", e))?;
    let proc = Path::new("/proc");
    let fail = |e| Error::io(proc, "list", e);
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(proc).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        if !name.to_string_lossy().bytes().all(|c| c.is_ascii_digit()) {
            continue;
        }
        match namespace(&entry.path()) {
            Ok(other) if other != mine => {
                found.entry(other).or_insert(entry.path());
            }
            // It ended meanwhile, or is about to.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(found.into_values().collect())
}

fn read(process: &Path, root: &Path) -> Result<Vec<Mount>> {
    let path = process.join("mountinfo");
    let text = fs::read(&path).map_err(|e| Error::io(&path, "read", e))?;
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            mount(line, root).ok_or_else(|| Error::new(&path, "a line that is not understood"))
        })
        .collect()
}

fn mount(line: &[u8], root: &Path) -> Option<Mount> {
    // ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [OPTIONAL]... - TYPE SOURCE SUPER-OPTIONS
    let mut words = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    let number = std::str::from_utf8(words.nth(1)?).ok()?.parse().ok()?;
    let point = unescape(words.nth(1)?);
    words.find(|word| *word == b"-")?;
    let kind = String::from_utf8_lossy(words.next()?).into_owned();
    let source = PathBuf::from(unescape(words.next()?));
    let options = words.next()?;
    Some(Mount {
        id,
        number,
        root: root.to_owned(),
        point: point.into(),
        kind,
        // Others are words, which a file in the current folder may have as its name.
        source_device: block_number(&source).filter(|_| source.is_absolute()),
        source,
        options: unescape(options).into_vec(),
        read_only: options
            .split(|byte| *byte == b',')
            .any(|option| option == b"ro"),
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
                .filter(|digits| digits.iter().all(u8::is_ascii_digit))
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| u8::from_str_radix(digits, 8).ok()),
            _ => None,
        };
        out.push(code.unwrap_or(*first));
        rest = if code.is_some() { &rest[4..] } else { after };
    }
    OsString::from_vec(out)
}

/// The devices and files that are swapped on.
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
    Ok(swap_names(&text))
}

fn swap_names(text: &[u8]) -> Vec<PathBuf> {
    text.split(|byte| *byte == b'\n')
        .skip(1)
        .filter_map(|line| line.split(|byte| matches!(byte, b' ' | b'\t')).next())
        .filter(|name| !name.is_empty())
        .map(|name| unescape(name).into())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn lines_of_mounts() {
        let root = Path::new("/proc/1/root");
        let line = b"36 35 98:0 /mnt1 /mnt\\0402\xff\\134 rw,noatime master:1 - ext4 /dev/a\\011b ro,errors=continue";
        let mount = mount(line, root).unwrap();
        assert_eq!(mount.id, 36);
        assert_eq!(mount.number, Number(98, 0));
        assert_eq!(mount.point.as_os_str().as_bytes(), b"/mnt 2\xff\\");
        assert_eq!(mount.source, Path::new("/dev/a\tb"));
        assert_eq!(mount.kind, "ext4");
        assert!(mount.read_only);
        assert_eq!(
            mount.seen_from_here(&mount.point).as_os_str().as_bytes(),
            b"/proc/1/root/mnt 2\xff\\"
        );
        assert!(super::mount(b"36 35 98:0 / / rw", root).is_none());
    }

    #[test]
    fn lines_of_swaps() {
        let text = b"Filename\tType\tSize\tUsed\tPriority\n/dev/a\\040b  partition\t1\t0\t-2\n/swap\xff\tfile\t1\t0\t-3\n";
        let names = swap_names(text);
        assert_eq!(names[0], Path::new("/dev/a b"));
        assert_eq!(names[1].as_os_str().as_bytes(), b"/swap\xff");
        assert_eq!(names.len(), 2);
    }

    #[test]
    fn this_machine_has_mounts() {
        let found = mounts().unwrap();
        assert!(found.iter().any(|mount| mount.kind == "proc"));
        swaps().unwrap();
    }
}
