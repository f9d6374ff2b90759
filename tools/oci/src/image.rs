// SPDX-License-Identifier: GPL-2.0

//! An image as manifest and configuration tell of it, before any layer is fetched.

use crate::{
    annotations::{ACCELERATION, BLOB_DIGEST, FAST_TARGET, TURBO_TARGET, VERSION},
    digest::Digest,
    document::{Descriptor, MediaType},
    error::{Error, Result},
    manifest::{Config, Manifest},
};

/// Manifest and configuration that belong together.
#[derive(Clone, Debug)]
pub struct Image {
    /// The manifest, with its type and digest.
    pub descriptor: Descriptor,
    /// The bytes of the manifest.
    pub manifest_bytes: Vec<u8>,
    /// The manifest.
    pub manifest: Manifest,
    /// The bytes of the configuration.
    pub config_bytes: Vec<u8>,
    /// The configuration.
    pub config: Config,
}

/// A layer of an [`Image`].
#[derive(Clone, Debug)]
pub struct ImageLayer<'a> {
    /// Its place in the manifest, from the bottom.
    pub number: usize,
    /// What the manifest says of it.
    pub descriptor: &'a Descriptor,
    /// Its digest when it is not compressed.
    pub diff_id: &'a Digest,
    /// What its annotations and type show.
    pub kind: LayerKind,
}

/// What a layer is, as far as a manifest shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// An OverlayBD layer by its annotations.
    Overlaybd,
    /// Of an image without a name for it: the content decides.
    Unknown,
    /// A compressed tar: an OverlayBD layer that a copying tool compressed, or one of ordinary files.
    Compressed,
    /// A record of reads, no data.
    Acceleration,
    /// Metadata that points into an ordinary layer.
    TurboOci,
}

impl LayerKind {
    /// Whether there is more in it than a record of reads.
    pub(crate) fn holds_data(self) -> bool {
        self != Self::Acceleration
    }
}

impl Image {
    /// Checks that `manifest_bytes`, as parsed, and `config_bytes` are an image; `subject` is its name in errors.
    ///
    /// # Errors
    ///
    /// A configuration that is not as the manifest describes it or is for another number of layers.
    pub fn new(
        subject: &dyn std::fmt::Display,
        descriptor: Descriptor,
        manifest_bytes: Vec<u8>,
        manifest: Manifest,
        config_bytes: Vec<u8>,
    ) -> Result<Self> {
        if config_bytes.len() as u64 != manifest.config.size
            || digest_of(&config_bytes, &manifest.config.digest) != manifest.config.digest
        {
            return Err(Error::invalid(
                subject,
                "the configuration is not as the manifest describes it",
            ));
        }
        let config = Config::parse(&config_bytes, subject)?;
        let (layers, ids) = (manifest.layers.len(), config.rootfs.diff_ids.len());
        if layers != ids {
            return Err(Error::invalid(
                subject,
                format!("the manifest has {layers} layers and the configuration {ids}"),
            ));
        }
        if layers == 0 {
            return Err(Error::invalid(subject, "an image without layers"));
        }
        Ok(Self {
            descriptor,
            manifest_bytes,
            manifest,
            config_bytes,
            config,
        })
    }

    /// The image of an OCI manifest that is made here, and has no bytes and digest yet.
    ///
    /// # Errors
    ///
    /// As [`Image::new`].
    pub fn of_manifest(
        subject: &dyn std::fmt::Display,
        manifest: Manifest,
        config_bytes: Vec<u8>,
    ) -> Result<Self> {
        let bytes = manifest.to_bytes();
        let descriptor = Descriptor::of(MediaType::OciManifest.name(), &bytes);
        Self::new(subject, descriptor, bytes, manifest, config_bytes)
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> impl Iterator<Item = ImageLayer<'_>> {
        let layers = self
            .manifest
            .layers
            .iter()
            .zip(self.config.rootfs.diff_ids.iter());
        layers
            .enumerate()
            .map(|(number, (descriptor, diff_id))| ImageLayer {
                number,
                descriptor,
                diff_id,
                kind: kind(descriptor),
            })
    }

    /// The layers that hold data, bottom first: records of reads hold none.
    pub fn data_layers(&self) -> impl Iterator<Item = ImageLayer<'_>> {
        self.layers().filter(|layer| layer.kind.holds_data())
    }

    /// The blob that a TurboOCI layer points into, which is in the same repository, as far as its annotations say.
    ///
    /// # Errors
    ///
    /// No digest, or one that is none.
    pub fn turbo_target(&self, layer: &ImageLayer<'_>, subject: &str) -> Result<Digest> {
        let annotations = &layer.descriptor.annotations;
        let text = annotations
            .get(TURBO_TARGET)
            .or_else(|| annotations.get(FAST_TARGET));
        let fail = |what: &str| {
            let what = format!("layer {} is TurboOCI {what}", layer.number);
            Error::invalid(subject, what)
        };
        let text = text.ok_or_else(|| fail("without the digest of its target"))?;
        let digest = text.parse();
        digest.map_err(|_| fail("with a digest of its target that is none"))
    }

    /// Type of the manifest.
    pub fn media_type(&self) -> MediaType {
        MediaType::from_name(&self.descriptor.media_type).unwrap_or(MediaType::OciManifest)
    }
}

/// The digest of `bytes` by the same hash function as `like`.
pub(crate) fn digest_of(bytes: &[u8], like: &Digest) -> Digest {
    let mut hasher = crate::Hasher::new(like.algorithm());
    hasher.update(bytes);
    hasher.finish()
}

/// What a layer is, by what the manifest says of it.
pub(crate) fn kind(layer: &Descriptor) -> LayerKind {
    let has = |name: &str| layer.annotations.contains_key(name);
    let version = layer.annotations.get(VERSION).map_or("", String::as_str);
    if has(TURBO_TARGET)
        || has(FAST_TARGET)
        || version.ends_with("-turbo.ociv1")
        || version.ends_with("-fastoci")
    {
        return LayerKind::TurboOci;
    }
    if layer
        .annotations
        .get(ACCELERATION)
        .is_some_and(|value| value == "yes")
    {
        return LayerKind::Acceleration;
    }
    let compressed = [".gzip", "+gzip", "+zstd", ".zstd"]
        .iter()
        .any(|end| layer.media_type.ends_with(end));
    if compressed {
        LayerKind::Compressed
    } else if has(BLOB_DIGEST) {
        LayerKind::Overlaybd
    } else {
        LayerKind::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::OCI_LAYER;

    #[test]
    fn annotations_and_types_tell_layers_apart() {
        let layer = |media_type: &str, annotations: &[(&str, &str)]| {
            let mut layer = Descriptor::of(media_type, b"x");
            layer.annotations = annotations
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect();
            kind(&layer)
        };
        assert_eq!(layer(OCI_LAYER, &[]), LayerKind::Unknown);
        assert_eq!(
            layer(OCI_LAYER, &[(BLOB_DIGEST, "x")]),
            LayerKind::Overlaybd
        );
        assert_eq!(
            layer(OCI_LAYER, &[(BLOB_DIGEST, "x"), (ACCELERATION, "yes")]),
            LayerKind::Acceleration
        );
        assert_eq!(
            layer("application/vnd.oci.image.layer.v1.tar+gzip", &[]),
            LayerKind::Compressed
        );
        assert_eq!(
            layer(
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                &[(TURBO_TARGET, "x")]
            ),
            LayerKind::TurboOci
        );
        assert_eq!(
            layer(OCI_LAYER, &[(VERSION, "0.1.0-fastoci")]),
            LayerKind::TurboOci
        );
    }
}
