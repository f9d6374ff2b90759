// SPDX-License-Identifier: GPL-2.0

//! Where an image is pushed to: a repository of a registry, or an image layout `oci:DIR[:NAME]`.

use std::{fmt, fs, path::Path};

use anyhow::{Context, Result};
use ovbd_oci::{
    Descriptor, Digest, Document, Error, Image, Ingested, Kind, MediaType, NoProgress, Outgoing,
    Platform, Reference, Registry, Store,
};

use crate::{
    names::split_layout,
    remote::{Counts, Shown, Transfer},
};

/// Bytes that are copied at once.
const BUFFER_BYTES: usize = 256 << 10;

/// The name in a layout where none is given.
const DEFAULT_NAME: &str = "latest";

/// Where an image goes, and under which name.
pub enum Place {
    /// A repository and a tag in it.
    Registry(Box<Reference>, Box<Registry>),
    /// A layout, by its absolute path, and a name in it.
    Layout {
        /// The layout.
        store: Store,
        /// Its folder.
        folder: String,
        /// The name.
        name: String,
    },
}

impl Place {
    /// Takes the last word of a command line. A layout is made if it is missing.
    ///
    /// # Errors
    ///
    /// A name that is none, or with a digest; a folder that cannot become a layout.
    pub fn parse(text: &str, transfer: &Transfer) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("oci:") {
            let (folder, name) = split_layout(rest);
            let store = Store::create(Path::new(folder))?;
            let folder = fs::canonicalize(folder)
                .with_context(|| format!("{folder}: cannot find"))?
                .into_os_string()
                .into_string()
                .map_err(|_| Error::new(Kind::Refused, text, "its path is not text"))?;
            return Ok(Place::Layout {
                store,
                folder,
                name: name.unwrap_or(DEFAULT_NAME).to_owned(),
            });
        }
        let target: Reference = text.parse()?;
        if target.digest().is_some() {
            let what = "an image is pushed to a tag: its digest is what it is";
            return Err(Error::new(Kind::Refused, target, what).into());
        }
        let registry = Registry::to_push(&target, transfer.options());
        Ok(Place::Registry(Box::new(target), Box::new(registry)))
    }

    /// The registry, if it is one.
    pub fn registry(&self) -> Option<(&Reference, &Registry)> {
        match self {
            Place::Registry(reference, registry) => Some((reference, registry)),
            Place::Layout { .. } => None,
        }
    }

    /// Registry and repository, or the layout.
    pub fn repository(&self) -> String {
        match self {
            Place::Registry(reference, _) => reference.name(),
            Place::Layout { folder, .. } => format!("oci:{folder}"),
        }
    }

    /// The tag there.
    pub fn tag(&self) -> &str {
        match self {
            Place::Registry(reference, _) => reference.tag().unwrap_or_default(),
            Place::Layout { name, .. } => name,
        }
    }

    /// The image there with the manifest `digest`; None if it is not there, or not whole.
    ///
    /// # Errors
    ///
    /// What keeps it from being known.
    pub fn image(&self, digest: &Digest, transfer: &Transfer) -> Result<Option<Image>> {
        let store = match self {
            Place::Registry(reference, _) => {
                let registry = Registry::to_pull(&reference.at(digest), transfer.options());
                return match registry.image(&Platform::here()) {
                    Ok(image) => Ok(Some(image)),
                    Err(e) if e.kind() == Kind::Missing => Ok(None),
                    Err(e) => Err(e.into()),
                };
            }
            Place::Layout { store, .. } => store,
        };
        let Ok(found) = fs::metadata(store.blob_path(digest)) else {
            return Ok(None);
        };
        let mut descriptor =
            Descriptor::new(MediaType::OciManifest.name(), digest.clone(), found.len());
        let bytes = store.read_blob(&descriptor)?;
        if let Some(kind) = Document::guess_type(&bytes) {
            descriptor.media_type = kind.name().to_owned();
        }
        let image = store.image(&descriptor, &Platform::here())?;
        for layer in image.manifest.layers.iter() {
            if !store.has_blob(layer)? {
                return Ok(None);
            }
        }
        Ok(Some(image))
    }

    /// Sends blobs, those that are not there.
    ///
    /// # Errors
    ///
    /// Those of the registry, of reading and of writing.
    pub fn send(
        &self,
        blobs: &[Outgoing<'_>],
        jobs: usize,
        notes: Option<&Store>,
        shown: &Shown<'_>,
    ) -> Result<Counts> {
        match self {
            Place::Registry(_, registry) => {
                ovbd_oci::send_blobs(registry, blobs, jobs, notes, shown)?;
                Ok(shown.counts())
            }
            Place::Layout { store, .. } => copy_blobs(blobs, store),
        }
    }

    /// As [`Place::send`], without a word, and not to be gone on with.
    ///
    /// # Errors
    ///
    /// As [`Place::send`].
    pub fn send_quietly(&self, blobs: &[Outgoing<'_>], jobs: usize) -> Result<()> {
        match self {
            Place::Registry(_, registry) => Ok(ovbd_oci::send_blobs(
                registry,
                blobs,
                jobs,
                None,
                &NoProgress,
            )?),
            Place::Layout { store, .. } => copy_blobs(blobs, store).map(drop),
        }
    }
    /// Gives the name to an image whose blobs are all there.
    ///
    /// # Errors
    ///
    /// As [`Place::send`].
    pub fn name(&self, media_type: MediaType, manifest: &[u8]) -> Result<Digest> {
        match self {
            Place::Registry(reference, registry) => {
                Ok(registry.put_document(&reference.target(), media_type.name(), manifest)?)
            }
            Place::Layout { store, name, .. } => {
                let descriptor = Descriptor::of(media_type.name(), manifest);
                store.put(&descriptor, manifest)?;
                store.set_name(name, &descriptor)?;
                Ok(descriptor.digest)
            }
        }
    }

    /// Keeps others from sweeping what has no name yet, where that is possible.
    ///
    /// # Errors
    ///
    /// Those of [`Store::protect`].
    pub fn protect(&self) -> Result<Option<fs::File>> {
        match self {
            Place::Registry(..) => Ok(None),
            Place::Layout { store, .. } => Ok(Some(store.protect()?)),
        }
    }
}

/// Copies blobs into a store, those that are not there.
fn copy_blobs(blobs: &[Outgoing<'_>], store: &Store) -> Result<Counts> {
    let mut counts = Counts::default();
    for out in blobs {
        let Ingested::Part(mut part) = store.ingest(&out.blob, || ())? else {
            counts.present += 1;
            continue;
        };
        part.restart()?;
        let mut buffer = vec![0; BUFFER_BYTES];
        while part.have() < out.blob.size {
            let count = out.source.read_at(&mut buffer, part.have())?;
            if count == 0 {
                break;
            }
            part.write(&buffer[..count])?;
        }
        part.commit()?;
        counts.done += 1;
    }
    Ok(counts)
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Registry(reference, _) => reference.fmt(f),
            Place::Layout { folder, name, .. } => write!(f, "oci:{folder}:{name}"),
        }
    }
}
