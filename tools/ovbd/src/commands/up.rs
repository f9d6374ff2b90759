// SPDX-License-Identifier: GPL-2.0

//! `ovbd up`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, Parser as _, ValueHint};
use ovbd_devices::{cow, dax, running::check_name, up, Interrupt};
use ovbd_layers::{units, Error};

use crate::{
    checked::VerityOption,
    cli::{wrong_usage, Cli, Parents, UnknownStorage},
    commands::Command,
    config::{self, Config},
    names::{Need, StoreOption, Targets},
    report::Report,
    seal_note::NamedImage,
};

/// Map a stack of layers to a block device.
///
/// Attaches loop devices to the layers' files, read-only and with direct I/O where possible, puts dm-zfile over
/// those that are compressed and dm-overlaybd over all, and prints the name of the device. Layers may also be
/// block devices. Nothing is left behind on failure, also where the name cannot be printed.
///
/// With --writable, dm-snapshot on top keeps what is written, for "ovbd commit". Without --cow it keeps it in a
/// file in /var/tmp that goes with the device. Where "ovbd commit" was interrupted, by a signal or a power cut, the file
/// after --cow and those beside it are put together to what was written.
///
/// Without a LAYER, layers and further options are those of /etc/ovbd/NAME.conf (see ovbd.conf(5)).
#[derive(Debug, Args)]
pub struct Up {
    /// Make the device writable
    #[arg(long)]
    pub writable: bool,
    /// Keep what is written in this file, which is made if it is missing, or block device. Both can be used again
    /// with the same layers
    #[arg(long, value_name = "FILE|DEVICE", requires = "writable", value_hint = ValueHint::FilePath)]
    pub cow: Option<PathBuf>,
    /// Keep what is written in DIR/NAME.cow, and in files beside it: the same as --cow with that file
    #[arg(long, value_name = "DIR", requires = "writable", conflicts_with = "cow", value_hint = ValueHint::DirPath)]
    pub cow_dir: Option<PathBuf>,
    /// Room for what is written, for instance 500M or 2G, instead of enough for everything. The file is sparse
    #[arg(long, value_name = "BYTES", requires = "writable", value_parser = units::parse)]
    pub size: Option<u64>,
    /// What is checked.
    #[command(flatten)]
    pub verity: VerityOption,
    /// Let file systems that are mounted with "-o dax" use the memory of the layers itself, without copies in the page
    /// cache. Each LAYER is then a device with such memory, as virtio-pmem, that ends with a layer ("ovbd build --dax"), or
    /// the UUID of one; without a LAYER it is the only stack that all these devices make
    #[arg(long, conflicts_with_all = ["writable", "verity", "config", "store", "targets"])]
    pub dax: bool,
    /// The device with memory for what no layer has data for: zeros, for layers that were not made with --dax
    #[arg(long, value_name = "DEVICE", requires = "dax", value_hint = ValueHint::FilePath)]
    pub zeros: Option<PathBuf>,
    /// Map an image of a registry before its layers are here, and fetch them then: "ovbd pull --lazy --up NAME LAYER", which has
    /// more options
    #[arg(long, conflicts_with_all = ["cow", "cow_dir", "size", "dax", "dry_run", "config", "targets"])]
    pub lazy: bool,
    /// Print the commands that make the device, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Overwrite whatever the file or device of --cow holds, with a new store
    #[arg(long, requires = "cow")]
    pub wipe_cow: bool,
    /// Storage that does not tell where it is.
    #[command(flatten)]
    pub unknown: UnknownStorage,
    /// The old name of --ignore-parents
    #[arg(short, long, hide = true)]
    pub force: bool,
    /// Name of the device below /dev/mapper
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Targets. Before the layers, of which it needs the places.
    #[command(flatten)]
    pub targets: Targets,
    /// Layers or images, bottom first
    #[arg(value_name = "LAYER", value_hint = ValueHint::FilePath)]
    pub layers: Vec<OsString>,
    /// Take layers and options from FILE [default: /etc/ovbd/NAME.conf if there is no LAYER]
    #[arg(long, value_name = "FILE", conflicts_with = "layers", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
}

impl Up {
    /// Makes the device and prints its name.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        if self.lazy {
            return self.pull(report);
        }
        match self.layers.is_empty() && !self.dax {
            true => self.completed()?.run_with_layers(report),
            false => self.run_with_layers(report),
        }
    }

    /// What `ovbd pull` does.
    fn pull(&self, report: &Report) -> Result<ExitCode> {
        if self.layers.len() != 1 {
            wrong_usage("up", "--lazy takes one image".to_owned());
        }
        let mut words: Vec<OsString> = vec!["pull".into(), "--lazy".into()];
        let flags = [
            ("--writable", self.writable),
            (
                "--ignore-parents",
                self.parents.ignore_parents || self.force,
            ),
        ];
        words.extend(
            flags
                .iter()
                .filter(|(_, is_given)| *is_given)
                .map(|(flag, _)| flag.into()),
        );
        let path = |path: &PathBuf| path.as_os_str().to_owned();
        let verity = &self.verity;
        let options = [
            ("--up", Some(OsString::from(&self.name))),
            ("--store", self.store.store.as_ref().map(path)),
            ("--verity", verity.verity.as_ref().map(OsString::from)),
            ("--signature", verity.signature.as_ref().map(path)),
            ("--certificate", verity.certificate.as_ref().map(path)),
        ];
        for (option, value) in options {
            if let Some(value) = value {
                words.extend([option.into(), value]);
            }
        }
        words.push("--".into());
        words.extend(self.layers.iter().cloned());
        let command = std::iter::once("ovbd".into()).chain(words.clone());
        match Cli::try_parse_from(command) {
            Ok(Cli {
                command: Command::Pull(pull),
                ..
            }) => pull.run_as(words, report),
            Ok(_) => Err(Error::new(Path::new(&self.name), "is not of \"ovbd pull\"").into()),
            Err(error) => error.exit(),
        }
    }

    /// The same call, with what the file of the stack says besides.
    fn completed(self) -> Result<Self> {
        check_name(&self.name)?;
        let path = self
            .config
            .unwrap_or_else(|| config::path(Path::new("/"), &self.name));
        let config = Config::read(&path)?;
        let given = std::env::args_os().skip_while(|word| word != "up").skip(1);
        let words = ["ovbd".into(), "up".into()].into_iter();
        let words = words.chain(config.options).chain(given);
        let mut parsed = match Cli::try_parse_from(words).map(|cli| cli.command) {
            Ok(Command::Up(up)) => up,
            Ok(_) => return Err(Error::new(&path, "is not of \"ovbd up\"").into()),
            Err(error) => {
                let said = error.to_string();
                let what = said.lines().next().unwrap_or_default();
                let what = what.strip_prefix("error: ").unwrap_or(what);
                return Err(Error::new(&path, what).into());
            }
        };
        parsed.layers = config.layers;
        Ok(parsed)
    }

    fn run_with_layers(self, report: &Report) -> Result<ExitCode> {
        // Until loop devices have the files.
        // Layers in memory are no images, whatever they are called.
        let names: &[OsString] = if self.dax { &[] } else { &self.layers };
        let _guards = self.store.protect(names)?;
        let found = self.store.images(names)?;
        let images: Vec<NamedImage<'_>> = found.iter().map(|image| image.named()).collect();
        let is_one_image = images.len() == 1 && self.layers.len() == 1;
        let verity = self.verity.of_stack(&images, is_one_image)?;
        let beside = self
            .cow_dir
            .map(|dir| dir.join(format!("{}.cow", self.name)));
        let options = up::Options {
            name: self.name,
            layers: match self.dax {
                true => dax::layers(&self.layers)?,
                false => self
                    .targets
                    .resolve(&self.layers, &self.store, Need::Mapped, report)?,
            },
            writable: self.writable.then_some(cow::Options {
                path: self.cow.or(beside),
                size: self.size,
            }),
            parents: Parents {
                ignore_parents: self.parents.ignore_parents || self.force,
            }
            .of_device(),
            wipe_cow: self.wipe_cow,
            assume_elsewhere: self.unknown.assume_elsewhere,
            verity,
        };
        let dax = self.dax.then_some(dax::Options { zeros: self.zeros });
        if self.dry_run {
            return report.print(&up::dry_run(&options, dax.as_ref())?);
        }
        let interrupt = Interrupt::install()?;
        up::up_direct(&options, dax.as_ref(), &interrupt, report, |device| {
            report.answer(&format!("{}\n", device.display()))
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
