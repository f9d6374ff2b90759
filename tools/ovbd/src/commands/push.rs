// SPDX-License-Identifier: GPL-2.0

//! `ovbd push`.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{bail, Context, Result};
use clap::{Args, ValueHint};
use ovbd_image::{tar, zfile::Options};
use ovbd_layers::{
    blob::{Blob, Content},
    build::{self, wrapped_bytes},
    file_range::FileRange,
    layer::LayerPath,
    parents,
    report::Report as _,
    split,
    stack::Stack,
    units,
};
use ovbd_oci::{
    annotations::{
        ARTIFACT_TYPE, BASE_DIGEST, BASE_NAME, BLOB_DIGEST, BLOB_SIZE, CREATED, FS_TYPE, SOURCE,
        VERSION, VERSION_VALUE, VIRTUAL_SIZE,
    },
    BlobSource, Bounded, Config, Descriptor, Error, FilePart, History, Image, Kind, Manifest,
    MediaType, Outgoing, Pieces, Platform, Reference, Registry, RootFs, Store, DOCKER_CONFIG,
    DOCKER_LAYER, MAX_LAYERS, OCI_CONFIG, OCI_LAYER,
};
use rayon::prelude::*;
use serde_json::json;

use crate::{
    cli::{self, Parents},
    commands::images::{layer_count, stored, virtual_bytes},
    filesystem,
    names::{Found, StoreOption},
    remote::{Shown, Transfer},
    report::Report,
};

const EXAMPLES: &str = "Examples:

  ovbd push base.layer next.layer reg.example:5000/vm/web:mon
      two layers as an image

  ovbd push reg.example:5000/vm/web:mon tue.layer reg.example:5000/vm/web:tue
      an image of the store with one more layer, which alone is sent

  ovbd push --split=2G disk.layer reg.example:5000/vm/web:mon
      what breaks costs no more than 2 GiB

  ovbd push oci:usb/images:web reg.example:5000/vm/web:mon
      an image in a folder, as it is

  ovbd push --config config.json root.layer reg.example/vm/root:1
      a container too, with {\"Cmd\": [\"/sbin/init\"]} in config.json";

/// Send an image to a registry.
///
/// The image is a stack of layers, bottom first, or one of the store or of the layout oci:DIR[:NAME], which is sent as it
/// is. An image followed by layers is that image with these on top. What the registry has is not sent; an upload that
/// was interrupted is gone on with. The same layers and options give the same image: pushing it again sends nothing.
///
/// The time in the image is that of SOURCE_DATE_EPOCH, without it there is none.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Push {
    /// Type of the file system in the image, for containers; "none" if there is none [default: what blkid finds]
    #[arg(long, value_name = "TYPE")]
    pub fs: Option<String>,
    /// Take Env, Cmd and the like from this configuration, an image's or its "config" alone, so that the image is a
    /// container
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Send the lowest layer as several, with at most this much data each [default: 1G, or a 64th of it]: registries that
    /// lose what they have of a layer when a connection breaks lose less of it
    #[arg(long, value_name = "BYTES", num_args = 0..=1, require_equals = true, default_missing_value = "0", value_parser = units::parse)]
    pub split: Option<u64>,
    /// Write Docker's media types, for old registries
    #[arg(long)]
    pub docker_types: bool,
    /// Say that the image is another form of this one, of the same repository
    #[arg(long, value_name = "REF")]
    pub subject: Option<Reference>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// How to send.
    #[command(flatten)]
    pub transfer: Transfer,
    /// Layers or images, bottom first, and then the name to push to: [HOST[:PORT]/]REPOSITORY[:TAG]
    #[arg(value_name = "LAYER|REF", required = true, num_args = 2.., value_hint = ValueHint::FilePath)]
    pub names: Vec<OsString>,
}

/// An image that is to be sent.
struct ToSend {
    manifest: Manifest,
    media_type: MediaType,
    bytes: Vec<u8>,
    blobs: Vec<Outgoing<'static>>,
}

impl Push {
    /// Sends the image.
    pub fn run(mut self, report: &Report) -> Result<ExitCode> {
        let target = self.names.pop().unwrap_or_default();
        let target: Reference = target
            .to_str()
            .context("the name to push to is not text")?
            .parse()?;
        if target.digest().is_some() {
            return Err(Error::new(
                Kind::Refused,
                target,
                "an image is pushed to a tag: its digest is what it is",
            )
            .into());
        }
        let registry = Registry::to_push(&target, self.transfer.options());
        let mut found = Vec::new();
        for name in &self.names {
            found.push(self.store.find(name)?);
        }
        let plain = self.config.is_none()
            && self.subject.is_none()
            && !self.docker_types
            && self.split.is_none()
            && self.fs.is_none();
        let image = match &found[..] {
            [Some(found)] if plain => as_it_is(found)?,
            _ => self.compose(&found, &registry, report)?,
        };
        let blobs = image.blobs.iter().enumerate().map(|(number, out)| {
            let name = match number == image.manifest.layers.len() {
                true => "configuration".to_owned(),
                false => format!("layer {number}: {}", units::size(out.blob.size)),
            };
            (out.blob.digest.clone(), name, out.blob.size)
        });
        let shown = Shown::new(report, "pushing", blobs);
        let mut blobs = image.blobs;
        let store = Store::open(&self.store.path()).ok();
        if let Some(store) = &store {
            for out in &mut blobs {
                out.from = repositories_with(store, &target, &out.blob)?;
            }
        }
        let _guard = store.as_ref().and_then(|store| store.protect().ok());
        // Without a store that can be written to, an upload is not gone on with by another process.
        let notes = store.as_ref().filter(|_| _guard.is_some());
        ovbd_oci::send_blobs(
            &registry,
            &blobs,
            usize::from(self.transfer.jobs),
            notes,
            &shown,
        )?;
        let digest =
            registry.put_document(&target.target(), image.media_type.name(), &image.bytes)?;
        if image.manifest.subject.is_some() && !registry.knows_subjects() {
            let descriptor = Descriptor::of(image.media_type.name(), &image.bytes);
            registry.list_referrer(&image.manifest, &descriptor)?;
        }
        let counts = shown.counts();
        report.note(format_args!(
            "{} sent, {} already there, {} taken from other repositories",
            counts.done, counts.present, counts.mounted
        ));
        let count = image.manifest.layers.len();
        let bytes: u64 = image.manifest.layers.iter().map(|layer| layer.size).sum();
        let size = image
            .manifest
            .annotations
            .get(VIRTUAL_SIZE)
            .and_then(|size| size.parse().ok());
        report.print(&match self.json {
            true => format!("{}\n", json!({
                "name": target.to_string(), "digest": digest, "layers": count, "stored": bytes, "virtual": size,
                "sent": counts.done, "present": counts.present, "mounted": counts.mounted,
            })),
            false => {
                let size = size.map_or(String::new(), |size| format!(" of {}", units::size(size)));
                format!("{target}  {digest}  {}, {}{size}\n", layer_count(count), units::size(bytes))
            }
        })
    }

    /// Makes an image of layers, the first of which may be those of an image whose configuration is kept.
    fn compose(
        &self,
        found: &[Option<Found>],
        registry: &Registry,
        report: &Report,
    ) -> Result<ToSend> {
        let base = match found.first() {
            Some(Some(found)) => Some((
                found.named.name.clone(),
                found.image()?,
                found.layers()?.len(),
            )),
            _ => None,
        };
        let paths = self.store.resolve(&self.names)?;
        let stack = Stack::open(&paths, self.parents.of_device())?;
        let kept = base.as_ref().map_or(0, |(.., count)| *count);
        let fs_type = match self.fs.as_deref() {
            Some("none") => None,
            Some(given) => Some(given.to_owned()),
            None => filesystem::detect(&stack)?,
        };
        let mut sources: Vec<Arc<dyn BlobSource>> =
            paths.iter().map(wrapped).collect::<Result<_>>()?;
        let mut names: Vec<PathBuf> = paths.iter().map(|path| path.data().to_owned()).collect();
        if let (Some(most), Some(lowest)) = (self.split, paths.first()) {
            if kept > 0 {
                let what =
                    "--split is for the first push: the layers of an image are sent as they are";
                return Err(Error::new(Kind::Refused, lowest.data().display(), what).into());
            }
            let parts = split(lowest, most, MAX_LAYERS - (paths.len() - 1), report)?;
            names.splice(0..1, (0..parts.len()).map(|_| lowest.data().to_owned()));
            sources.splice(0..1, parts);
        }
        let bytes = sources[kept..].iter().map(|source| source.size()).sum();
        report.begin("hashing", bytes);
        let digests: Vec<_> = (kept..sources.len())
            .into_par_iter()
            .map(|number| {
                let digest = sources[number].digest(|bytes| report.add(bytes));
                digest.with_context(|| format!("{}: cannot read", names[number].display()))
            })
            .collect::<Result<_>>()?;
        let mut layers: Vec<Descriptor> = match &base {
            Some((_, image, _)) => crate::names::block_layers(image, "base")?
                .iter()
                .map(|layer| layer.descriptor.clone())
                .collect(),
            None => Vec::new(),
        };
        let layer_type = if self.docker_types {
            DOCKER_LAYER
        } else {
            OCI_LAYER
        };
        for (digest, source) in digests.into_iter().zip(&sources[kept..]) {
            let mut layer = Descriptor::new(layer_type, digest, source.size());
            let mut note = |name: &str, value: &str| {
                layer.annotations.insert(name.to_owned(), value.to_owned())
            };
            note(BLOB_DIGEST, &layer.digest.to_string());
            note(BLOB_SIZE, &layer.size.to_string());
            note(VERSION, VERSION_VALUE);
            if let Some(fs_type) = &fs_type {
                note(FS_TYPE, fs_type);
            }
            layers.push(layer);
        }
        if self.docker_types {
            layers
                .iter_mut()
                .for_each(|layer| layer.media_type = DOCKER_LAYER.to_owned());
        }
        let created = created()?;
        let config = self
            .config(
                base.as_ref().map(|(_, image, _)| image),
                &layers,
                &names[kept..],
                created.as_deref(),
            )?
            .to_bytes();
        let (media_type, config_type) = match self.docker_types {
            true => (MediaType::DockerManifest, DOCKER_CONFIG),
            false => (MediaType::OciManifest, OCI_CONFIG),
        };
        let mut manifest = Manifest::new(
            media_type,
            Descriptor::of(config_type, &config),
            layers.clone(),
        );
        let mut note =
            |name: &str, value: String| manifest.annotations.insert(name.to_owned(), value);
        note(VIRTUAL_SIZE, stack.virtual_bytes().to_string());
        note(SOURCE, "file".to_owned());
        if let Some(created) = created {
            note(CREATED, created);
        }
        if let Some((name, image, _)) = &base {
            note(BASE_DIGEST, image.descriptor.digest.to_string());
            if let Some(name) = name {
                note(BASE_NAME, name.clone());
            }
        }
        if let Some(subject) = &self.subject {
            manifest.subject = Some(self.subject_of(subject, registry)?);
            manifest.artifact_type = Some(ARTIFACT_TYPE.to_owned());
        }
        let bytes = manifest.to_bytes();
        let mut blobs: Vec<Outgoing<'static>> = layers
            .into_iter()
            .zip(sources)
            .map(|(blob, source)| Outgoing {
                blob,
                source: Box::new(Shared(source)),
                from: Vec::new(),
            })
            .collect();
        blobs.push(Outgoing {
            blob: manifest.config.clone(),
            source: Box::new(config),
            from: Vec::new(),
        });
        Ok(ToSend {
            manifest,
            media_type,
            bytes,
            blobs,
        })
    }

    fn subject_of(&self, subject: &Reference, registry: &Registry) -> Result<Descriptor> {
        let here = registry.reference();
        if subject.name() != here.name() {
            return Err(Error::new(
                Kind::Refused,
                subject,
                format!("the subject must be in {}", here.name()),
            )
            .into());
        }
        let found = registry.document(&subject.target())?;
        let (_, descriptor) = found
            .ok_or_else(|| Error::new(Kind::Missing, subject, "no such image in the registry"))?;
        Ok(descriptor)
    }

    /// The configuration: that of the image below, or what `--config` gives.
    fn config(
        &self,
        base: Option<&Image>,
        layers: &[Descriptor],
        new: &[PathBuf],
        created: Option<&str>,
    ) -> Result<Config> {
        let here = Platform::here();
        let mut config = match base {
            Some(image) => image.config.clone(),
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
        if let Some(path) = &self.config {
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
        // The digest of a layer is that of its uncompressed form: the tar around it is not compressed.
        let mut ids: Vec<_> = match base {
            Some(image) => crate::names::block_layers(image, "base")?
                .iter()
                .map(|layer| layer.diff_id.clone())
                .collect(),
            None => Vec::new(),
        };
        ids.extend(layers[ids.len()..].iter().map(|layer| layer.digest.clone()));
        config.rootfs.diff_ids = Bounded(ids);
        config.history.extend(new.iter().map(|path| {
            History {
                created: created.map(str::to_owned),
                created_by: path
                    .file_name()
                    .map(|name| format!("ovbd push {}", name.to_string_lossy())),
                ..History::default()
            }
        }));
        Ok(config)
    }
}

/// An image of a store, with exactly its documents.
fn as_it_is(found: &Found) -> Result<ToSend> {
    let image = found.image()?;
    let mut blobs = Vec::new();
    for blob in image.manifest.layers.iter() {
        blobs.push(Outgoing {
            blob: blob.clone(),
            source: Box::new(found.store.source(blob)?),
            from: Vec::new(),
        });
    }
    let config = image.manifest.config.clone();
    blobs.push(Outgoing {
        blob: config,
        source: Box::new(image.config_bytes.clone()),
        from: Vec::new(),
    });
    tracing::debug!(
        stored = stored(&image),
        virtual_bytes = virtual_bytes(&image),
        "as it is"
    );
    Ok(ToSend {
        media_type: image.media_type(),
        bytes: image.manifest_bytes,
        manifest: image.manifest,
        blobs,
    })
}

/// Repositories on the same registry whose images, as the store knows them, have the blob.
fn repositories_with(store: &Store, target: &Reference, blob: &Descriptor) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in store.names()? {
        let Some(reference) = entry
            .name
            .as_ref()
            .and_then(|name| name.parse::<Reference>().ok())
        else {
            continue;
        };
        if reference.host() != target.host()
            || names.iter().any(|name| name == reference.repository())
        {
            continue;
        }
        // What cannot be read has no layers to offer.
        let Ok(image) = store.image(&entry.descriptor, &Platform::here()) else {
            continue;
        };
        let parts = image.manifest.layers.iter().chain([&image.manifest.config]);
        if parts.into_iter().any(|part| part.digest == blob.digest) {
            names.push(reference.repository().to_owned());
        }
    }
    names.truncate(4);
    Ok(names)
}

/// The layer as several, each with at most `most` bytes of data; 0 is the default. The last one has the UUID of the layer,
/// which those above it know. There may be `room` of them. The files go with the program, they have no names.
fn split(
    layer: &LayerPath,
    most: u64,
    room: usize,
    report: &Report,
) -> Result<Vec<Arc<dyn BlobSource>>> {
    let stack = Stack::open(std::slice::from_ref(layer), parents::Parents::Ignored)?;
    let LayerPath::Sealed(path) = layer else {
        return Ok(vec![wrapped(layer)?]);
    };
    let data = stack.data_bytes();
    let most = match most {
        0 => (1 << 30).max(data / 64),
        most => most,
    };
    if data <= most {
        return Ok(vec![wrapped(layer)?]);
    }
    let zfile = match Blob::open(path)?.content {
        Content::Plain(_) => None,
        Content::Zfile(zfile) => Some(Options {
            block_bytes: zfile.geometry().block_bytes(),
            algorithm: zfile.geometry().algorithm(),
            block_crc: zfile.geometry().has_block_crc(),
        }),
    };
    cli::clean_up_on_signals()?;
    report.begin("splitting", data);
    let folder = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let folder = tempfile::tempdir_in(&folder)
        .with_context(|| format!("{}: cannot make a folder in it", folder.to_string_lossy()))?;
    let parts = split::parts(&stack, most);
    if parts.len() > room {
        let what = format!(
            "would be {} layers, and there is room for {room}: an image has at most {MAX_LAYERS}",
            parts.len()
        );
        return Err(Error::new(Kind::Refused, path.display(), what).into());
    }
    let own = stack.top().and_then(|top| top.uuid());
    let (mut sources, mut below) = (Vec::new(), None);
    for (number, part) in parts.iter().enumerate() {
        let is_last = number + 1 == parts.len();
        let options = build::Options {
            zfile,
            tar: true,
            uuid: own.filter(|_| is_last),
            parent_uuid: below,
            ..build::Options::default()
        };
        let file = folder.path().join(number.to_string());
        below = Some(split::write_part(
            &stack,
            part.clone(),
            &file,
            &options,
            report,
        )?);
        sources.push(wrapped(&LayerPath::Sealed(file.clone()))?);
        std::fs::remove_file(&file)
            .with_context(|| format!("{}: cannot remove", file.display()))?;
    }
    Ok(sources)
}

/// The bytes of a layer in the tar wrapper, which is put around those that have none without copying them.
fn wrapped(path: &LayerPath) -> Result<Arc<dyn BlobSource>> {
    let LayerPath::Sealed(file) = path else {
        return Err(ovbd_layers::Error::new(
            path.data(),
            "a writable layer cannot be pushed: export and build it first",
        )
        .into());
    };
    let blob = Blob::open(file)?;
    let range = FileRange::open(file)?;
    let handle = Arc::new(
        range
            .file()
            .try_clone()
            .with_context(|| format!("{}: cannot open", file.display()))?,
    );
    if blob.tar.is_some() {
        return Ok(Arc::new(FilePart::new(handle, 0, range.bytes())));
    }
    let part = FilePart::new(handle, 0, range.bytes());
    let rest = wrapped_bytes(range.bytes()) - tar::HEADER_BYTES as u64 - range.bytes();
    let pieces = Pieces::default()
        .with(tar::header(range.bytes()).to_vec())
        .with(part)
        .with(vec![0; rest as usize]);
    Ok(Arc::new(pieces))
}

/// A source that several hold.
struct Shared(Arc<dyn BlobSource>);

impl BlobSource for Shared {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
        self.0.read_at(buffer, at)
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
fn rfc3339(seconds: i64) -> String {
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
    use super::*;

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
