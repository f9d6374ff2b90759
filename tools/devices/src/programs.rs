// SPDX-License-Identifier: GPL-2.0

//! Running programs of the system.

use std::{
    ffi::OsStr,
    io::Write as _,
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
    let output = run_with_input(program, arguments, b"")?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// As [`run`], for what it makes of `input`, which is less than a pipe holds.
///
/// # Errors
///
/// As [`run`].
pub fn run_with_input<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
    input: &[u8],
) -> Result<Vec<u8>> {
    let path = Path::new(program);
    let fail = |e| Error::io(path, "run", e);
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A Ctrl-C is for us alone: what was begun is completed, then undone.
        .process_group(0)
        .spawn()
        .map_err(fail)?;
    if let Some(mut pipe) = child.stdin.take() {
        // One that reads nothing says why.
        let _ = pipe.write_all(input);
    }
    let output = child.wait_with_output().map_err(fail)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = errors
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    match said.is_empty() {
        // As one does that crashes.
        true => Err(Error::new(path, format!("says nothing, {}", output.status))),
        false => Err(Error::new(path, said.join("; "))),
    }
}
