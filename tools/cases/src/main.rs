// SPDX-License-Identifier: GPL-2.0

//! Runs every case of the folders given as arguments, prints TAP, and fails if any case differs.

use std::{env, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let mut cases = Vec::new();
    for folder in env::args_os().skip(1).map(PathBuf::from) {
        match ovbd_cases::find(&folder) {
            Ok(found) => cases.extend(found),
            Err(e) => {
                eprintln!("ovbd-cases: {}: {e}", folder.display());
                return ExitCode::from(2);
            }
        }
    }
    if cases.is_empty() {
        eprintln!("usage: ovbd-cases FOLDER...\n\nNo folder with a case.json was found.");
        return ExitCode::from(2);
    }
    println!("TAP version 13\n1..{}", cases.len());
    let mut different = Vec::new();
    for (number, case) in (1..).zip(&cases) {
        let name = case
            .file_name()
            .unwrap_or(case.as_os_str())
            .to_string_lossy();
        match ovbd_cases::run(case) {
            Ok(()) => println!("ok {number} - {name}"),
            Err(how) => {
                println!("not ok {number} - {name}\n# {how}");
                different.push(name.to_string());
            }
        }
    }
    if different.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("# {} differ: {}", different.len(), different.join(" "));
    ExitCode::FAILURE
}
