// SPDX-License-Identifier: GPL-2.0

//! The `ovbd` command.

use std::process::ExitCode;

use clap::Parser;
use ovbd::{cli::Cli, report::Report};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let report = Report::new(&cli.output, cli.command.wants_json());
    match cli.command.run(&report) {
        Ok(code) => code,
        Err(error) => report.end_with(&error),
    }
}
