// SPDX-License-Identifier: GPL-2.0

//! `ovbd commit`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_devices::{commit, Interrupt};

use crate::{
    cli::{NewLayer, UnknownStorage},
    report::Report,
};

/// Make a layer of what was written to a stack since "ovbd up --writable".
///
/// The device stays up and as it was, and is suspended while its changes are read: programs that use it wait.
/// Only what was written is read. The layer is one for the layers that the device was brought up with.
#[derive(Debug, Args)]
pub struct Commit {
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// Storage that does not tell where it is.
    #[command(flatten)]
    pub unknown: UnknownStorage,
    /// Name of the device below /dev/mapper
    #[arg(value_name = "NAME")]
    pub name: String,
}

impl Commit {
    /// Makes the layer.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let options = self.layer.options("commit", Vec::new(), false);
        let interrupt = Interrupt::install()?;
        report.begin("committing", 0);
        self.layer.threads.run(|| {
            Ok(commit::commit(
                &self.name,
                &self.layer.output,
                &options,
                self.unknown.assume_elsewhere,
                &interrupt,
                report,
            )?)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
