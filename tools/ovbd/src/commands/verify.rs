// SPDX-License-Identifier: GPL-2.0

//! `ovbd verify`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_layers::{
    layer::LayerPath,
    report::Report as _,
    verify::{verify, Finding},
};

use crate::{
    cli::{self, Parents, Threads},
    report::Report,
};

/// Check every checksum, bound and invariant, and list all that is wrong.
#[derive(Debug, Args)]
pub struct Verify {
    /// Print errors as JSON
    #[arg(long)]
    pub json: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Layers, bottom first
    #[arg(required = true, value_name = "LAYER", value_parser = cli::layer(), value_hint = ValueHint::FilePath)]
    pub layers: Vec<LayerPath>,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
}

impl Verify {
    /// Checks the layers.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let size = |path: &LayerPath| std::fs::metadata(path.data()).map_or(0, |found| found.len());
        report.begin("verifying", self.layers.iter().map(size).sum());
        let problems = self.threads.run(|| {
            let parents = self.parents.unless_alone();
            Ok(verify(
                &self.layers,
                parents,
                report,
                &mut |finding| match finding {
                    Finding::Problem(error) => report.error(&error.into()),
                    Finding::Warning(error) => report.warn(&error),
                },
            ))
        })?;
        Ok(match problems {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }
}
