// SPDX-License-Identifier: GPL-2.0

//! `ovbd images`.

use std::{fmt::Write, process::ExitCode};

use anyhow::Result;
use clap::Args;
use ovbd_layers::{error::escaped, units};
use ovbd_oci::{annotations::VIRTUAL_SIZE, Image, Manifest, Platform, Store};
use serde_json::{json, Value};

use crate::{commands::gc::under_loop_devices, names::StoreOption, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd images
      all images

  ovbd images --json | jq -r '.[] | .files[]'
      the files of their layers";

/// List the images in the store.
///
/// The columns: name, digest, number of layers, bytes stored, size of the device, and whether a loop device uses any of
/// the layers.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Images {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// Only these
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
}

impl Images {
    /// Prints the list.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        // Without a store there are no images: nothing was pulled yet.
        let store =
            match self.store.path().join("oci-layout").exists() || self.store.store.is_some() {
                true => self.store.open()?,
                false if self.json => return report.print("[]\n"),
                false => return Ok(ExitCode::SUCCESS),
            };
        let entries = match self.names.is_empty() {
            true => store.names()?,
            false => self
                .names
                .iter()
                .map(|name| store.find(Some(name)))
                .collect::<ovbd_oci::Result<_>>()?,
        };
        let used = under_loop_devices()?;
        let in_use = |image: &Image| {
            let mut layers = image.manifest.layers.iter();
            layers.any(|layer| used.contains(layer.digest.hex()))
        };
        let mut list = Vec::new();
        for entry in entries {
            let name = entry.name.clone().unwrap_or_else(|| "-".to_owned());
            list.push((
                name,
                entry.descriptor.digest.clone(),
                store.image(&entry.descriptor, &Platform::here()),
            ));
        }
        if self.json {
            let list: Vec<Value> = list
                .iter()
                .map(|(name, digest, image)| match image {
                    Ok(image) => json!({
                        "name": name, "digest": digest, "layers": image.manifest.layers.len(),
                        "stored": stored(&image.manifest), "virtual": virtual_bytes(&image.manifest),
                        "files": files(&store, image), "in_use": in_use(image),
                    }),
                    Err(error) => {
                        json!({ "name": name, "digest": digest, "error": error.to_string() })
                    }
                })
                .collect();
            return report.print(&(serde_json::to_string_pretty(&list)? + "\n"));
        }
        let width = list
            .iter()
            .map(|(name, ..)| escaped(name).to_string().chars().count())
            .max()
            .unwrap_or(0);
        let mut text = String::new();
        for (name, digest, image) in &list {
            // Names come from files of others: nothing in them may move the cursor.
            let name = escaped(name).to_string();
            match image {
                Ok(image) => {
                    let size = virtual_bytes(&image.manifest).map_or("?".to_owned(), units::size);
                    let count = image.manifest.layers.len();
                    writeln!(
                        text,
                        "{name:width$}  {}  {count:3}  {:>10}  {size:>10}{}",
                        digest.short(),
                        units::size(stored(&image.manifest)),
                        if in_use(image) { "  in use" } else { "" }
                    )?;
                }
                Err(error) => writeln!(text, "{name:width$}  {}  {error}", digest.short())?,
            }
        }
        report.print(&text)
    }
}

/// `1 layer`, `2 layers`, ...
pub fn layer_count(count: usize) -> String {
    format!("{count} layer{}", if count == 1 { "" } else { "s" })
}

/// Bytes of the layers.
pub fn stored(manifest: &Manifest) -> u64 {
    manifest.layers.iter().map(|layer| layer.size).sum()
}

/// Size of the device in bytes, if the image says it.
pub fn virtual_bytes(manifest: &Manifest) -> Option<u64> {
    manifest.annotations.get(VIRTUAL_SIZE)?.parse().ok()
}

fn files(store: &Store, image: &Image) -> Vec<String> {
    let path = |layer: &ovbd_oci::Descriptor| store.blob_path(&layer.digest).display().to_string();
    image.manifest.layers.iter().map(path).collect()
}
