// SPDX-License-Identifier: GPL-2.0

//! `ovbd chunks`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_layers::{report::Report as _, units};
use ovbd_oci::{
    annotations::OF_LAYER, BlobSource, ChunkList, ChunkLister, Descriptor, Digest, Error, Hasher,
    Kind, NoProgress, Platform, Reference, Registry, Store, CHUNK_LIST_TYPE,
};

use crate::{names::StoreOption, remote::Transfer, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd chunks reg.example:5000/vm/web:mon
      what somebody else has pushed there; ovbd push does it by itself";

/// Bytes that are fetched at once.
const STEP: u64 = 4 << 20;

/// Publish the digests of all parts of an image in a registry.
///
/// Whoever pulls it with --lazy checks by them each part before it is used. Layers that the store does not have are read from the
/// registry, and must have their digests. Images that ovbd push has sent name lists of their own, which nobody can change without
/// changing the image: these here are as good as who publishes them.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Chunks {
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// How to reach the registry.
    #[command(flatten)]
    pub transfer: Transfer,
    /// The image
    #[arg(value_name = "REF")]
    pub reference: Reference,
}

impl Chunks {
    /// Makes and sends the lists.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let registry = Registry::to_push(&self.reference, self.transfer.options());
        let image = registry.image(&Platform::here())?;
        let store = self.store.open().ok();
        let layers = &image.manifest.layers;
        report.begin("hashing", layers.iter().map(|layer| layer.size).sum());
        let mut lists = Vec::new();
        for layer in layers.iter() {
            if ChunkList::size(layer.size).is_none() {
                let what = format!(
                    "a layer of {} is too large for a list",
                    units::size(layer.size)
                );
                return Err(Error::new(Kind::Refused, &self.reference, what).into());
            }
            let list = list_of(&registry, store.as_ref(), layer, report)?;
            let mut part = Descriptor::of(CHUNK_LIST_TYPE, list.as_bytes());
            let of = layer.digest.to_string();
            part.annotations.insert(OF_LAYER.to_owned(), of);
            let bytes = list.as_bytes().to_vec();
            registry.send_blob(&part, &bytes, &[], None, &NoProgress)?;
            lists.push(part);
        }
        let artifact = registry.attach(CHUNK_LIST_TYPE, &image.descriptor, lists)?;
        report.print(&format!("{}\n", artifact.digest))
    }
}

/// The list of a layer, whose bytes must have its digest.
fn list_of(
    registry: &Registry,
    store: Option<&Store>,
    layer: &Descriptor,
    report: &Report,
) -> Result<ChunkList> {
    let file = match store {
        Some(store) if store.has_blob(layer)? => Some(store.source(layer)?),
        _ => None,
    };
    let mut hasher = Hasher::new(layer.digest.algorithm());
    let mut lister = ChunkLister::new(layer.size);
    let mut at = 0;
    while at < layer.size {
        let count = STEP.min(layer.size - at);
        let bytes = match &file {
            Some(file) => {
                let mut bytes = vec![0; count as usize];
                let count = file.read_at(&mut bytes, at)?;
                bytes.truncate(count);
                bytes
            }
            None => registry.range(layer, at, count)?,
        };
        if bytes.is_empty() {
            break;
        }
        hasher.update(&bytes);
        lister.update(&bytes);
        at += bytes.len() as u64;
        report.add(bytes.len() as u64);
    }
    let found: Digest = hasher.finish();
    if found != layer.digest {
        let what = format!("the {at} bytes that it has as this have the digest {found}");
        return Err(Error::new(Kind::Invalid, &layer.digest, what).into());
    }
    Ok(lister.finish())
}
