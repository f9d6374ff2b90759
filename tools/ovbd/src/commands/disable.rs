// SPDX-License-Identifier: GPL-2.0

//! `ovbd disable`.

use std::{fs, io, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use ovbd_devices::{check_root, programs::run, running::check_name};
use ovbd_layers::error::Error;

use crate::{report::Report, service};

/// Do not bring a stack up at boot any more.
///
/// A stack that is up stays up. /etc/ovbd/NAME.conf is kept for "ovbd up NAME" and "ovbd enable NAME".
#[derive(Debug, Args)]
pub struct Disable {
    /// Name of the stack
    #[arg(value_name = "NAME")]
    pub name: String,
}

impl Disable {
    /// Disables the service and removes what it was to wait for.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        check_root()?;
        check_name(&self.name)?;
        let unit = service::unit(&self.name)?;
        let path = service::waits_path(&unit);
        match fs::remove_file(&path) {
            // What an administrator added stays.
            Ok(()) => drop(path.parent().map(fs::remove_dir)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(&path, "remove", e).into()),
        }
        // Which has systemd read all of it anew, if it runs.
        run("systemctl", ["disable", &unit]).context("cannot disable the service")?;
        report.print(&format!("{unit}: disabled\n"))
    }
}
