// SPDX-License-Identifier: GPL-2.0

//! `ovbd export`.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_layers::{
    blob::Blob,
    export,
    layer::LayerPath,
    output::{Rules, Stream},
    stack_or_zfile::StackOrZfile,
    tar::original::Original,
    units, Error,
};

use crate::{
    cli::{self, Parents, Threads},
    names::{Layers, Need},
    report::{Report, STDOUT},
};

/// Write the content of a stack to a raw image.
///
/// The image is sparse where the stack is zero, and nothing is left behind on failure. A single ZFile that
/// holds no layer gives its own content. OUT can be a block device that nothing uses.
///
/// With --tar it is the original tar that a layer begins with instead, the same bytes that "ovbd build --from-tar" was given,
/// without their compression.
#[derive(Debug, Args)]
pub struct Export {
    /// Layers.
    #[command(flatten)]
    pub layers: Layers,
    /// The file to make, or - for standard output
    #[arg(short, long = "output", value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Write the original tar of the layer, of several of layer N: the lowest is 0
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, conflicts_with = "overwrite_device")]
    pub tar: Option<Option<usize>>,
    /// Replace OUT if it is a file that exists
    #[arg(short, long)]
    pub force: bool,
    /// Overwrite what OUT holds if it is a block device
    #[arg(long)]
    pub overwrite_device: bool,
    /// Refuse a stack that holds more than this [default: what the file system of OUT has left]
    #[arg(long, value_name = "BYTES", value_parser = units::parse)]
    pub max_size: Option<u64>,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
}

impl Export {
    /// Refuses what would fill the disk: a few bytes can claim to be large.
    fn check_size(&self, what: &str, holds: u64) -> Result<()> {
        let is_file = self.output != Path::new("-")
            && !fs::metadata(&self.output).is_ok_and(|found| !found.is_file());
        let folder = self
            .output
            .parent()
            .filter(|folder| *folder != Path::new(""));
        let left = || {
            let space = rustix::fs::statvfs(folder.unwrap_or(Path::new("."))).ok()?;
            Some(space.f_bavail.saturating_mul(space.f_frsize))
        };
        let most = match self.max_size {
            Some(most) => most,
            None if is_file => left().unwrap_or(u64::MAX),
            None => u64::MAX,
        };
        if holds > most {
            let what = format!(
                "{what} holds {}, and {} {} (--max-size allows more)",
                units::size(holds),
                units::size(most),
                if self.max_size.is_some() {
                    "is allowed"
                } else {
                    "is left there"
                }
            );
            return Err(Error::new(&self.output, what).into());
        }
        Ok(())
    }

    /// Writes the image.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let layers = self.layers.resolve(Need::Parts, report)?;
        if let Some(number) = self.tar {
            return self.run_tar(&layers, number, report);
        }
        let source = StackOrZfile::open(&layers, self.parents.of_device())?;
        self.check_size("the stack", source.data_bytes())?;
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
            let inputs = inputs(&layers);
            let rules = self.rules(&inputs);
            Ok(export::to_file(&source, &self.output, rules, report)?)
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn rules<'a>(&self, inputs: &'a [PathBuf]) -> Rules<'a> {
        Rules {
            replace: self.force,
            overwrite_device: self.overwrite_device,
            inputs,
        }
    }

    /// Writes the tar of layer `number`, or of the only one.
    fn run_tar(
        &self,
        layers: &[LayerPath],
        number: Option<usize>,
        report: &Report,
    ) -> Result<ExitCode> {
        let count = layers.len();
        let layer = match (number, layers) {
            (None, [layer]) => layer,
            (None, _) => {
                let what = format!("--tar=N says of which of the {count} layers");
                cli::wrong_usage("export", what)
            }
            (Some(number), _) => layers.get(number).unwrap_or_else(|| {
                let what = format!("--tar={number}, and there are {count} layers");
                cli::wrong_usage("export", what)
            }),
        };
        let blob = Blob::open(layer.data())?;
        let tar = Original::of(&blob)?;
        self.check_size("the tar", tar.bytes())?;
        report.begin("exporting", tar.bytes());
        cli::clean_up_on_signals()?;
        self.threads.run(|| {
            if self.output == Path::new("-") {
                let mut out = io::stdout();
                tar.write(&mut Stream::to_writer(&mut out, Path::new(STDOUT)), report)?;
                out.flush()
                    .map_err(|e| Error::io(Path::new(STDOUT), "write", e))?;
                return Ok(());
            }
            let inputs = inputs(layers);
            Ok(tar.to_file(&self.output, self.rules(&inputs), report)?)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The files of layers.
fn inputs(layers: &[LayerPath]) -> Vec<PathBuf> {
    let files = layers.iter().flat_map(LayerPath::files);
    files.map(Path::to_owned).collect()
}
