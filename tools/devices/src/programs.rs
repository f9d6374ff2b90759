// SPDX-License-Identifier: GPL-2.0

//! Running programs of the system.

use std::{
    ffi::OsStr,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
};

use ovbd_layers::error::{Error, Result};

/// Runs a program of the system and returns what it prints.
///
/// # Errors
///
/// It is not installed, or it failed: with what it said.
pub fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<String> {
    let path = Path::new(program);
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        // A Ctrl-C is for us alone: what was begun is completed, then undone.
        .process_group(0)
        .output()
        .map_err(|e| Error::io(path, "run", e))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = errors
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    Err(Error::new(path, said.join("; ")))
}
