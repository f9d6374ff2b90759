// SPDX-License-Identifier: GPL-2.0

//! Reads files that were damaged at random: a fixed number of them, the same ones for the same seed.
//!
//! This is the short form that runs with any compiler; `tools/fuzz` has the targets for libFuzzer.

use std::{env, error::Error, path::Path, process::ExitCode};

use ovbd_cases::fuzz::{corpus, repair, Fuzzer};

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
    let files = corpus(folder)?;
    if files.is_empty() {
        return Err("no files to start from".into());
    }
    let fuzzer = Fuzzer::new()?;
    let mut random = Random(seed.wrapping_mul(2) | 1);
    for run in 0..runs {
        let state = random.0;
        // Whoever sees the panic can start again right here.
        let input = run_one(&fuzzer, &files, &mut random);
        input.map_err(|e| format!("run {run}, state {state:#x}: {e}"))?;
    }
    println!("{runs} runs over {} files", files.len());
    Ok(())
}

fn run_one(fuzzer: &Fuzzer, files: &[Vec<u8>], random: &mut Random) -> Result<(), Box<dyn Error>> {
    let mut data = random.choose(files).clone();
    for _ in 0..=random.below(3) {
        random.damage(&mut data, files);
    }
    if random.below(2) == 0 {
        repair(&mut data);
    }
    if random.below(4) == 0 {
        let other = random.choose(files);
        return Ok(fuzzer.pair(other, &data)?);
    }
    Ok(fuzzer.blob(&data)?)
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        ((self.next() >> 11) % limit.max(1) as u64) as usize
    }

    fn choose<'a>(&mut self, files: &'a [Vec<u8>]) -> &'a Vec<u8> {
        &files[self.below(files.len())]
    }

    /// Where damage hurts: in the header, the trailer or the index, else anywhere.
    fn place(&mut self, len: usize) -> usize {
        match self.below(4) {
            0 => self.below(len.min(160)),
            1 => len - 1 - self.below(len.min(512)),
            2 => len - 1 - self.below(len.min(4096 + 512)),
            _ => self.below(len),
        }
    }

    fn damage(&mut self, data: &mut Vec<u8>, files: &[Vec<u8>]) {
        if data.is_empty() {
            return;
        }
        let at = self.place(data.len());
        match self.below(8) {
            0 => data.truncate(at),
            1 => data[at] ^= 1 << self.below(8),
            2 | 3 => {
                let value = match self.below(4) {
                    0 => 0,
                    1 => u64::MAX - self.below(16) as u64,
                    2 => 1 << self.below(64),
                    _ => self.below(1 << 20) as u64,
                };
                let n = (1 << self.below(4)).min(data.len() - at);
                data[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
            }
            4 => {
                let n = self.below(64).min(data.len() - at);
                let from = self.below(data.len() - n);
                data.copy_within(from..from + n, at);
            }
            5 => {
                let other = self.choose(files);
                let n = self.below(4096).min(other.len()).min(data.len() - at);
                data[at..at + n].copy_from_slice(&other[..n]);
            }
            6 => {
                let n = self.below(600);
                data.splice(at..at, std::iter::repeat_n(0, n));
            }
            _ => {
                let end = (at + self.below(600)).min(data.len());
                data.drain(at..end);
            }
        }
    }
}
