// SPDX-License-Identifier: GPL-2.0

//! Which file system a stack holds, by libblkid: the snapshotter of containers mounts it with that type.

use std::{
    io::Write,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, PermissionsExt},
    },
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use ovbd_layers::stack::Stack;

/// Bytes at the start and at the end in which file systems and RAID have their marks.
const LOOK_BYTES: u64 = 2 << 20;

/// The type, None if blkid knows none or is not installed.
///
/// # Errors
///
/// What cannot be read from the stack.
pub fn detect(stack: &Stack) -> Result<Option<String>> {
    let size = stack.virtual_bytes();
    let folder = std::env::temp_dir();
    let mut file = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(folder)
        .context("cannot make a temporary file")?;
    file.flush()?;
    let file = file.into_file();
    file.set_len(size)?;
    let mut reader = stack.reader();
    let mut buffer = vec![0; LOOK_BYTES as usize];
    for start in [0, size.saturating_sub(LOOK_BYTES)] {
        let part = &mut buffer[..LOOK_BYTES.min(size - start) as usize];
        reader.read(part, start)?;
        // What is zero stays a hole.
        if part.iter().any(|byte| *byte != 0) {
            file.write_all_at(part, start)?;
        }
    }
    // The file has no name any more: this is the one that this process has for it.
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Ok(ask(Path::new(&path)))
}

/// The type of the file system on a block device, None if blkid knows none or is not installed.
pub fn ask(path: &Path) -> Option<String> {
    let output = Command::new("blkid")
        .args([
            "--probe",
            "--usages",
            "filesystem",
            "--output",
            "value",
            "--match-tag",
            "TYPE",
        ])
        .arg(path)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let found = output
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok());
    found
        .map(|text| text.trim().to_owned())
        .filter(|text| !text.is_empty())
}
