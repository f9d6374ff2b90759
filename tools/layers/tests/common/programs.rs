// SPDX-License-Identifier: GPL-2.0

//! What tests need of the machine: programs, and a mount namespace. Without it they say so in a line that begins with
//! "skipped: ", which `make test` counts. The toolchain root has every program, so that none can get lost there unseen.

#![allow(dead_code, missing_docs)]

use std::{env, fmt::Display, process::Command};

fn in_toolchain_root() -> bool {
    env::var_os("OVBD_INSIDE").is_some()
}

/// Says why a test or a part of it is skipped.
pub fn skip(why: impl Display) {
    println!("skipped: {why}");
}

/// Whether a program is installed.
pub fn has(program: &str) -> bool {
    // Administration is not in everybody's path.
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = env::split_paths(&path).any(|folder| folder.join(program).is_file());
    assert!(
        found || !in_toolchain_root(),
        "{program} is missing in the toolchain root"
    );
    if !found {
        skip(format!("{program} is not installed"));
    }
    found
}

/// The start of a command in a mount namespace of its own.
pub fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.arg("--mount");
    // Who is in the toolchain root has such a namespace already, and no mount at / whose kind could be changed.
    if in_toolchain_root() {
        command.args(["--propagation", "unchanged"]);
    }
    command
}
