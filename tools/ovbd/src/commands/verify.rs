// SPDX-License-Identifier: GPL-2.0

//! `ovbd verify`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_layers::{
    blob::Blob,
    layer::LayerPath,
    report::Report as _,
    tar::original::{DiffId, Original},
    verify::{verify, Finding, State},
};

use crate::{
    cli::{self, status, Parents, Threads},
    names::{Layers, Need},
    report::Report,
};

/// Check every checksum, bound and invariant, and list all that is wrong.
///
/// The last line says what was checked. Of layers without checksums only the structure can be checked.
///
/// With --diff-id the original tar that a layer begins with must have that digest: then the layer is what the original image
/// says, whoever made it.
///
/// Exit status: 0 all is sound, 1 something is damaged, 3 something could not be read.
#[derive(Debug, Args)]
pub struct Verify {
    /// Print errors and the verdict as JSON
    #[arg(long)]
    pub json: bool,
    /// Check that LAYER holds the original tar of this digest, sha256:...; once for each LAYER, bottom first
    #[arg(long, value_name = "DIGEST")]
    pub diff_id: Vec<DiffId>,
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
        let layers = self.layers.resolve(Need::All, report)?;
        let ids = &self.diff_id;
        if !ids.is_empty() && ids.len() != layers.len() {
            let (ids, layers) = (ids.len(), layers.len());
            let what = format!("--diff-id is given {ids} times for {layers} layers");
            cli::wrong_usage("verify", what);
        }
        report.begin("verifying", layers.iter().map(size).sum());
        let verdict = self.threads.run(|| {
            let parents = self.parents.unless_alone();
            let mut found = |finding| match finding {
                Finding::Problem(error) => report.error(&error.into()),
                Finding::Warning(error) => report.warn(&error),
            };
            let mut verdict = verify(&layers, parents, report, &mut found);
            for (layer, id) in layers.iter().zip(ids) {
                let blob = Blob::open(layer.data());
                // What can be read is hashed even where something else is wrong.
                let checked = blob.and_then(|blob| Original::of(&blob)?.check(*id, &()));
                if let Err(error) = checked {
                    verdict.add(Finding::Problem(error), &mut found);
                }
            }
            Ok(verdict)
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
