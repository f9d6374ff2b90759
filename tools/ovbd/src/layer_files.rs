// SPDX-License-Identifier: GPL-2.0

//! The files of an image's layers, fetched where they are missing and without giving the image a name.

use anyhow::Result;
use ovbd_layers::{layer::LayerPath, units};
use ovbd_oci::{Descriptor, Error, Image, Kind, LayerKind, Reference, Registry, Store};

use crate::{
    names::block_layers,
    remote::{Shown, Transfer},
    report::Report,
};

/// Fetches the block layers of `image` above the first `kept` into `store`, those that are missing, from `from`, or from
/// nowhere where the store is a layout that must have them. Returns their files, bottom first.
///
/// # Errors
///
/// Layers that a copying tool has compressed, and those of the registry and of the store.
pub fn fetch_layers(
    image: &Image,
    kept: usize,
    from: Option<&Reference>,
    store: &Store,
    transfer: &Transfer,
    report: &Report,
) -> Result<Vec<LayerPath>> {
    let subject = image.descriptor.digest.short();
    let layers = block_layers(image, &subject)?;
    let missing = &layers[kept..];
    let Some(reference) = from else {
        let mut paths = Vec::new();
        for layer in missing {
            store.open_blob(layer.descriptor)?;
            let path = store.blob_path(&layer.descriptor.digest);
            paths.push(LayerPath::Sealed(path));
        }
        return Ok(paths);
    };
    if missing
        .iter()
        .any(|layer| layer.kind != LayerKind::Overlaybd)
    {
        let what = "a copying tool has compressed its layers: they have to be unpacked first (\"ovbd pull\" does)";
        return Err(Error::new(Kind::Refused, subject, what).into());
    }
    let blobs: Vec<Descriptor> = missing
        .iter()
        .map(|layer| layer.descriptor.clone())
        .collect();
    let shown = Shown::new(
        report,
        "pulling",
        missing.iter().map(|layer| {
            let size = layer.descriptor.size;
            let name = format!("layer {}: {}", layer.number, units::size(size));
            (layer.descriptor.digest.clone(), name, size)
        }),
    );
    let registry = Registry::to_pull(reference, transfer.options());
    ovbd_oci::fetch_blobs(&registry, store, &blobs, usize::from(transfer.jobs), &shown)?;
    Ok(blobs
        .iter()
        .map(|blob| LayerPath::Sealed(store.blob_path(&blob.digest)))
        .collect())
}
