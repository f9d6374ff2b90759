// SPDX-License-Identifier: GPL-2.0

//! `ovbd tag`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_oci::Reference;

use crate::{names::StoreOption, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd tag reg.example:5000/vm/web:mon web:stable
      from now on \"ovbd up web web:stable\" maps it";

/// Give an image in the store another name too.
///
/// Whatever has the new name loses it.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Tag {
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// The image, by name or digest
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The other name: [HOST/]REPOSITORY[:TAG]
    #[arg(value_name = "NEW")]
    pub new: Reference,
}

impl Tag {
    /// Gives the name.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let store = self.store.open()?;
        // Nobody sweeps it before it has its new name.
        let _guard = store.protect()?;
        let found = store.find(Some(&self.name))?;
        let name = self.new.to_string();
        if let Some(before) = store.set_name(&name, &found.descriptor)? {
            report.note(format_args!("{name} was {before}"));
        }
        report.print(&format!("{name}  {}\n", found.descriptor.digest))
    }
}
