// SPDX-License-Identifier: GPL-2.0

//! `ovbd squash`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_layers::{build, parents, squash};
use serde_json::json;

use crate::{
    cli::{self, Format, NewLayer, Parents},
    names::{Layers, Need},
    report::Report,
};

const EXAMPLES: &str = "Examples:

  ovbd squash monday.zfile tuesday.zfile wednesday.zfile -o days.zfile
  ovbd up --writable --cow changes disk base.zfile days.zfile
      instead of the three; the store and layers above need not know

  ovbd squash base.zfile days.zfile -o new-base.zfile
      all of a stack";

/// Make one layer of neighbouring layers.
///
/// Only what is left of each layer is read, and no image is made. Blocks that are compressed as the new layer is to be, and
/// of which all is left, are copied as they are when their checksum is right. Without --algo, --block-size and --no-crc
/// that is the compression of most of the data; --level is for what is compressed again.
///
/// The new layer has the UUID of the topmost one and the parent of the lowest one, so it takes their place in any stack: the
/// layers above fit on it, and so does the store of a writable device. The layers themselves stay as they are. Layers that do
/// not lie on each other, with --ignore-parents, become one without a UUID.
///
/// What lies below is not looked at. Where the layers have made something zero, the new one does so too, also where it is
/// the lowest.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Squash {
    /// Print what was made as JSON
    #[arg(long)]
    pub json: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// The file to make, or - for standard output
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Layers.
    #[command(flatten)]
    pub layers: Layers,
}

impl Squash {
    /// Makes the layer.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        cli::one_stream("squash", self.json, &self.output);
        let new = &self.layer;
        let keep_compression = new.format != Some(Format::Lsmt)
            && new.compression.algo.is_none()
            && new.compression.block_size.is_none()
            && !new.no_crc;
        let _guards = self.layers.store.protect(&self.layers.names)?;
        let options = build::Options {
            parents: match self.parents.ignore_parents {
                true => parents::Parents::Ignored,
                false => parents::Parents::Neighbours,
            },
            ..new.options("squash", self.layers.resolve(Need::Parts, report)?, false)
        };
        report.begin("squashing", 0);
        cli::clean_up_on_signals()?;
        let made = new.threads.run(|| {
            let made = squash::squash(&self.output, &options, keep_compression, report);
            Ok(made?)
        })?;
        if self.json {
            let made = json!({
                "uuid": made.uuid.as_str(), "parent_uuid": made.parent_uuid.as_str(),
                "virtual_bytes": made.virtual_bytes, "layers": options.base.len(),
                "segments": made.segments, "data_bytes": made.data_bytes, "copied_bytes": made.copied_bytes,
            });
            report.print(&format!("{made:#}\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
