// SPDX-License-Identifier: GPL-2.0

//! `ovbd rebase`.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_layers::{build, rebase, Error};
use serde_json::json;

use crate::{
    cli::{self, NewLayer, Parents},
    names::StoreOption,
    report::Report,
};

const EXAMPLES: &str = "Examples:

  ovbd rebase config.zfile --from base.zfile --to base.zfile update.zfile -o new-config.zfile
  ovbd up disk base.zfile update.zfile new-config.zfile
      the update and the configuration, if they changed different blocks";

/// Make of a layer one with the same changes over another stack.
///
/// LAYER was made over the stack --from. The new layer goes on the stack --to, and the device it gives has what --to has,
/// with what LAYER changed of --from. That is a matter of blocks of 4 KiB, of which neither files nor file systems know
/// anything. Where both stacks have the same below a change, it is taken; where --to has it already, it is left out. A block
/// that LAYER and --to changed in two ways is a collision: then there is no new layer, and no option makes one.
///
/// It is of use where the changes have nothing to do with each other, as those of two partitions or logical volumes, or
/// where both stacks hold the same, made in another way. Two changes of one file system nearly always collide in its
/// metadata, and are refused. Where they do not, the result may still be none that the file system could have written: check
/// it. To have a device hold exactly what it holds now over other layers, use "ovbd export" and "ovbd build --base".
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Rebase {
    /// The stack that LAYER was made over, bottom first
    #[arg(long, value_name = "STACK", num_args = 1.., required = true, value_hint = ValueHint::FilePath)]
    pub from: Vec<OsString>,
    /// The stack that the new layer goes on, bottom first
    #[arg(long, value_name = "STACK", num_args = 1.., required = true, value_hint = ValueHint::FilePath)]
    pub to: Vec<OsString>,
    /// Print what was made as JSON
    #[arg(long)]
    pub json: bool,
    /// The store of images that are named.
    #[command(flatten)]
    pub store: StoreOption,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// The file to make, or - for standard output
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// The layer
    #[arg(value_name = "LAYER", value_hint = ValueHint::FilePath)]
    pub name: OsString,
}

impl Rebase {
    /// Makes the layer.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        cli::one_stream("rebase", self.json, &self.output);
        let names = [self.name.clone()];
        let all = [&names, &self.from[..], &self.to].concat();
        let _guards = self.store.protect(&all)?;
        let from = self.store.resolve(&self.from)?;
        let named = self.store.resolve(&names)?;
        let [layer] = named.as_slice() else {
            let what = format!(
                "an image of {} layers, of which one can be rebased",
                named.len()
            );
            return Err(Error::new(self.name.as_ref(), what).into());
        };
        let to = self.store.resolve(&self.to)?;
        let options = build::Options {
            parents: self.parents.of_device(),
            ..self.layer.options("rebase", to, false)
        };
        let request = rebase::Request { layer, from: &from };
        report.begin("rebasing", 0);
        cli::clean_up_on_signals()?;
        let made = self.layer.threads.run(|| {
            let made = rebase::rebase(request, &self.output, &options, report);
            Ok(made?)
        })?;
        if self.json {
            let made = json!({
                "uuid": made.uuid.as_str(), "parent_uuid": made.parent_uuid.as_str(),
                "virtual_bytes": made.virtual_bytes, "changed_bytes": made.changed_bytes,
                "same_bytes": made.same_bytes,
            });
            report.print(&format!("{made:#}\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
