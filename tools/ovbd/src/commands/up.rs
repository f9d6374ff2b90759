// SPDX-License-Identifier: GPL-2.0

//! `ovbd up`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::{cow, up, Interrupt};
use ovbd_layers::units;

use crate::{cli::Parents, names::Layers, report::Report};

/// Map a stack of layers to a block device.
///
/// Attaches loop devices to the layers' files, read-only and with direct I/O where possible, puts dm-zfile over
/// those that are compressed and dm-overlaybd over all, and prints the name of the device. Layers may also be
/// block devices. Nothing is left behind on failure.
///
/// With --writable, dm-snapshot on top keeps what is written, for "ovbd commit". Without --cow it keeps it in a
/// file in /var/tmp that goes with the device.
#[derive(Debug, Args)]
pub struct Up {
    /// Make the device writable
    #[arg(long)]
    pub writable: bool,
    /// Keep what is written in this file, which is made if it is missing, or block device. Both can be used again
    /// with the same layers
    #[arg(long, value_name = "FILE|DEVICE", requires = "writable", value_hint = ValueHint::FilePath)]
    pub cow: Option<PathBuf>,
    /// Room for what is written, for instance 500M or 2G, instead of enough for everything. The file is sparse
    #[arg(long, value_name = "BYTES", requires = "writable", value_parser = units::parse)]
    pub size: Option<u64>,
    /// Print the commands that make the device, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Overwrite whatever the file or device of --cow holds, with a new store
    #[arg(long, requires = "cow")]
    pub wipe_cow: bool,
    /// The old name of --ignore-parents
    #[arg(short, long, hide = true)]
    pub force: bool,
    /// Name of the device below /dev/mapper
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Layers.
    #[command(flatten)]
    pub layers: Layers,
}

impl Up {
    /// Makes the device and prints its name.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        // Until loop devices have the files.
        let _guards = self.layers.store.protect(&self.layers.names)?;
        let options = up::Options {
            name: self.name,
            layers: self.layers.resolve()?,
            writable: self.writable.then_some(cow::Options {
                path: self.cow,
                size: self.size,
            }),
            parents: Parents {
                ignore_parents: self.parents.ignore_parents || self.force,
            }
            .of_device(),
            wipe_cow: self.wipe_cow,
        };
        if self.dry_run {
            return report.print(&up::dry_run(&options)?);
        }
        let device = up::up(&options, &Interrupt::install()?, report)?;
        report.print(&format!("{}\n", device.display()))
    }
}
