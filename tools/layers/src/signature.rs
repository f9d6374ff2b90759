// SPDX-License-Identifier: GPL-2.0

//! What a file or block device holds already, so that nothing is taken for empty that is not.
//!
//! Whether there is a file system, a partition table, a volume or a member of one, wipefs knows, of which every
//! Debian has one that fits. What it does not know is empty only if it starts with zeros for a MiB.

use std::{
    io,
    path::Path,
    process::{Command, Output, Stdio},
};

use ovbd_image::{lsmt, zfile};

use crate::{
    error::{Error, Result},
    file_range::FileRange,
    zeros::is_zero,
};

/// Bytes at the start that must be zero.
const BLANK_BYTES: usize = 1 << 20;

/// What the file or device at `path` holds, in a few words; `None` if it is blank.
///
/// # Errors
///
/// It cannot be read, or wipefs cannot be run: then nothing is known.
pub fn find(path: &Path) -> Result<Option<String>> {
    let file = FileRange::open(path)?;
    let first = file.first(BLANK_BYTES)?;
    if lsmt::Header::recognise(&first) || zfile::Header::recognise(&first) {
        return Ok(Some("a layer or ZFile".to_owned()));
    }
    let known = signatures(path)?;
    if !known.is_empty() {
        return Ok(Some(known.join(" and ")));
    }
    Ok((!is_zero(&first)).then(|| "data of an unknown kind".to_owned()))
}

/// The kinds of all signatures that wipefs finds, each once.
fn signatures(path: &Path) -> Result<Vec<String>> {
    let fail = |e| {
        let what = "look for what it holds with wipefs";
        Error::io(path, what, e)
    };
    let output = run(path).map_err(fail)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(fail(io::Error::other(said.trim().to_owned())));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut kinds: Vec<String> = Vec::new();
    for kind in text.lines().map(str::trim).filter(|kind| !kind.is_empty()) {
        if !kinds.iter().any(|known| known == kind) {
            kinds.push(kind.to_owned());
        }
    }
    Ok(kinds)
}

fn run(path: &Path) -> io::Result<Output> {
    // The path of root alone has sbin.
    for program in ["wipefs", "/usr/sbin/wipefs", "/sbin/wipefs"] {
        let result = Command::new(program)
            .env("LC_ALL", "C")
            .args(["--noheadings", "--output", "TYPE", "--"])
            .arg(path)
            .stdin(Stdio::null())
            .output();
        match result {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn blank_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = File::create(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        assert_eq!(find(&path).unwrap(), None);
        for (at, bytes, kind) in [
            (0, &b"x"[..], "data of an unknown kind"),
            (BLANK_BYTES - 1, b"x", "data of an unknown kind"),
            (
                0,
                b"LSMT\0\x01\x02\0\x65\x7e\x63\xd2\x94\x44\x08\x4c\xa2\xd2\xc8\xec\x4f\xcf\xae\x8a",
                "a layer or ZFile",
            ),
        ] {
            let mut content = vec![0; 4 << 20];
            content[at..at + bytes.len()].copy_from_slice(bytes);
            fs::write(&path, content).unwrap();
            let found = find(&path).unwrap().unwrap();
            assert!(found.contains(kind), "{found}");
        }
        assert!(find(&folder.path().join("missing")).is_err());
    }
}
