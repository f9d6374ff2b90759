// SPDX-License-Identifier: GPL-2.0

//! `ovbd seal`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::verity::hex;
use ovbd_layers::{build, seal::seal, verity::Digest};

use crate::{
    checked,
    cli::{self, NewLayer, Parents, Threads},
    names::StoreOption,
    report::Report,
    signing::SignOption,
};

const EXAMPLES: &str = "Examples:

  ovbd seal base.zfile -o seal.zfile
      prints the root hash and the bytes of the image

  ovbd up disk base.zfile seal.zfile
  veritysetup open --root-hash-file seal.zfile.roothash --hash-offset BYTES /dev/mapper/disk checked /dev/mapper/disk
      /dev/mapper/checked, of which every block is checked

  ovbd seal --old-root seal.zfile.roothash base.zfile seal.zfile next.zfile -o again.zfile
      reads what changed, and stores what changed of the tree";

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
    /// The root hash, or the file with it, of the seal among the layers: only what changed above that is read. It must
    /// come from whom you trust, as all that did not change is taken to be what it says
    #[arg(long, value_name = "HASH|FILE", value_hint = ValueHint::FilePath)]
    pub old_root: Option<String>,
    /// With what the root hash is signed; the signature goes into OUT.roothash.p7s.
    #[command(flatten)]
    pub sign: SignOption,
    /// The file to make; the root hash goes into OUT.roothash, and its signature into OUT.roothash.p7s
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
        let old_root = self.old_root.as_deref().map(checked::digest).transpose()?;
        let options = build::Options {
            parents: self.parents.of_device(),
            ..self.layer.options("seal", layers, false)
        };
        let threads = &self.layer.threads;
        report.print(&make(out, &options, old_root, &self.sign, threads, report)?)
    }
}

/// Makes the seal `out` of the layers in `options.base`, and the files beside it; returns the line for standard output.
///
/// # Errors
///
/// Those of [`seal`] and of signing.
pub fn make(
    out: &Path,
    options: &build::Options,
    old_root: Option<Digest>,
    sign: &SignOption,
    threads: &Threads,
    report: &Report,
) -> Result<String> {
    let beside = |end: &str| {
        let mut name = out.to_owned().into_os_string();
        name.push(end);
        PathBuf::from(name)
    };
    report.begin("sealing", 0);
    cli::clean_up_on_signals()?;
    // What cannot be written is known before all is read.
    let root_output = options.create_file(&beside(".roothash"), &[])?;
    let signature_output = match sign.sign_key {
        Some(_) => Some(options.create_file(&beside(".roothash.p7s"), &[])?),
        None => None,
    };
    let sealed = threads.run(|| Ok(seal(out, options, old_root, report)?))?;
    let root = hex(&sealed.root);
    root_output.write_at(root.as_bytes(), 0)?;
    root_output.finish()?;
    if let (Some(output), Some(signature)) = (signature_output, sign.sign(&root)?) {
        output.write_at(&signature, 0)?;
        output.finish()?;
    }
    Ok(format!("{root} {}\n", sealed.data_bytes))
}
