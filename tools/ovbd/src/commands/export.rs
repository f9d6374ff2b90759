// SPDX-License-Identifier: GPL-2.0

//! `ovbd export`.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_layers::{export, layer::LayerPath, output::Rules, stack_or_zfile::StackOrZfile, Error};

use crate::{
    cli::{self, Parents, Threads},
    names::Layers,
    report::{Report, STDOUT},
};

/// Write the content of a stack to a raw image.
///
/// The image is sparse where the stack is zero, and nothing is left behind on failure. A single ZFile that
/// holds no layer gives its own content. OUT can be a block device that nothing uses.
#[derive(Debug, Args)]
pub struct Export {
    /// Layers.
    #[command(flatten)]
    pub layers: Layers,
    /// The file to make, or - for standard output
    #[arg(short, long = "output", value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Replace OUT if it is a file that exists
    #[arg(short, long)]
    pub force: bool,
    /// Overwrite what OUT holds if it is a block device
    #[arg(long)]
    pub overwrite_device: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
}

impl Export {
    /// Writes the image.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let layers = self.layers.resolve()?;
        let source = StackOrZfile::open(&layers, self.parents.of_device())?;
        report.begin("exporting", source.bytes());
        cli::clean_up_on_signals()?;
        self.threads.run(|| {
            if self.output == Path::new("-") {
                let mut out = io::stdout();
                export::to_writer(&source, &mut out, Path::new(STDOUT), report)?;
                out.flush()
                    .map_err(|e| Error::io(Path::new(STDOUT), "write", e))?;
                return Ok(());
            }
            let inputs = layers.iter().flat_map(LayerPath::files);
            let inputs: Vec<PathBuf> = inputs.map(Path::to_owned).collect();
            let rules = Rules {
                replace: self.force,
                overwrite_device: self.overwrite_device,
                inputs: &inputs,
            };
            Ok(export::to_file(&source, &self.output, rules, report)?)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
