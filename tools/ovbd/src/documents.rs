// SPDX-License-Identifier: GPL-2.0

//! Manifest and configuration of a new image.

use std::path::Path;

use anyhow::{bail, Context, Result};
use ovbd_oci::{
    annotations::{
        BASE_DIGEST, BASE_NAME, BLOB_DIGEST, BLOB_SIZE, CHUNK_LIST, CREATED, FS_TYPE, SOURCE,
        TAR_BYTES, VERSION, VERSION_VALUE, VIRTUAL_SIZE,
    },
    Bounded, ChunkList, Config, Descriptor, Digest, History, Image, ImageLayer, LayerKind,
    Manifest, MediaType, Platform, RootFs, DOCKER_CONFIG, DOCKER_LAYER, MAX_LAYERS, OCI_CONFIG,
    OCI_LAYER,
};
use serde_json::json;

/// A layer that is not in an image yet, in its tar wrapper.
#[derive(Clone)]
pub struct NewLayer {
    /// Digest of the blob, which is not compressed.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
    /// What it was made of, for the history.
    pub made_of: Option<String>,
    /// Bytes of the original tar that it begins with, if it does.
    pub tar_bytes: Option<u64>,
    /// The list of its chunks.
    pub chunks: ChunkList,
}

/// What a new image is made of.
pub struct Composition<'a> {
    /// The image below, and its name.
    pub base: Option<(Option<&'a str>, &'a Image)>,
    /// Layers on top of it, bottom first.
    pub new: Vec<NewLayer>,
    /// Size of the device.
    pub virtual_bytes: u64,
    /// `file`, `thin` or `thick`.
    pub source: &'a str,
    /// Type of the file system.
    pub fs_type: Option<&'a str>,
    /// Docker's media types.
    pub docker_types: bool,
    /// A file with Env, Cmd and the like.
    pub config: Option<&'a Path>,
}

impl Composition<'_> {
    /// Type of the manifest.
    pub fn media_type(&self) -> MediaType {
        match self.docker_types {
            true => MediaType::DockerManifest,
            false => MediaType::OciManifest,
        }
    }

    /// The manifest, and the bytes of the configuration that it names.
    ///
    /// # Errors
    ///
    /// An image below that is none of block layers; a file with a configuration that is none; SOURCE_DATE_EPOCH.
    pub fn documents(&self) -> Result<(Manifest, Vec<u8>)> {
        let mut layers: Vec<Descriptor> = Vec::new();
        let mut ids = Vec::new();
        if let Some((_, image)) = self.base {
            for layer in crate::names::block_layers(image, "base")? {
                layers.push(layer.descriptor.clone());
                ids.push(layer.diff_id.clone());
            }
        }
        let count = layers.len() + self.new.len();
        if count > MAX_LAYERS {
            bail!("the image would have {count} layers, and nobody reads more than {MAX_LAYERS} (of a volume --full sends all anew)");
        }
        for new in &self.new {
            let mut layer = Descriptor::new(OCI_LAYER, new.digest.clone(), new.bytes);
            note_blob(&mut layer);
            // A list that nobody would read is not named.
            if ChunkList::size(new.bytes).is_some() {
                let digest = Digest::of(new.chunks.as_bytes()).to_string();
                layer.annotations.insert(CHUNK_LIST.to_owned(), digest);
            }
            if let Some(fs_type) = self.fs_type {
                let annotations = &mut layer.annotations;
                annotations.insert(FS_TYPE.to_owned(), fs_type.to_owned());
            }
            if let Some(bytes) = new.tar_bytes {
                let annotations = &mut layer.annotations;
                annotations.insert(TAR_BYTES.to_owned(), bytes.to_string());
            }
            layers.push(layer);
            // The digest of a layer is that of its uncompressed form: the tar around it is not compressed.
            ids.push(new.digest.clone());
        }
        if self.docker_types {
            layers
                .iter_mut()
                .for_each(|layer| layer.media_type = DOCKER_LAYER.to_owned());
        }
        let created = created()?;
        let mut config = self.config(created.as_deref())?;
        config.rootfs.diff_ids = Bounded(ids);
        let config = config.to_bytes();
        let config_type = match self.docker_types {
            true => DOCKER_CONFIG,
            false => OCI_CONFIG,
        };
        let descriptor = Descriptor::of(config_type, &config);
        let mut manifest = Manifest::new(self.media_type(), descriptor, layers);
        let mut note =
            |name: &str, value: String| manifest.annotations.insert(name.to_owned(), value);
        note(VIRTUAL_SIZE, self.virtual_bytes.to_string());
        note(SOURCE, self.source.to_owned());
        if let Some(created) = created {
            note(CREATED, created);
        }
        if let Some((name, image)) = self.base {
            note(BASE_DIGEST, image.descriptor.digest.to_string());
            if let Some(name) = name {
                note(BASE_NAME, name.to_owned());
            }
        }
        Ok((manifest, config))
    }

    /// The configuration without digests: that of the image below, or what the file gives.
    fn config(&self, created: Option<&str>) -> Result<Config> {
        let here = Platform::here();
        let mut config = match self.base {
            Some((_, image)) => image.config.clone(),
            None => Config {
                architecture: here.architecture,
                os: here.os,
                rootfs: RootFs {
                    kind: "layers".to_owned(),
                    diff_ids: Bounded::default(),
                },
                history: Vec::new(),
                other: [("config".to_owned(), json!({}))].into_iter().collect(),
            },
        };
        if let Some(path) = self.config {
            let text =
                std::fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?;
            let given: serde_json::Value = serde_json::from_slice(&text)
                .with_context(|| format!("{}: not JSON", path.display()))?;
            let Some(object) = given.as_object() else {
                bail!("{}: not a JSON object", path.display());
            };
            match object.get("config") {
                Some(inner) if inner.is_object() => {
                    config.other.insert("config".to_owned(), inner.clone());
                    for name in ["author", "variant", "os.version"] {
                        if let Some(value) = object.get(name) {
                            config.other.insert(name.to_owned(), value.clone());
                        }
                    }
                    for (name, field) in [
                        ("architecture", &mut config.architecture),
                        ("os", &mut config.os),
                    ] {
                        if let Some(value) = object.get(name).and_then(serde_json::Value::as_str) {
                            *field = value.to_owned();
                        }
                    }
                }
                _ => {
                    config.other.insert("config".to_owned(), given);
                }
            }
        }
        if let Some(created) = created {
            config.other.insert("created".to_owned(), json!(created));
        }
        config.history.extend(self.new.iter().map(|new| History {
            created: created.map(str::to_owned),
            created_by: new.made_of.as_ref().map(|name| format!("ovbd push {name}")),
            ..History::default()
        }));
        Ok(config)
    }
}

/// Says on a layer that it is OverlayBD, for containerd's snapshotter.
pub fn note_blob(layer: &mut Descriptor) {
    for (name, value) in [
        (BLOB_DIGEST, layer.digest.to_string()),
        (BLOB_SIZE, layer.size.to_string()),
        (VERSION, VERSION_VALUE.to_owned()),
    ] {
        layer.annotations.insert(name.to_owned(), value);
    }
}

/// The identity of what layers give, by the digests of their uncompressed forms, bottom first: the chain ID of OCI.
pub fn chain<'a>(ids: impl IntoIterator<Item = &'a Digest>) -> Option<Digest> {
    ids.into_iter().fold(None, |below, id| {
        Some(match below {
            None => id.clone(),
            Some(below) => Digest::of(format!("{below} {id}").as_bytes()),
        })
    })
}

/// The chain of the block layers of an image.
///
/// # Errors
///
/// An image that is none of block layers.
pub fn chain_of(image: &Image) -> Result<Option<Digest>> {
    let layers = crate::names::block_layers(image, "base")?;
    Ok(chain(layers.into_iter().map(content_of)))
}

/// The digest of what a layer holds. What the configuration says of it is compared only where it had to be decompressed;
/// elsewhere the blob is the content.
pub fn content_of(layer: ImageLayer<'_>) -> &Digest {
    match layer.kind {
        LayerKind::Compressed => layer.diff_id,
        _ => &layer.descriptor.digest,
    }
}

/// The time of SOURCE_DATE_EPOCH as RFC 3339 has it.
fn created() -> Result<Option<String>> {
    let Some(text) = std::env::var_os("SOURCE_DATE_EPOCH") else {
        return Ok(None);
    };
    let seconds: i64 = text
        .to_str()
        .and_then(|text| text.parse().ok())
        .filter(|seconds| (0..=253_402_300_799).contains(seconds))
        .context("SOURCE_DATE_EPOCH is not a number of seconds since 1970")?;
    Ok(Some(rfc3339(seconds)))
}

/// Days since 1970 as a date of the Gregorian calendar, in periods of 400 years that begin on 1 March.
pub fn rfc3339(seconds: i64) -> String {
    let (days, time) = (
        seconds.div_euclid(86_400) + 719_468,
        seconds.rem_euclid(86_400),
    );
    let (period, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month < 10 {
        true => (period * 400 + year, month + 3),
        false => (period * 400 + year + 1, month - 9),
    };
    format!(
        "{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z",
        time / 3600,
        time / 60 % 60,
        time % 60
    )
}

#[cfg(test)]
mod tests {
    use ovbd_oci::ChunkLister;

    use super::*;

    #[test]
    fn chains() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(chain([]), None);
        assert_eq!(chain([&a]), Some(a.clone()));
        let both = Digest::of(format!("{a} {b}").as_bytes());
        assert_eq!(chain([&a, &b]), Some(both));
        assert_ne!(chain([&a, &b]), chain([&b, &a]));
    }

    /// The image of these layers, whose configuration has other digests of their content.
    fn image(layers: Vec<Descriptor>, ids: Vec<Digest>) -> Image {
        let config = json!({
            "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids},
        });
        let config = config.to_string().into_bytes();
        let descriptor = Descriptor::of(OCI_CONFIG, &config);
        let manifest = Manifest::new(MediaType::OciManifest, descriptor, layers);
        Image::of_manifest(&"test", manifest, config).unwrap()
    }

    fn layer(number: usize) -> Descriptor {
        let digest = Digest::of(number.to_string().as_bytes());
        let mut layer = Descriptor::new(OCI_LAYER, digest.clone(), 4096);
        for (name, value) in [
            (BLOB_DIGEST, digest.to_string()),
            (BLOB_SIZE, "4096".to_owned()),
            (VERSION, VERSION_VALUE.to_owned()),
        ] {
            layer.annotations.insert(name.to_owned(), value);
        }
        layer
    }

    /// Nobody compares the configuration with blobs that are not compressed: whoever writes one could give a base the chain
    /// of another.
    #[test]
    fn a_chain_is_of_the_blobs_and_not_of_what_a_configuration_says() {
        let (a, b) = (layer(0), layer(1));
        let other = vec![Digest::of(b"x"), Digest::of(b"y")];
        let found = chain_of(&image(vec![a.clone(), b.clone()], other)).unwrap();
        assert_eq!(found, chain([&a.digest, &b.digest]));
    }

    #[test]
    fn an_image_that_nobody_reads_is_not_made() {
        let layers: Vec<Descriptor> = (0..MAX_LAYERS - 1).map(layer).collect();
        let ids = layers.iter().map(|layer| layer.digest.clone()).collect();
        let base = image(layers, ids);
        let documents = |count: usize| {
            let new = (0..count).map(|n| NewLayer {
                digest: Digest::of(format!("new {n}").as_bytes()),
                bytes: 4096,
                made_of: None,
                tar_bytes: None,
                chunks: ChunkLister::new(4096).finish(),
            });
            let composition = Composition {
                base: Some((None, &base)),
                new: new.collect(),
                virtual_bytes: 1 << 20,
                source: "thin",
                fs_type: None,
                docker_types: false,
                config: None,
            };
            composition
                .documents()
                .map(|(manifest, _)| manifest.layers.len())
        };
        assert_eq!(documents(1).unwrap(), MAX_LAYERS);
        let error = documents(2).unwrap_err().to_string();
        assert!(error.contains("would have 256 layers"), "{error}");
    }

    #[test]
    fn times() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_662_001, "2026-11-26T03:00:01Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }
}
