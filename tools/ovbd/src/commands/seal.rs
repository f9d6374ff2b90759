// SPDX-License-Identifier: GPL-2.0

//! `ovbd seal`.

use std::{
    ffi::OsString,
    fmt::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_layers::seal::seal;

use crate::{
    cli::{self, NewLayer, Parents},
    names::StoreOption,
    report::Report,
};

const EXAMPLES: &str = "Examples:

  ovbd seal base.zfile -o seal.zfile
      prints the root hash and the bytes of the image

  ovbd up disk base.zfile seal.zfile
  veritysetup open --root-hash-file seal.zfile.roothash --hash-offset BYTES /dev/mapper/disk checked /dev/mapper/disk
      /dev/mapper/checked, of which every block is checked

  ovbd seal base.zfile seal.zfile next.zfile -o again.zfile
      stores what changed of the tree";

/// Make a layer with the dm-verity hash tree of a stack of layers.
///
/// The layers stay as they are. With the seal on top, the kernel checks every block that is read against one root hash,
/// which goes to standard output, with the bytes of the image, and into OUT.roothash as veritysetup takes it. Whoever can
/// change the root hash can change everything: keep it apart from the layers, or sign it.
///
/// Salt and UUID of the tree are derived from the UUID of the bottom layer, so the seal of an image with one layer more
/// holds only what changed in the tree.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Seal {
    /// The store of images that LAYER names.
    #[command(flatten)]
    pub store: StoreOption,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// The file to make; the root hash goes into OUT.roothash
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Layers, bottom first, or the name of an image of the store
    #[arg(value_name = "LAYER", required = true, value_hint = ValueHint::FilePath)]
    pub layers: Vec<OsString>,
}

impl Seal {
    /// Makes the seal, and the file with the root hash.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let out = &self.output;
        if out == Path::new("-") {
            cli::wrong_usage(
                "seal",
                "OUT is a file: the root hash goes into one beside it".to_owned(),
            );
        }
        let layers = self.store.resolve(&self.layers)?;
        let mut root_file = out.clone().into_os_string();
        root_file.push(".roothash");
        let root_file = PathBuf::from(root_file);
        let options = ovbd_layers::build::Options {
            parents: self.parents.of_device(),
            ..self.layer.options("seal", layers, false)
        };
        report.begin("sealing", 0);
        cli::clean_up_on_signals()?;
        // What cannot be written is known before all is read.
        let root_output = options.create_file(&root_file, &[])?;
        let sealed = self
            .layer
            .threads
            .run(|| Ok(seal(out, &options, None, report)?))?;
        let mut root = String::new();
        for byte in sealed.root {
            write!(root, "{byte:02x}")?;
        }
        root_output.write_at(root.as_bytes(), 0)?;
        root_output.finish()?;
        report.print(&format!("{root} {}\n", sealed.data_bytes))
    }
}
