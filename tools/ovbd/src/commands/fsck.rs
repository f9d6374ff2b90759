// SPDX-License-Identifier: GPL-2.0

//! `ovbd fsck`.

use std::{collections::BTreeSet, process::ExitCode};

use anyhow::Result;
use clap::Args;
use ovbd_layers::{
    layer::LayerPath,
    parents::Parents,
    report::Report as _,
    verify::{verify, Finding},
};
use ovbd_oci::{Damage, Error, Kind, Reference, Store};
use serde_json::json;

use crate::{commands::pull, names::StoreOption, remote::Transfer, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd fsck --repair
      fetches again what is damaged";

/// Check all files of the store against their digests, and that no image lacks any.
///
/// Of squashed files all checksums are checked; without them their layers are used.
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
                let (what, to) = match found {
                    Damage::Blob(digest) => (digest.to_string(), store.set_aside(digest)?),
                    Damage::Squashed { run, .. } => {
                        let from = store.squashed_path(run).display().to_string();
                        (from, store.set_squashed_aside(run)?)
                    }
                    _ => continue,
                };
                report.note(format_args!("{what} moved to {}", to.display()));
            }
            // Now it is known which images lack something.
            let images: BTreeSet<String> = store
                .check(|_| ())?
                .into_iter()
                .filter_map(|found| match found {
                    Damage::Missing { image, .. } | Damage::Document { image, .. } => Some(image),
                    Damage::Blob(_) | Damage::Stray(_) | Damage::Squashed { .. } => None,
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
                            Parents::Ignored,
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
                Damage::Squashed { run, what } => {
                    Error::new(Kind::Invalid, store.squashed_path(run).display(), what)
                }
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
    let mut damage = store.check(|bytes| report.add(bytes))?;
    for run in store.squashed()? {
        let path = LayerPath::Sealed(store.squashed_path(&run));
        let mut wrong = None;
        // It is one of the layers of a stack: what is below it is not looked at.
        verify(&[path], Parents::Neighbours, &(), &mut |found| {
            if let Finding::Problem(error) = found {
                wrong.get_or_insert(error.what().to_owned());
            }
        });
        if let Some(what) = wrong {
            let what = format!("damaged: {what}");
            damage.push(Damage::Squashed { run, what });
        }
    }
    Ok(damage)
}
