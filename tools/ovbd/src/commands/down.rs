// SPDX-License-Identifier: GPL-2.0

//! `ovbd down`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_devices::{down, Interrupt};

use crate::report::Report;

/// Remove the block device of a stack, and all below it that "ovbd up" made.
///
/// A device that is mounted or otherwise in use stays. What was written to it is kept if it was brought up with
/// --cow.
#[derive(Debug, Args)]
pub struct Down {
    /// Name of the device below /dev/mapper
    #[arg(value_name = "NAME")]
    pub name: String,
}

impl Down {
    /// Removes it.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        down::down(&self.name, &Interrupt::install()?, report)?;
        Ok(ExitCode::SUCCESS)
    }
}
