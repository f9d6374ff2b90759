// SPDX-License-Identifier: GPL-2.0

//! `ovbd ls`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_devices::list::List;

use crate::report::Report;

/// List the stacks that are up: their layers, sizes, and errors.
#[derive(Debug, Args)]
pub struct Ls {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl Ls {
    /// Prints the list.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let list = List::new()?;
        match self.json {
            true => report.print(&(serde_json::to_string_pretty(&list)? + "\n")),
            false => report.print(&list.to_string()),
        }
    }
}
