// SPDX-License-Identifier: GPL-2.0

//! `ovbd build`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, ValueEnum, ValueHint};
use ovbd_layers::{
    build,
    layer::LayerPath,
    output,
    tar::{
        filesystem::Kind,
        verbatim::{build_from_tar, TarOptions},
    },
    units,
};

use crate::{
    cli::{self, Layout, NewLayer, Parents},
    commands::seal::make,
    names::StoreOption,
    report::Report,
    signing::SignOption,
};

const EXAMPLES: &str = "Examples:

  ovbd build -o base.zfile disk.img
      a layer of a disk image

  ovbd build --base base.zfile -o next.zfile changed.img
      what changed, as a second layer

  ovbd build --verity seal.zfile -o base.zfile disk.img
      a layer, and the hash tree with which dm-verity checks it; prints the root hash

  ovbd build --from-tar layer.tar.gz -o root.zfile
      an EROFS of a layer of a container image, which holds the tar; prints its digest and its bytes

  ovbd build --dax -o base.dax disk.img
      a layer that guests map from a virtual persistent memory

  zstd -dc next.tar.zst | ovbd build --base root.zfile --from-tar - -o next.zfile
      the next layer of that image, whose whiteouts are executed";

/// Make a layer from a raw disk image or block device, or from a tar.
///
/// The result appears under its name only when it is complete and on the disk. The same input and options
/// give the same bytes, on any number of threads.
///
/// With --from-tar the layer is a file system over the tar, as it is a layer of a container image: it begins with the tar,
/// byte for byte, and stores besides only what the file system has of its own. The digest of the tar, which the
/// configuration of the image has as its diff ID, goes to standard output, with the bytes of the tar. "ovbd verify --diff-id"
/// finds it again in the layer, and "ovbd export --tar" gives the tar back.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
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
    /// Make a file system of this tar, which may be compressed with gzip or zstd, or of standard input if it is -. With --base
    /// it is what the next layer of an image changes of the file system there, whiteouts included
    #[arg(long, value_name = "TAR", conflicts_with_all = ["source", "raw", "allow_mounted"], value_hint = ValueHint::FilePath)]
    pub from_tar: Option<PathBuf>,
    /// The file system that is made of TAR [default: erofs]
    #[arg(long, value_enum)]
    pub fs: Option<TarFilesystem>,
    /// Refuse a tar that holds more than this [default: what the file system of OUT has left]
    #[arg(long, value_name = "BYTES", value_parser = units::parse)]
    pub max_size: Option<u64>,
    /// Make SEAL too, the seal of the stack with the new layer on top, as "ovbd seal" does; its root hash goes to standard
    /// output and into SEAL.roothash
    #[arg(long, value_name = "SEAL", conflicts_with_all = ["raw", "from_tar"], value_hint = ValueHint::FilePath)]
    pub verity: Option<PathBuf>,
    /// Take RAW even if it is mounted for writing: what is read may be torn
    #[arg(long)]
    pub allow_mounted: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// The layout.
    #[command(flatten)]
    pub layout: Layout,
    /// The file to make, or - for standard output
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Raw disk image or block device, or - for standard input
    // Optional for the parser, as --base takes all names that follow it: then RAW is the last of them.
    #[arg(value_name = "RAW", required_unless_present_any = ["base", "from_tar"], value_hint = ValueHint::FilePath)]
    pub source: Option<PathBuf>,
}

/// A file system that a tar can become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TarFilesystem {
    /// EROFS, which is read-only
    Erofs,
    /// ext4, for the lowest layer alone
    Ext4,
}

impl Build {
    /// Makes the layer.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        if let Some(tar) = &self.from_tar {
            return self.run_from_tar(tar, report);
        }
        // A requirement of clap is lost where what is required conflicts with what is given.
        for (given, option) in [
            (self.fs.is_some(), "--fs"),
            (self.max_size.is_some(), "--max-size"),
        ] {
            if given {
                cli::wrong_usage("build", format!("{option} is for --from-tar only"));
            }
        }
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
            ..self.layer.laid_out("build", base, self.raw, self.layout)
        };
        let bytes = std::fs::metadata(&source).map_or(0, |found| found.len());
        report.begin("building", bytes);
        cli::clean_up_on_signals()?;
        let threads = &self.layer.threads;
        if self.verity.is_some() && self.output == Path::new("-") {
            cli::wrong_usage("build", "--verity reads OUT, which is a pipe".to_owned());
        }
        threads.run(|| Ok(build::build(&source, &self.output, &options, report)?))?;
        let Some(seal) = &self.verity else {
            return Ok(ExitCode::SUCCESS);
        };
        let mut options = options;
        options.base.push(LayerPath::Sealed(self.output.clone()));
        // These were for OUT.
        (options.uuid, options.parent_uuid) = (None, None);
        let sign = SignOption::default();
        report.print(&make(seal, &options, None, &sign, threads, report)?)
    }

    fn run_from_tar(&self, tar: &Path, report: &Report) -> Result<ExitCode> {
        if self.layout.dax {
            let what = "--dax is not for --from-tar, whose data is where the tar has it";
            cli::wrong_usage("build", what.to_owned());
        }
        let base = self.store.resolve(&self.base)?;
        let options = build::Options {
            parents: self.parents.of_device(),
            ..self.layer.options("build", base, false)
        };
        let left = rustix::fs::statvfs(output::directory(&self.output));
        let left = left.map(|space| space.f_bavail.saturating_mul(space.f_frsize));
        let what = TarOptions {
            filesystem: match self.fs.unwrap_or(TarFilesystem::Erofs) {
                TarFilesystem::Erofs => Kind::Erofs,
                TarFilesystem::Ext4 => Kind::Ext4,
            },
            max_bytes: self.max_size.unwrap_or(left.unwrap_or(u64::MAX)),
        };
        report.begin("building", 0);
        cli::clean_up_on_signals()?;
        let made = self
            .layer
            .threads
            .run(|| Ok(build_from_tar(tar, &self.output, &options, what, report)?))?;
        report.print(&format!("{} {}\n", made.diff_id, made.tar_bytes))
    }
}
