// SPDX-License-Identifier: GPL-2.0

//! Writes the man pages and the shell completions into the folder given as argument.

use std::{env, fs, io, path::PathBuf};

use clap::{CommandFactory, ValueEnum};
use clap_complete::{generate_to, Shell};
use ovbd::cli::Cli;

fn main() -> io::Result<()> {
    let Some(folder) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: man FOLDER");
        std::process::exit(2);
    };
    fs::create_dir_all(&folder)?;
    clap_mangen::generate_to(Cli::command(), &folder)?;
    for shell in Shell::value_variants() {
        generate_to(*shell, &mut Cli::command(), "ovbd", &folder)?;
    }
    Ok(())
}
