// SPDX-License-Identifier: GPL-2.0

//! `ovbd inspect`.

use std::{ffi::OsStr, fmt::Write, os::unix::fs::FileExt, process::ExitCode};

use anyhow::{bail, Result};
use clap::Args;
use ovbd_layers::units;
use ovbd_oci::{
    annotations::FS_TYPE, Descriptor, Image, LayerKind, Platform, Reference, Registry, Store,
};
use serde_json::{json, Value};

use crate::{
    commands::images::{layer_count, stored, virtual_bytes},
    layer_format::{self, LayerFormat},
    names::StoreOption,
    remote::Connection,
    report::Report,
};

const EXAMPLES: &str = "Examples:

  ovbd inspect reg.example:5000/vm/web:mon
      how large the image is, and what its layers are

  ovbd inspect --raw oci:usb/images:web | jq .annotations
      the manifest as it is, of an image in a folder";

/// Show the manifest of an image and what it says of the layers.
///
/// An image that is in the store, or in the layout of oci:DIR[:NAME], is shown from there, else from its registry. Of the
/// layers only the headers are fetched.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
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
        let registry = match found {
            Some(_) => None,
            None => {
                let reference = self.reference.parse()?;
                Some(Registry::to_pull(&reference, self.connection.options()))
            }
        };
        let image = match (&found, &registry) {
            (Some(found), _) => found.store.image(&found.named.descriptor, &platform)?,
            (None, Some(registry)) => registry.image(&platform)?,
            (None, None) => bail!("{}: nowhere to look for it", self.reference),
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
        let formats: Vec<Option<LayerFormat>> = image
            .layers()
            .map(|layer| match layer.kind {
                LayerKind::Overlaybd | LayerKind::Unknown => {
                    let blob = layer.descriptor;
                    layer_format::look(blob.size, |from, count| match (&found, &registry) {
                        (Some(found), _) => Ok(read(&found.store, blob, from, count)?),
                        (None, Some(registry)) => Ok(registry.range(blob, from, count)?),
                        (None, None) => Ok(Vec::new()),
                    })
                }
                _ => Ok(None),
            })
            .collect::<Result<_>>()?;
        if self.json {
            let facts = facts(&image, &formats);
            return report.print(&(serde_json::to_string_pretty(&facts)? + "\n"));
        }
        let mut text = format!("manifest {}\n", image.descriptor.digest);
        if let Some(size) = virtual_bytes(&image.manifest) {
            writeln!(text, "device of {}", units::size(size))?;
        }
        writeln!(
            text,
            "{}, {}",
            layer_count(image.manifest.layers.len()),
            units::size(stored(&image.manifest))
        )?;
        for (layer, format) in image.layers().zip(&formats) {
            let digest = &layer.descriptor.digest;
            let what = match format {
                Some(format) => format.to_string(),
                None => kind(layer.kind).to_owned(),
            };
            writeln!(
                text,
                "  layer {}: {digest}  {} ({what})",
                layer.number,
                units::size(layer.descriptor.size)
            )?;
        }
        report.print(&text)
    }
}

fn kind(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Overlaybd | LayerKind::Unknown => "not OverlayBD",
        LayerKind::Compressed => "a compressed tar",
        LayerKind::Acceleration => "a record of reads",
        LayerKind::TurboOci => "TurboOCI",
    }
}

/// `count` bytes of a blob of the store, from byte `from` on.
fn read(
    store: &Store,
    blob: &Descriptor,
    from: u64,
    count: u64,
) -> std::result::Result<Vec<u8>, ovbd_oci::Error> {
    let mut bytes = vec![0; count as usize];
    store
        .open_blob(blob)?
        .read_exact_at(&mut bytes, from)
        .map_err(|error| ovbd_oci::Error::io(&store.blob_path(&blob.digest), "read", error))?;
    Ok(bytes)
}

fn facts(image: &Image, formats: &[Option<LayerFormat>]) -> Value {
    let layers: Vec<Value> = image
        .layers()
        .zip(formats)
        .map(|(layer, format)| {
            json!({
                "content": format.map(LayerFormat::to_json),
                "digest": layer.descriptor.digest, "size": layer.descriptor.size, "diff_id": layer.diff_id,
                "media_type": layer.descriptor.media_type, "fs_type": layer.descriptor.annotations.get(FS_TYPE),
                "kind": format!("{:?}", layer.kind).to_lowercase(),
            })
        })
        .collect();
    json!({
        "digest": image.descriptor.digest, "media_type": image.descriptor.media_type,
        "config": image.manifest.config.digest, "virtual": virtual_bytes(&image.manifest),
        "annotations": image.manifest.annotations, "layers": layers,
    })
}

/// What the original's snapshotter writes for its daemon, bottom first.
fn tcmu(reference: &Reference, image: &Image, https: bool) -> Value {
    let scheme = if https { "https" } else { "http" };
    let lowers: Vec<Value> = image
        .data_layers()
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
