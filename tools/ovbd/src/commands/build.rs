// SPDX-License-Identifier: GPL-2.0

//! `ovbd build`.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_layers::build;

use crate::{
    cli::{self, NewLayer, Parents},
    names::StoreOption,
    report::Report,
};

/// Make a layer from a raw disk image or block device.
///
/// The result appears under its name only when it is complete and on the disk. The same input and options
/// give the same bytes, on any number of threads.
#[derive(Debug, Args)]
pub struct Build {
    /// Store only the difference to this stack of layers, bottom first
    #[arg(long, value_name = "LAYER", num_args = 1.., value_hint = ValueHint::FilePath)]
    pub base: Vec<OsString>,
    /// The store of images that --base names.
    #[command(flatten)]
    pub store: StoreOption,
    /// Compress RAW itself, without making a layer of it
    #[arg(long, conflicts_with_all = ["base", "uuid", "parent_uuid"])]
    pub raw: bool,
    /// Take RAW even if it is mounted for writing: what is read may be torn
    #[arg(long)]
    pub allow_mounted: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// The file to make, or - for standard output
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Raw disk image or block device, or - for standard input
    // Optional for the parser, as --base takes all names that follow it: then RAW is the last of them.
    #[arg(value_name = "RAW", required_unless_present = "base", value_hint = ValueHint::FilePath)]
    pub source: Option<PathBuf>,
}

impl Build {
    /// Makes the layer.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let mut base = self.base;
        let source = match (self.source, base.len()) {
            (Some(source), _) => source,
            (None, 0 | 1) => cli::wrong_usage("build", "RAW is missing".to_owned()),
            (None, _) => base.pop().unwrap_or_default().into(),
        };
        let base = self.store.resolve(&base)?;
        let options = build::Options {
            parents: self.parents.of_device(),
            allow_mounted: self.allow_mounted,
            ..self.layer.options("build", base, self.raw)
        };
        let bytes = std::fs::metadata(&source).map_or(0, |found| found.len());
        report.begin("building", bytes);
        cli::clean_up_on_signals()?;
        self.layer
            .threads
            .run(|| Ok(build::build(&source, &self.output, &options, report)?))?;
        Ok(ExitCode::SUCCESS)
    }
}
