// SPDX-License-Identifier: GPL-2.0

//! `ovbd commit`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::{
    commit::{self, Part, Request},
    fold, Interrupt,
};

use ovbd_layers::{report::Report as _, Error};

use crate::{
    cli::{Layout, NewLayer, UnknownStorage},
    config::{self, Config},
    report::Report,
};

/// Make a layer of what was written to a stack since "ovbd up --writable", and put the stack on it.
///
/// A new store is put on top, which takes a moment: programs that use the device wait no longer than for "dmsetup
/// suspend" and "resume". Then what was written before is read, and only that. The new layer takes its place below the
/// device, so that a second commit has only what was written after the first one; the old store goes. Next time the stack
/// is brought up with one layer more.
///
/// After --cow FILE the new store has that name in the end.
#[derive(Debug, Args)]
pub struct Commit {
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// The layout.
    #[command(flatten)]
    pub layout: Layout,
    /// The file to make
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::FilePath, required_unless_present_any = ["snapshot_only", "fold_back"])]
    pub output: Option<PathBuf>,
    /// Begin with the new store, make no layer, and print the device with what was written until now, which nobody
    /// writes to. The next commit, or one with --continue, makes the layer
    #[arg(long, conflicts_with_all = ["output", "rest"])]
    pub snapshot_only: bool,
    /// Make the layer of what an interrupted commit left, without what was written since
    #[arg(long = "continue")]
    pub rest: bool,
    /// Make no layer, and go on with one generation after --snapshot-only: what was written since goes to the store
    /// before it
    #[arg(long, conflicts_with_all = ["output", "rest", "snapshot_only", "cow"])]
    pub fold_back: bool,
    /// Keep what is written from now on in this file, which is made. The default is beside the file of "ovbd up --cow",
    /// and a file without a name where there was none
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "rest")]
    pub cow: Option<PathBuf>,
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
        let options = self
            .layer
            .laid_out("commit", Vec::new(), false, self.layout);
        let interrupt = Interrupt::install()?;
        report.begin(
            if self.fold_back {
                "folding back"
            } else {
                "committing"
            },
            0,
        );
        let request = Request {
            name: &self.name,
            next: self.cow.as_deref(),
            part: match self.rest {
                true => Part::Rest,
                false => Part::Whole,
            },
            assume_elsewhere: self.unknown.assume_elsewhere,
        };
        if self.fold_back {
            fold::fold(&request, &interrupt, report)?;
            return Ok(ExitCode::SUCCESS);
        }
        let Some(out) = &self.output else {
            let device = commit::snapshot(&request, &interrupt, report)?;
            return report.print(&format!("{}\n", device.display()));
        };
        let is_on = self.layer.threads.run(|| {
            let done = commit::commit(&request, out, &options, &interrupt, report);
            Ok(done?)
        })?;
        if is_on {
            warn_of_config(&self.name, out, report);
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Says where the stack would not come up at boot: its file does not name the layer that it is on now.
pub fn warn_of_config(name: &str, out: &Path, report: &Report) {
    let path = config::path(Path::new("/"), name);
    let Ok(config) = Config::read(&path) else {
        // There is none, or it is of no use as it is.
        return;
    };
    let out = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    if config
        .layers
        .last()
        .is_none_or(|layer| Path::new(layer) != out)
    {
        let what = format!(
            "does not name the layer that the stack is on now: add \"layer {}\", or it is refused at boot",
            out.display()
        );
        report.warn(&Error::new(&path, what));
    }
}
