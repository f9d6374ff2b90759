// SPDX-License-Identifier: GPL-2.0

//! Reads damaged manifests, indexes, configurations and names of images: a fixed number of them, the same ones for the
//! same seed. Errors are fine, panics are bugs.

use std::{env, process::ExitCode};

use ovbd_cases::documents::{check, damaged, SOUND};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let numbers = match args.as_slice() {
        [runs] => (runs.parse(), Ok(1)),
        [runs, seed] => (runs.parse(), seed.parse()),
        _ => {
            eprintln!("usage: ovbd-fuzz-documents RUNS [SEED]");
            return ExitCode::from(2);
        }
    };
    let (Ok(runs), Ok(seed)) = numbers else {
        eprintln!("ovbd-fuzz-documents: RUNS and SEED are numbers");
        return ExitCode::from(2);
    };
    for sound in SOUND {
        assert!(check(sound), "a sound document is refused");
    }
    let mut accepted = 0;
    for run in 0..runs {
        let number = u64::wrapping_shl(seed, 40).wrapping_add(run);
        let data = damaged(number);
        let checked = std::panic::catch_unwind(|| check(&data));
        match checked {
            Ok(good) => accepted += u64::from(good),
            Err(_) => {
                eprintln!("ovbd-fuzz-documents: {number}: {}", data.escape_ascii());
                return ExitCode::FAILURE;
            }
        }
    }
    println!(
        "{runs} documents and names: {accepted} accepted, {} refused",
        runs - accepted
    );
    ExitCode::SUCCESS
}
