// SPDX-License-Identifier: GPL-2.0

//! Making block layers of an ordinary container image, in the store: each over the original tar, so that whoever has the
//! original's configuration can check them.

use std::{fs::File, path::Path};

use anyhow::{Context, Result};
use ovbd_layers::{
    build,
    layer::LayerPath,
    parents::Parents,
    stack::Stack,
    tar::{
        filesystem::Kind as Filesystem,
        original::DiffId,
        verbatim::{build_next, Made, TarOptions},
    },
    units,
};
use ovbd_oci::{
    annotations::{ARTIFACT_TYPE, SOURCE, VIRTUAL_SIZE},
    Bounded, Descriptor, Error, Image, ImageLayer, Kind, LayerKind, Manifest, MediaType, Platform,
    Reference, Registry, Store, OCI_CONFIG,
};

use crate::{
    remote::{Shown, Transfer},
    report::Report,
    tar_layers::{keep, scratch_folder, Added},
};

/// The file system of converted images.
const FILESYSTEM: Filesystem = Filesystem::Erofs;

/// Fetches an ordinary image and makes one of block layers of it in the store, which has no name yet. No tar may have more than
/// `limit` bytes. Returns it and its layers, bottom first.
///
/// # Errors
///
/// What cannot be fetched, is no ordinary image, has a tar with another digest than the configuration says or one that
/// no file system can be made of; and those of the store.
pub fn fetch(
    reference: &Reference,
    store: &Store,
    transfer: &Transfer,
    platform: &Platform,
    limit: u64,
    report: &Report,
) -> Result<(Image, Vec<LayerPath>)> {
    let registry = Registry::to_pull(reference, transfer.options());
    let original = registry.image(platform)?;
    let subject = reference.to_string();
    for layer in original.layers() {
        check_ordinary(&layer, &subject)?;
    }
    let layers: Vec<Descriptor> = original.manifest.layers.to_vec();
    let shown = Shown::new(
        report,
        "pulling",
        layers.iter().enumerate().map(|(number, layer)| {
            let name = format!("layer {number}: {}", units::size(layer.size));
            (layer.digest.clone(), name, layer.size)
        }),
    );
    let jobs = usize::from(transfer.jobs);
    ovbd_oci::fetch_blobs(&registry, store, &layers, jobs, &shown)?;
    report.begin("converting", layers.iter().map(|layer| layer.size).sum());
    let converting = Converting {
        original: &original,
        subject: &subject,
        store,
        limit,
        report,
    };
    let (layers, paths) = converting.layers()?;
    let stack = Stack::open(&paths, Parents::All)?;
    let image = converting.image(layers, stack.virtual_bytes())?;
    Ok((image, paths))
}

/// Refuses a layer that is known to be none of files.
fn check_ordinary(layer: &ImageLayer<'_>, subject: &str) -> Result<()> {
    match layer.kind {
        LayerKind::Unknown | LayerKind::Compressed => Ok(()),
        _ => {
            let what = format!(
                "no ordinary container image: layer {} is OverlayBD (without --convert it is pulled as it is)",
                layer.number
            );
            Err(Error::new(Kind::Refused, subject, what).into())
        }
    }
}

struct Converting<'a> {
    original: &'a Image,
    subject: &'a str,
    store: &'a Store,
    limit: u64,
    report: &'a Report,
}

impl Converting<'_> {
    fn refuse(&self, what: String) -> anyhow::Error {
        Error::new(Kind::Refused, self.subject, what).into()
    }

    /// Makes all layers.
    fn layers(&self) -> Result<(Vec<Descriptor>, Vec<LayerPath>)> {
        let folder = scratch_folder()?;
        let mut layers = Vec::new();
        let mut paths: Vec<LayerPath> = Vec::new();
        let mut image = None;
        for layer in self.original.layers() {
            let file = folder.path().join(layer.number.to_string());
            let made = self.layer(&layer, &file, &paths, &mut image)?;
            let descriptor = keep(self.store, &file, &made, FILESYSTEM.name())?;
            let path = self.store.blob_path(&descriptor.digest);
            self.report.note(format_args!(
                "layer {}: {} of which {} are not in the tar",
                layer.number,
                units::size(descriptor.size),
                units::size(made.stored_bytes)
            ));
            layers.push(descriptor);
            paths.push(LayerPath::Sealed(path));
        }
        Ok((layers, paths))
    }

    /// Makes `file` of a layer over those `below`, whose file system is in `image`.
    fn layer(
        &self,
        layer: &ImageLayer<'_>,
        file: &Path,
        below: &[LayerPath],
        image: &mut Option<File>,
    ) -> Result<Made> {
        let number = layer.number;
        let wanted: DiffId =
            layer.diff_id.to_string().parse().map_err(|_| {
                self.refuse(format!("layer {number} has a digest other than sha256"))
            })?;
        let options = build::Options {
            base: below.to_vec(),
            tar: true,
            ..build::Options::default()
        };
        let tar = TarOptions {
            filesystem: FILESYSTEM,
            max_bytes: self.limit,
        };
        let source = self.store.blob_path(&layer.descriptor.digest);
        let made = build_next(&source, file, &options, tar, image, &Added(self.report))
            .with_context(|| format!("{}: layer {number} cannot be converted", self.subject))?;
        if made.diff_id != wanted {
            let what = format!(
                "layer {number} holds a tar with the digest {}, and the configuration says {wanted}",
                made.diff_id
            );
            return Err(self.refuse(what));
        }
        Ok(made)
    }

    /// The image of these layers, which says that it is another form of the original.
    fn image(&self, layers: Vec<Descriptor>, virtual_bytes: u64) -> Result<Image> {
        let mut config = self.original.config.clone();
        let ids = layers.iter().map(|layer| layer.digest.clone());
        config.rootfs.diff_ids = Bounded(ids.collect());
        let config = config.to_bytes();
        let descriptor = Descriptor::of(OCI_CONFIG, &config);
        let mut manifest = Manifest::new(MediaType::OciManifest, descriptor, layers);
        let original = &self.original.descriptor;
        manifest.subject = Some(Descriptor::new(
            &original.media_type,
            original.digest.clone(),
            original.size,
        ));
        manifest.artifact_type = Some(ARTIFACT_TYPE.to_owned());
        for (name, value) in [
            (VIRTUAL_SIZE, virtual_bytes.to_string()),
            (SOURCE, "tar".to_owned()),
        ] {
            manifest.annotations.insert(name.to_owned(), value);
        }
        Ok(Image::of_manifest(&self.subject, manifest, config)?)
    }
}
