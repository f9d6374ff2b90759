// SPDX-License-Identifier: GPL-2.0

//! Damaged images, read through the kernel's targets and through the tools: both must refuse them, or both
//! must give the same bytes and fail for the same sectors.
//!
//! `run` needs loop devices over files that it may overwrite and a parent that maps devices (see [`device`]), and
//! prints TAP with one test for each base.
//! `write` makes one mutant as files, to look at what a failed test names.

mod compare;
mod device;
mod watch;

use std::{
    collections::BTreeMap,
    env, fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{bail, Context, Result};
use ovbd_cases::{
    base::{bases, Base},
    mutate::{mutant, Mutant},
};

use compare::{Outcome, Reader};
use device::Slot;
use watch::Watch;

const USAGE: &str = "usage: ovbd-mutants run CASES FIRST COUNT PART/PARTS FILE=DEVICE...
       ovbd-mutants write CASES BASE:NUMBER FOLDER
       ovbd-mutants list CASES";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["run", cases, first, count, part, slots @ ..] => {
            run(Path::new(cases), first, count, part, slots)
        }
        ["write", cases, name, folder] => write(Path::new(cases), name, Path::new(folder)),
        ["list", cases] => list(Path::new(cases)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("ovbd-mutants: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn all_bases(cases: &Path) -> Result<Vec<Base>> {
    bases(cases).map_err(|e| anyhow::anyhow!("{e}"))
}

fn list(cases: &Path) -> Result<bool> {
    for base in all_bases(cases)? {
        println!("{} ({} layers)", base.name, base.layers.len());
    }
    Ok(true)
}

fn write(cases: &Path, name: &str, folder: &Path) -> Result<bool> {
    let (name, number) = name
        .split_once(':')
        .context("a mutant is named BASE:NUMBER")?;
    let bases = all_bases(cases)?;
    let base = bases
        .iter()
        .find(|base| base.name == name)
        .context("there is no such base")?;
    let mutant = mutant(base, number.parse().context("NUMBER is a number")?);
    fs::create_dir_all(folder)?;
    for (number, blob) in mutant.layers.iter().enumerate() {
        fs::write(folder.join(format!("layer{number}")), blob)?;
    }
    println!("layer {}: {}", mutant.damaged, mutant.what);
    Ok(true)
}

/// `count` mutants for each base of a part, from number `first` on.
fn run(cases: &Path, first: &str, count: &str, part: &str, slots: &[&str]) -> Result<bool> {
    let first: u64 = first.parse().context("FIRST is a number")?;
    let count: u64 = count.parse().context("COUNT is a number")?;
    let (part, parts) = part.split_once('/').context("a part is named PART/PARTS")?;
    let part: usize = part.parse().context("PART is a number")?;
    let parts: NonZeroUsize = parts.parse().context("PARTS is a number")?;
    let bases: Vec<Base> = all_bases(cases)?
        .into_iter()
        .skip(part)
        .step_by(parts.get())
        .collect();
    let slots = slots
        .iter()
        .map(|slot| Slot::open(slot))
        .collect::<Result<Vec<_>>>()?;
    let mut runner = Runner {
        reader: Reader::default(),
        watch: Watch::start(),
        files: tempfile::tempdir()?,
        slots,
    };
    println!("TAP version 13");
    let mut good = true;
    let mut total = BTreeMap::new();
    for (test, base) in (1..).zip(&bases) {
        let mut counts: BTreeMap<Outcome, u64> = BTreeMap::new();
        let mut different = Vec::new();
        runner.prepare(base)?;
        let start = Instant::now();
        for number in first..first + count {
            let mutant = mutant(base, number);
            runner.watch.begin(format!(
                "{}:{number} (layer {}: {})",
                base.name, mutant.damaged, mutant.what
            ));
            match runner.one(&mutant)? {
                Outcome::Different(how) => {
                    different.push(format!(
                        "# {}:{number}: {how}\n#   {}",
                        base.name, mutant.what
                    ));
                }
                outcome => *counts.entry(outcome).or_default() += 1,
            }
        }
        runner.watch.end();
        let numbers: Vec<String> = counts
            .iter()
            .map(|(what, n)| format!("{n} {}", what.name()))
            .collect();
        let not = if different.is_empty() { "" } else { "not " };
        println!(
            "{not}ok {test} - {}, {count} mutants: {}",
            base.name,
            numbers.join(", ")
        );
        println!("# {:.1} s", start.elapsed().as_secs_f32());
        for how in &different {
            println!("{how}");
        }
        good &= different.is_empty();
        for (what, n) in counts {
            *total.entry(what.name()).or_insert(0) += n;
        }
    }
    println!("# {} mutants: {total:?}", count * bases.len() as u64);
    let test = bases.len() + 1;
    let lowest = runner.watch.most_memory_mib();
    // Whatever a damaged header announces, memory follows what the file really holds.
    let not = if lowest <= 256 { "" } else { "not " };
    println!("{not}ok {test} - memory stays bounded (at most {lowest} MiB in use)\n1..{test}");
    Ok(good && lowest <= 256)
}

/// What is needed to read one mutant after the other.
struct Runner {
    reader: Reader,
    watch: Watch,
    /// The layers for the tools, with their exact length.
    files: tempfile::TempDir,
    /// The layers for the kernel, on devices that are longer.
    slots: Vec<Slot>,
}

impl Runner {
    fn path(&self, number: usize) -> PathBuf {
        self.files.path().join(format!("layer{number}"))
    }

    /// Writes the sound layers of `base`; of a mutant only the damaged one is written.
    fn prepare(&mut self, base: &Base) -> Result<()> {
        if base.layers.len() > self.slots.len() {
            bail!(
                "{} has {} layers, more than devices",
                base.name,
                base.layers.len()
            );
        }
        for (number, layer) in base.layers.iter().enumerate() {
            fs::write(self.path(number), &layer.blob)?;
            self.slots[number].write(&layer.blob)?;
        }
        Ok(())
    }

    fn one(&mut self, mutant: &Mutant) -> Result<Outcome> {
        let number = mutant.damaged;
        let intact = fs::read(self.path(number))?;
        let damaged = &mutant.layers[number];
        fs::write(self.path(number), damaged)?;
        self.slots[number].write(damaged)?;
        let paths: Vec<PathBuf> = (0..mutant.layers.len()).map(|n| self.path(n)).collect();
        let outcome = self
            .reader
            .compare(&paths, &self.slots[..paths.len()], &mutant.layers);
        fs::write(self.path(number), &intact)?;
        self.slots[number].write(&intact)?;
        outcome
    }
}
