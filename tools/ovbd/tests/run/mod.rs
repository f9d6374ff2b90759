// SPDX-License-Identifier: GPL-2.0

//! Running the command in a folder.

#![allow(dead_code)]

use std::{
    path::Path,
    process::{Command, Output},
};

/// The command.
pub const OVBD: &str = env!("CARGO_BIN_EXE_ovbd");

/// Runs `ovbd` with the words of `line`.
pub fn ovbd(folder: &Path, line: &str) -> Output {
    Command::new(OVBD)
        .args(line.split_whitespace())
        .current_dir(folder)
        .output()
        .unwrap()
}

/// Runs a command that must succeed and returns what it prints.
pub fn good(folder: &Path, line: &str) -> String {
    let output = ovbd(folder, line);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{line}: {errors}");
    assert_eq!(errors, "", "{line}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command that must fail with `status` and returns what it prints on stderr.
pub fn bad(folder: &Path, line: &str, status: i32) -> String {
    let output = ovbd(folder, line);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{line}: {errors}");
    errors
}
