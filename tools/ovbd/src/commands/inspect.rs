// SPDX-License-Identifier: GPL-2.0

//! `ovbd inspect`.

use std::{ffi::OsStr, fmt::Write, process::ExitCode};

use anyhow::Result;
use clap::Args;
use ovbd_layers::units;
use ovbd_oci::{annotations::FS_TYPE, Image, LayerKind, Platform, Reference, Registry};
use serde_json::{json, Value};

use crate::{
    commands::images::{stored, virtual_bytes},
    names::StoreOption,
    remote::Connection,
    report::Report,
};

/// Show the manifest of an image and what it says of the layers.
///
/// An image that is in the store, or in the layout of oci:DIR[:NAME], is shown from there, else from its registry. No
/// layer is fetched.
#[derive(Debug, Args)]
pub struct Inspect {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the manifest as it is
    #[arg(long, conflicts_with = "json")]
    pub raw: bool,
    /// Print the configuration that overlaybd-tcmu would be given to read the image from its registry
    #[arg(long, conflicts_with_all = ["json", "raw"])]
    pub tcmu: bool,
    /// Ask the registry also where the store has the image
    #[arg(long)]
    pub remote: bool,
    /// Machines that the image is for, as OS/ARCHITECTURE[/VARIANT] [default: this one]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<Platform>,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// How to reach the registry.
    #[command(flatten)]
    pub connection: Connection,
    /// The image
    #[arg(value_name = "REF")]
    pub reference: String,
}

impl Inspect {
    /// Prints what is asked for.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let platform = self.platform.clone().unwrap_or_else(Platform::here);
        let found = match self.remote {
            true => None,
            false => self.store.find(OsStr::new(&self.reference))?,
        };
        let image = match found {
            Some(found) => found.store.image(&found.named.descriptor, &platform)?,
            None => Registry::to_pull(&self.reference.parse()?, self.connection.options())
                .image(&platform)?,
        };
        if self.raw {
            return report
                .print(&(String::from_utf8_lossy(&image.manifest_bytes).into_owned() + "\n"));
        }
        if self.tcmu {
            let config = tcmu(
                &self.reference.parse()?,
                &image,
                !self.connection.plain_http,
            );
            return report.print(&(serde_json::to_string_pretty(&config)? + "\n"));
        }
        if self.json {
            return report.print(&(serde_json::to_string_pretty(&facts(&image))? + "\n"));
        }
        let mut text = format!("manifest {}\n", image.descriptor.digest);
        if let Some(size) = virtual_bytes(&image) {
            writeln!(text, "device of {}", units::size(size))?;
        }
        writeln!(
            text,
            "{} layers, {}",
            image.manifest.layers.len(),
            units::size(stored(&image))
        )?;
        for layer in image.layers() {
            let kind = kind(layer.kind);
            let digest = &layer.descriptor.digest;
            writeln!(
                text,
                "  layer {}: {digest}  {}{kind}",
                layer.number,
                units::size(layer.descriptor.size)
            )?;
        }
        report.print(&text)
    }
}

fn kind(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Overlaybd => "",
        LayerKind::Unknown => "  (does not say what it is)",
        LayerKind::Compressed => "  (compressed)",
        LayerKind::Acceleration => "  (record of reads)",
        LayerKind::TurboOci => "  (TurboOCI)",
    }
}

fn facts(image: &Image) -> Value {
    let layers: Vec<Value> = image
        .layers()
        .map(|layer| {
            json!({
                "digest": layer.descriptor.digest, "size": layer.descriptor.size, "diff_id": layer.diff_id,
                "media_type": layer.descriptor.media_type, "fs_type": layer.descriptor.annotations.get(FS_TYPE),
                "kind": format!("{:?}", layer.kind).to_lowercase(),
            })
        })
        .collect();
    json!({
        "digest": image.descriptor.digest, "media_type": image.descriptor.media_type,
        "config": image.manifest.config.digest, "virtual": virtual_bytes(image),
        "annotations": image.manifest.annotations, "layers": layers,
    })
}

/// What the original's snapshotter writes for its daemon, bottom first.
fn tcmu(reference: &Reference, image: &Image, https: bool) -> Value {
    let scheme = if https { "https" } else { "http" };
    let lowers: Vec<Value> = image
        .layers()
        .filter(|layer| layer.kind != LayerKind::Acceleration)
        .map(|layer| {
            let dir = format!("/var/lib/overlaybd/{}", layer.number);
            json!({ "digest": layer.descriptor.digest, "size": layer.descriptor.size, "dir": dir })
        })
        .collect();
    json!({
        "repoBlobUrl": format!("{scheme}://{}/v2/{}/blobs", reference.api_host(), reference.repository()),
        "lowers": lowers,
        "resultFile": "/var/lib/overlaybd/result",
    })
}
