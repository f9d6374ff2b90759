// SPDX-License-Identifier: GPL-2.0

//! `ovbd verify`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_layers::{
    layer::LayerPath,
    report::Report as _,
    verify::{verify, Finding, State},
};

use crate::{
    cli::{status, Parents, Threads},
    names::Layers,
    report::Report,
};

/// Check every checksum, bound and invariant, and list all that is wrong.
///
/// The last line says what was checked. Of layers without checksums only the structure can be checked.
///
/// Exit status: 0 all is sound, 1 something is damaged, 3 something could not be read.
#[derive(Debug, Args)]
pub struct Verify {
    /// Print errors and the verdict as JSON
    #[arg(long)]
    pub json: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Layers.
    #[command(flatten)]
    pub layers: Layers,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
}

impl Verify {
    /// Checks the layers.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let size = |path: &LayerPath| std::fs::metadata(path.data()).map_or(0, |found| found.len());
        let layers = self.layers.resolve()?;
        report.begin("verifying", layers.iter().map(size).sum());
        let verdict = self.threads.run(|| {
            let parents = self.parents.unless_alone();
            Ok(verify(
                &layers,
                parents,
                report,
                &mut |finding| match finding {
                    Finding::Problem(error) => report.error(&error.into()),
                    Finding::Warning(error) => report.warn(&error),
                },
            ))
        })?;
        if self.json {
            report.print(&(serde_json::to_string_pretty(&verdict)? + "\n"))?;
        } else if !report.is_quiet() {
            report.print(&format!("{verdict}\n"))?;
        }
        Ok(match verdict.state {
            State::Sound => ExitCode::SUCCESS,
            State::Damaged => ExitCode::FAILURE,
            State::Unreadable => ExitCode::from(status::CANNOT_TELL),
        })
    }
}
