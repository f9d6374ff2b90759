// SPDX-License-Identifier: GPL-2.0

//! The `ovbd` command.

use std::process::ExitCode;

use ovbd::{cli, report::Report};

fn main() -> ExitCode {
    let cli = match cli::parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    let report = Report::new(&cli.output, cli.command.wants_json());
    match cli.command.run(&report) {
        Ok(code) => code,
        Err(error) => report.end_with(&error),
    }
}
