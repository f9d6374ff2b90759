// SPDX-License-Identifier: GPL-2.0

//! `ovbd fsck`.

use std::{collections::BTreeSet, process::ExitCode};

use anyhow::Result;
use clap::Args;
use ovbd_layers::report::Report as _;
use ovbd_oci::{Damage, Error, Kind, Reference, Store};
use serde_json::json;

use crate::{commands::pull, names::StoreOption, remote::Transfer, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd fsck --repair
      fetches again what is damaged";

/// Check all files of the store against their digests, and that no image lacks any.
///
/// Exit status: 0 all is sound, or was repaired, 1 something is damaged or missing.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Fsck {
    /// Move damaged files aside, and pull the images again that lack any
    #[arg(long)]
    pub repair: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// How to pull.
    #[command(flatten)]
    pub transfer: Transfer,
}

impl Fsck {
    /// Checks the store.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let store = self.store.open()?;
        // What is swept meanwhile would be missing.
        let _guard = store.protect();
        let mut damage = check(&store, report)?;
        if self.repair && !damage.is_empty() {
            for found in &damage {
                if let Damage::Blob(digest) = found {
                    let to = store.set_aside(digest)?;
                    report.note(format_args!("{digest} moved to {}", to.display()));
                }
            }
            // Now it is known which images lack something.
            let images: BTreeSet<String> = store
                .check(|_| ())?
                .into_iter()
                .filter_map(|found| match found {
                    Damage::Missing { image, .. } | Damage::Document { image, .. } => Some(image),
                    Damage::Blob(_) | Damage::Stray(_) => None,
                })
                .collect();
            for image in images {
                let again = image
                    .parse::<Reference>()
                    .map_err(anyhow::Error::from)
                    .and_then(|reference| {
                        pull::fetch(
                            &reference,
                            &store,
                            &self.transfer,
                            &ovbd_oci::Platform::here(),
                            u64::MAX,
                            ovbd_layers::parents::Parents::Ignored,
                            report,
                        )
                    });
                if let Err(error) = again {
                    report.error(&error.context(format!("cannot pull {image} again")));
                }
            }
            damage = check(&store, report)?;
        }
        for found in &damage {
            let error = match found {
                Damage::Blob(digest) => Error::new(
                    Kind::Invalid,
                    store.blob_path(digest).display(),
                    "damaged: it does not have its digest",
                ),
                Damage::Stray(path) => {
                    Error::new(Kind::Invalid, path.display(), "not the name of a digest")
                }
                Damage::Missing { image, blob } => Error::new(
                    Kind::Missing,
                    image,
                    format!("{blob} is missing or has another size"),
                ),
                Damage::Document { image, what } => Error::new(Kind::Invalid, image, what),
            };
            report.error(&error.into());
        }
        if self.json {
            report.print(&format!("{}\n", json!({ "damaged": damage.len() })))?;
        }
        Ok(match damage.len() {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }
}

fn check(store: &Store, report: &Report) -> Result<Vec<Damage>> {
    report.begin("checking", 0);
    Ok(store.check(|bytes| report.add(bytes))?)
}
