// SPDX-License-Identifier: GPL-2.0

//! The verbs: what each takes and does.

pub mod build;
pub mod commit;
pub mod down;
pub mod export;
pub mod info;
pub mod ls;
pub mod up;
pub mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

use crate::report::Report;

/// What to do.
// The texts of the help are on the structures: a comment here would hide them.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum Command {
    Build(build::Build),
    Export(export::Export),
    Verify(verify::Verify),
    Info(info::Info),
    Up(up::Up),
    Down(down::Down),
    Ls(ls::Ls),
    Commit(commit::Commit),
}

impl Command {
    /// Whether the answer is to be JSON, errors too.
    pub fn wants_json(&self) -> bool {
        match self {
            Command::Info(info) => info.json,
            Command::Ls(ls) => ls.json,
            Command::Verify(verify) => verify.json,
            _ => false,
        }
    }

    /// Does it; returns the exit status.
    ///
    /// # Errors
    ///
    /// Why it could not be done.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        match self {
            Command::Build(build) => build.run(report),
            Command::Export(export) => export.run(report),
            Command::Verify(verify) => verify.run(report),
            Command::Info(info) => info.run(report),
            Command::Up(up) => up.run(report),
            Command::Down(down) => down.run(report),
            Command::Ls(ls) => ls.run(report),
            Command::Commit(commit) => commit.run(report),
        }
    }
}
