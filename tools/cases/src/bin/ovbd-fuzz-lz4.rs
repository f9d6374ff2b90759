// SPDX-License-Identifier: GPL-2.0

//! Decodes LZ4 blocks, many of them damaged, with our decoders and those of others: a fixed number of them, the same
//! ones for the same seed.
//!
//! The first few are decoded between guard pages on all sides and with every number of readable bytes behind them.

use std::{env, process::ExitCode};

use ovbd_cases::lz4::{generate, Checker};

/// Inputs that are decoded everywhere.
const EVERYWHERE: u64 = 200;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [runs, rest @ ..] = args.as_slice() else {
        eprintln!("usage: ovbd-fuzz-lz4 RUNS [SEED]");
        return ExitCode::from(2);
    };
    let numbers = (
        runs.parse(),
        rest.first().map_or("1", String::as_str).parse(),
    );
    let (Ok(runs), Ok(seed)) = numbers else {
        eprintln!("ovbd-fuzz-lz4: RUNS and SEED are numbers");
        return ExitCode::from(2);
    };
    match run(runs, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ovbd-fuzz-lz4: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(runs: u64, seed: u64) -> Result<(), String> {
    let mut checker = Checker::new().map_err(|e| e.to_string())?;
    for run in 0..runs {
        let number = seed.wrapping_shl(40).wrapping_add(run);
        let input = generate(number);
        let checked = match run {
            0..EVERYWHERE => checker.check_everywhere(&input),
            _ => checker.check(&input),
        };
        checked.map_err(|e| format!("input {number}: {e}: {input:?}"))?;
    }
    let counts = &checker.counts;
    let all = counts.accepted + counts.refused + counts.lax;
    println!(
        "{all} lz4 blocks: {} valid, {} refused, {} refused that liblz4 accepts against the rules",
        counts.accepted, counts.refused, counts.lax
    );
    Ok(())
}
