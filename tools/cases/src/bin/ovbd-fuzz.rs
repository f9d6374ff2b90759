// SPDX-License-Identifier: GPL-2.0

//! Reads files that were damaged at random: a fixed number of them, the same ones for the same seed.
//!
//! This is the short form that runs with any compiler; `tools/fuzz` has the targets for libFuzzer.

use std::{
    env,
    error::Error,
    io,
    panic::{catch_unwind, resume_unwind, AssertUnwindSafe},
    path::Path,
    process::ExitCode,
};

use ovbd_cases::{
    base::bases,
    fuzz::Fuzzer,
    mutate::{damage, mutant},
    random::Random,
};

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [folder, runs, rest @ ..] = args.as_slice() else {
        eprintln!("usage: ovbd-fuzz FOLDER RUNS [SEED]");
        return ExitCode::from(2);
    };
    let numbers = (
        runs.parse(),
        rest.first().map_or("1", String::as_str).parse(),
    );
    let (Ok(runs), Ok(seed)) = numbers else {
        eprintln!("ovbd-fuzz: RUNS and SEED are numbers");
        return ExitCode::from(2);
    };
    match run(Path::new(folder), runs, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ovbd-fuzz: {folder}: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(folder: &Path, runs: u64, seed: u64) -> Result<(), Box<dyn Error>> {
    let bases = bases(folder)?;
    let fuzzer = Fuzzer::new()?;
    for run in 0..runs {
        let number = seed.wrapping_mul(runs).wrapping_add(run);
        let mut random = Random::new(number);
        let base = random.choose(&bases);
        // Whoever sees the panic can make that one mutant again.
        let name = format!("{}:{number}", base.name);
        let done = if random.below(4) == 0 {
            let mut log = random.choose(&bases).layers[0].blob.clone();
            damage(&mut log, &mut random, &mut Vec::new());
            panic_names(&name, || fuzzer.pair(&base.layers[0].blob, &log))
        } else {
            panic_names(&name, || fuzzer.stack(&mutant(base, number).layers))
        };
        done?;
    }
    println!("{runs} runs over {} bases", bases.len());
    Ok(())
}

/// Runs `work`; names the mutant where that panics.
fn panic_names(name: &str, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        eprintln!("ovbd-fuzz: this was {name}");
        resume_unwind(panic)
    })
}
