// SPDX-License-Identifier: GPL-2.0

//! `ovbd logout`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_oci::{Error, Keychain, Kind};

use crate::{commands::login::host_of, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd logout reg.example:5000";

/// Remove what "ovbd login" saved for a registry.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Logout {
    /// The file that it was saved in
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub creds_file: Option<PathBuf>,
    /// The registry: HOST[:PORT]
    #[arg(value_name = "HOST")]
    pub host: String,
}

impl Logout {
    /// Removes it.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let host = host_of(&self.host)?;
        let keychain = Keychain::from_environment(self.creds_file.as_deref());
        let file = keychain
            .file()
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        if !keychain.remove(host.host())? {
            return Err(Error::new(
                Kind::Missing,
                file,
                format!("nothing saved for {}", host.host()),
            )
            .into());
        }
        report.print(&format!("{} removed from {file}\n", host.host()))
    }
}
