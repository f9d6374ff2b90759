// SPDX-License-Identifier: GPL-2.0

//! Writes the man pages and the shell completions into the folder given as argument.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use clap::{CommandFactory, ValueEnum};
use clap_complete::{generate_to, Shell};
use clap_mangen::Man;
use ovbd::cli::Cli;

fn main() -> io::Result<()> {
    let Some(folder) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: man FOLDER");
        std::process::exit(2);
    };
    fs::create_dir_all(&folder)?;
    write_pages(Cli::command().disable_help_subcommand(true), &folder)?;
    for shell in Shell::value_variants() {
        generate_to(*shell, &mut Cli::command(), "ovbd", &folder)?;
    }
    Ok(())
}

/// The page of a command and those of its verbs, in the section for administrators.
fn write_pages(command: clap::Command, folder: &Path) -> io::Result<()> {
    let mut command = command;
    // Names the verbs in full.
    command.build();
    for page in command.get_subcommands().chain([&command]) {
        let name = page.get_display_name().unwrap_or(page.get_name());
        let mut text = Vec::new();
        Man::new(page.clone()).section("8").render(&mut text)?;
        fs::write(folder.join(format!("{name}.8")), text)?;
    }
    Ok(())
}
