// SPDX-License-Identifier: GPL-2.0

//! Images of TurboOCI layers, in a registry: each is a small blob with the metadata of a file system, and the layer of the
//! original image that it points into. Both are fetched, and made one layer.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use ovbd_layers::{
    build,
    tar::{join::join, unpack::unpack_files},
    units,
};
use ovbd_oci::{
    annotations::{ARTIFACT_TYPE, RESTORED_FROM},
    Descriptor, Error, Image, Kind, LayerKind, Manifest, MediaType, Registry, Store, OCI_CONFIG,
    OCI_LAYER,
};

use crate::{
    report::Report,
    tar_layers::{keep, scratch_folder, Added},
};

/// The file systems that a blob can have metadata of, those first that the original prefers.
const FILESYSTEMS: [&str; 2] = ["erofs", "ext4"];

/// A TurboOCI layer.
pub struct TurboLayer {
    /// Its place in the manifest.
    number: usize,
    /// The layer of the original image.
    pub target: Descriptor,
}

impl TurboLayer {
    /// What is fetched for it besides its blob, for the user.
    pub fn title(&self) -> String {
        format!(
            "target of layer {}: {}",
            self.number,
            units::size(self.target.size)
        )
    }
}

/// Finds the targets of all TurboOCI layers of an image.
///
/// # Errors
///
/// A layer that does not say what its target is, and a target that is not in the repository.
pub fn find_targets(image: &Image, registry: &Registry, subject: &str) -> Result<Vec<TurboLayer>> {
    let turbo = image
        .layers()
        .filter(|layer| layer.kind == LayerKind::TurboOci);
    turbo
        .map(|layer| {
            let digest = image.turbo_target(&layer, subject)?;
            let target = registry.find_blob(&digest, OCI_LAYER).with_context(|| {
                format!(
                    "layer {} is TurboOCI and its target cannot be found",
                    layer.number
                )
            })?;
            Ok(TurboLayer {
                number: layer.number,
                target,
            })
        })
        .collect()
}

/// Makes ordinary layers of the TurboOCI layers of `image`, whose blobs and targets are in the store; no tar may have more
/// than `limit` bytes.
///
/// # Errors
///
/// Blobs that are not as they should be, layers without a file system in common, and those of the store.
pub fn join_layers(
    image: &Image,
    turbo: &[TurboLayer],
    store: &Store,
    limit: u64,
    subject: &str,
    report: &Report,
) -> Result<Image> {
    report.begin("joining", turbo.iter().map(|layer| layer.target.size).sum());
    let folder = scratch_folder()?;
    let mut layers: Vec<Descriptor> = image.manifest.layers.to_vec();
    let names = FILESYSTEMS.map(|kind| format!("{kind}.fs.meta"));
    let mut found: Vec<Vec<Option<PathBuf>>> = Vec::new();
    for layer in turbo {
        let folder = folder.path().join(layer.number.to_string());
        fs::create_dir(&folder).with_context(|| format!("{}: cannot make", folder.display()))?;
        let blob = store.blob_path(&layers[layer.number].digest);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        found.push(unpack_files(&blob, &names, &folder, limit, &())?);
    }
    // A file system goes through all layers.
    let has_all = |kind: usize| found.iter().all(|files| files[kind].is_some());
    let Some(kind) = (0..FILESYSTEMS.len()).find(|kind| has_all(*kind)) else {
        let what = format!(
            "its TurboOCI layers do not all have {}",
            names.join(", or all ")
        );
        return Err(Error::new(Kind::Refused, subject, what).into());
    };
    let options = build::Options {
        tar: true,
        ..build::Options::default()
    };
    let mut config = image.config.clone();
    for (layer, files) in turbo.iter().zip(&mut found) {
        let Some(blob) = files[kind].take() else {
            continue;
        };
        let file = folder.path().join(format!("{}.layer", layer.number));
        let target = store.blob_path(&layer.target.digest);
        let made = join(&blob, &target, &file, &options, limit, &Added(report))
            .with_context(|| format!("{subject}: layer {}", layer.number))?;
        let joined = keep(store, &file, &made, FILESYSTEMS[kind])?;
        config.rootfs.diff_ids.0[layer.number] = joined.digest.clone();
        layers[layer.number] = joined;
    }
    let config = config.to_bytes();
    let descriptor = Descriptor::of(OCI_CONFIG, &config);
    let mut manifest = Manifest::new(MediaType::OciManifest, descriptor, layers);
    manifest.annotations = image.manifest.annotations.clone();
    let from = image.descriptor.digest.to_string();
    manifest.annotations.insert(RESTORED_FROM.to_owned(), from);
    if let Some(original) = &image.manifest.subject {
        manifest.subject = Some(original.clone());
        manifest.artifact_type = Some(ARTIFACT_TYPE.to_owned());
    }
    Ok(Image::of_manifest(&subject, manifest, config)?)
}
