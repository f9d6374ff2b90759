// SPDX-License-Identifier: GPL-2.0

//! `ovbd rmi`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::{names::StoreOption, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd rmi reg.example:5000/vm/web:mon && ovbd gc
      removes an image, unless a device uses it";

/// Take the names of images out of the store.
///
/// The files stay until "ovbd gc" finds that no image needs them and nothing uses them.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Rmi {
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// The names
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

impl Rmi {
    /// Takes them out; all of them must be there.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let store = self.store.open()?;
        let mut names = Vec::new();
        for name in &self.names {
            let found = store.find(Some(name))?;
            let digest = found.descriptor.digest;
            match found.name {
                // By its digest an image is all of its names.
                Some(found) if found == *name || name.parse::<ovbd_oci::Digest>().is_err() => {
                    names.push((found, digest))
                }
                _ => {
                    let same = |entry: &ovbd_oci::Named| entry.descriptor.digest == digest;
                    let all = store
                        .names()?
                        .into_iter()
                        .filter(same)
                        .filter_map(|entry| entry.name);
                    names.extend(all.map(|name| (name, digest.clone())));
                }
            }
        }
        for (name, digest) in names {
            if store.remove_name(&name)? {
                report.print(&format!("{name}  {digest}\n"))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
