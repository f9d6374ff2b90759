// SPDX-License-Identifier: GPL-2.0

//! What a LAYER on the command line means: a file, a device, a pair of files, or an image whose layers these are.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::{error::ErrorKind, ArgMatches, Args, FromArgMatches, ValueHint};
use ovbd_layers::{
    layer::{Layer, LayerPath},
    turbo::Target,
};
use ovbd_oci::{
    Descriptor, Digest, Image, ImageLayer, Kind, LayerKind, Named, Platform, Reference, Store,
};

use crate::{report::Report, seal_note::NamedImage};

/// Where the store is without `--store`.
const DEFAULT_STORE: &str = "/var/lib/ovbd";

/// Which store names of images are in.
#[derive(Clone, Debug, Default, Args)]
pub struct StoreOption {
    /// Where images are kept: an OCI image layout [default: /var/lib/ovbd; for other users than root
    /// $XDG_DATA_HOME/ovbd]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub store: Option<PathBuf>,
}

impl StoreOption {
    /// The folder.
    pub fn path(&self) -> PathBuf {
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share"));
        let data = || std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
        match &self.store {
            Some(path) => path.clone(),
            None if rustix::process::geteuid().is_root() => DEFAULT_STORE.into(),
            None => data()
                .or_else(home)
                .map_or(DEFAULT_STORE.into(), |data| data.join("ovbd")),
        }
    }

    /// The store, which must be there.
    ///
    /// # Errors
    ///
    /// Those of [`Store::open`].
    pub fn open(&self) -> Result<Store> {
        Ok(Store::open(&self.path())?)
    }

    /// The store, made if it is missing.
    ///
    /// # Errors
    ///
    /// Those of [`Store::create`].
    pub fn create(&self) -> Result<Store> {
        Ok(Store::create(&self.path())?)
    }

    /// The image that `name` means, if it means one: `oci:DIR[:NAME]`, or a name in the store. What is a file is a file.
    ///
    /// # Errors
    ///
    /// A store that cannot be read; `oci:` of something that is no layout or has no such image.
    pub fn find(&self, name: &OsStr) -> Result<Option<Found>> {
        let text = name.to_str();
        if let Some(rest) = text.and_then(|text| text.strip_prefix("oci:")) {
            let (folder, name) = split_layout(rest);
            let store = Store::open(Path::new(folder))?;
            let named = store.find(name)?;
            // It may be from somebody else: what is beside its blobs is nobody's word for them.
            return Ok(Some(Found {
                store,
                named,
                takes_squashed: false,
            }));
        }
        let path = self.path();
        let Some(text) =
            text.filter(|_| !Path::new(name).exists() && path.join("oci-layout").exists())
        else {
            return Ok(None);
        };
        let store = Store::open(&path)?;
        match store.find(Some(text)) {
            Ok(named) => Ok(Some(Found {
                store,
                named,
                takes_squashed: true,
            })),
            Err(error) if error.kind() == Kind::Missing => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The file or the pair of files that `name` means. What looks like a pair and is none is more likely an image.
    fn file(&self, name: &OsStr) -> Result<LayerPath> {
        let path = LayerPath::from(name);
        if let (LayerPath::Writable { data, .. }, Some(text)) = (&path, name.to_str()) {
            if !data.exists() && text.parse::<ovbd_oci::Reference>().is_ok() {
                let what = format!(
                    "no such file, and no image of this name in {}",
                    self.path().display()
                );
                return Err(ovbd_oci::Error::new(Kind::Missing, text, what).into());
            }
        }
        Ok(path)
    }

    /// What keeps "gc" from removing the images that `names` mean, until it is dropped.
    ///
    /// # Errors
    ///
    /// Those of [`StoreOption::find`].
    pub fn protect(&self, names: &[OsString]) -> Result<Vec<File>> {
        let mut guards = Vec::new();
        for name in names {
            // A store that cannot be written to is not swept either.
            guards.extend(
                self.find(name)?
                    .and_then(|found| found.store.protect().ok()),
            );
        }
        Ok(guards)
    }

    /// The images that there are among what `names` mean, each with its name.
    ///
    /// # Errors
    ///
    /// Those of [`StoreOption::find`] and [`Found::image`].
    pub fn images(&self, names: &[OsString]) -> Result<Vec<ImageOfName>> {
        let mut images = Vec::new();
        for name in names {
            if let Some(found) = self.find(name)? {
                let image = found.image()?;
                images.push(ImageOfName {
                    name: name.to_string_lossy().into_owned(),
                    entry: found.named,
                    image,
                });
            }
        }
        Ok(images)
    }

    /// The layers that `names` mean, bottom first; those of an image are its own.
    ///
    /// # Errors
    ///
    /// Those of [`StoreOption::find`], and an image with layers that are no block layers.
    pub fn resolve(&self, names: &[OsString]) -> Result<Vec<LayerPath>> {
        let mut layers = Vec::new();
        for name in names {
            layers.extend(self.resolve_one(name, Found::blobs)?);
        }
        Ok(layers)
    }

    fn resolve_one(
        &self,
        name: &OsStr,
        of_image: impl FnOnce(&Found) -> Result<Vec<LayerPath>>,
    ) -> Result<Vec<LayerPath>> {
        match self.find(name)? {
            None => Ok(vec![self.file(name)?]),
            Some(found) => of_image(&found),
        }
    }
}

/// `DIR` or `DIR:NAME`, as skopeo has it: the first colon ends the folder.
pub fn split_layout(text: &str) -> (&str, Option<&str>) {
    match text.split_once(':') {
        Some((folder, name)) if !name.is_empty() => (folder, Some(name)),
        Some((folder, _)) => (folder, None),
        None => (text, None),
    }
}

/// An image and how it was named.
pub struct ImageOfName {
    /// The name that the user gave.
    name: String,
    /// Its entry in the store.
    entry: Named,
    image: Image,
}

impl ImageOfName {
    /// For looking at its seal.
    pub fn named(&self) -> NamedImage<'_> {
        let entry = self.entry.name.as_deref().unwrap_or(&self.name);
        let reference: Option<Reference> = self.name.parse().ok();
        let digest = reference.as_ref().and_then(Reference::digest).cloned();
        let digest: Option<Digest> = digest.or_else(|| self.name.parse().ok());
        let known = [&self.entry.descriptor.digest, &self.image.descriptor.digest];
        NamedImage {
            name: &self.name,
            reference: entry.parse().ok(),
            has_digest: digest.is_some_and(|digest| known.contains(&&digest)),
            manifest: &self.image.manifest,
        }
    }
}

/// An image in a store.
pub struct Found {
    /// The store.
    pub store: Store,
    /// Its entry.
    pub named: Named,
    /// Whether squashed files of the store may stand for its layers.
    pub takes_squashed: bool,
}

/// Layers of an image that one file may stand for, or one that none does.
pub struct Part {
    /// The layers, bottom first.
    pub layers: Vec<Descriptor>,
    /// The run that they are.
    pub run: Option<Digest>,
}

impl Found {
    /// Manifest and configuration.
    ///
    /// # Errors
    ///
    /// Those of [`Store::image`].
    pub fn image(&self) -> Result<Image> {
        Ok(self
            .store
            .image(&self.named.descriptor, &Platform::here())?)
    }

    /// Its block layers, bottom first: each run as one part, and each other one alone.
    ///
    /// # Errors
    ///
    /// As [`Found::image`] and [`block_layers`].
    pub fn parts(&self) -> Result<Vec<Part>> {
        let image = self.image()?;
        let subject = self
            .named
            .name
            .clone()
            .unwrap_or_else(|| image.descriptor.digest.to_string());
        let layers: Vec<Descriptor> = block_layers(&image, &subject)?
            .into_iter()
            .map(|layer| layer.descriptor.clone())
            .collect();
        let runs = match self.takes_squashed {
            true => image.manifest.runs(),
            false => Vec::new(),
        };
        let (mut runs, mut parts) = (runs.into_iter().peekable(), Vec::new());
        let mut at = 0;
        while at < layers.len() {
            let run = runs.next_if(|run| run.layers.start == at);
            let end = run.as_ref().map_or(at + 1, |run| run.layers.end);
            parts.push(Part {
                layers: layers[at..end].to_vec(),
                run: run.map(|run| run.name),
            });
            at = end;
        }
        Ok(parts)
    }

    /// Whether there is a squashed file of a run that can be read as a layer.
    pub fn is_squashed(&self, run: &Digest) -> bool {
        let path = LayerPath::Sealed(self.store.squashed_path(run));
        self.store.has_squashed(run) && Layer::open(&path, 0).is_ok()
    }

    /// What is mapped of it, bottom first: the squashed file of each run that has one, and else its block layers.
    ///
    /// # Errors
    ///
    /// As [`Found::parts`], and a layer that is missing and not in a squashed file.
    pub fn layers(&self) -> Result<Vec<LayerPath>> {
        let mut paths = Vec::new();
        for part in self.parts()? {
            match part.run.filter(|run| self.is_squashed(run)) {
                Some(run) => paths.push(LayerPath::Sealed(self.store.squashed_path(&run))),
                None => paths.extend(blobs(&self.store, &part.layers)?),
            }
        }
        Ok(paths)
    }

    /// The files of its block layers, bottom first.
    ///
    /// # Errors
    ///
    /// As [`Found::parts`], and a layer that is missing.
    pub fn blobs(&self) -> Result<Vec<LayerPath>> {
        let parts = self.parts()?.into_iter();
        let layers: Vec<_> = parts.flat_map(|part| part.layers).collect();
        blobs(&self.store, &layers)
    }
}

/// The files of layers of a store.
///
/// # Errors
///
/// One is missing or has the wrong size.
pub fn blobs(store: &Store, layers: &[Descriptor]) -> Result<Vec<LayerPath>> {
    let path = |layer: &Descriptor| {
        // Says which one it is.
        store.open_blob(layer)?;
        Ok(LayerPath::Sealed(store.blob_path(&layer.digest)))
    };
    layers.iter().map(path).collect()
}

/// The layers of an image that hold blocks, bottom first: records of reads are left out.
///
/// # Errors
///
/// A layer that is known to hold none, by its annotations.
pub fn block_layers<'a>(image: &'a Image, subject: &str) -> Result<Vec<ImageLayer<'a>>> {
    let layers = data_layers(image, subject)?;
    let is_turbo = |layer: &&ImageLayer<'_>| layer.kind == LayerKind::TurboOci;
    if let Some(turbo) = layers.iter().find(is_turbo) {
        let what = format!(
            "layer {} is TurboOCI, an index into an ordinary layer (\"ovbd pull REF\", to a store, makes one layer of \
             both)",
            turbo.number
        );
        return Err(ovbd_oci::Error::new(Kind::Refused, subject, what).into());
    }
    Ok(layers)
}

/// The same, with TurboOCI layers.
///
/// # Errors
///
/// An image with nothing but records of reads.
pub fn data_layers<'a>(image: &'a Image, subject: &str) -> Result<Vec<ImageLayer<'a>>> {
    let layers: Vec<_> = image.data_layers().collect();
    if layers.is_empty() {
        return Err(
            ovbd_oci::Error::new(Kind::Refused, subject, "no layer of it holds data").into(),
        );
    }
    Ok(layers)
}

/// A target on the command line.
#[derive(Clone, Debug)]
struct GivenTarget {
    /// The place among the layers of the one that it belongs to.
    layer: usize,
    tar: PathBuf,
    gzip_index: Option<PathBuf>,
}

/// The targets of TurboOCI layers and of EROFS indexes: each belongs to the layer before it on the command line.
#[derive(Clone, Debug, Default)]
pub struct Targets(Vec<GivenTarget>);

/// What clap knows of them.
#[derive(Debug, Args)]
struct TargetOptions {
    /// The original tar of the layer before it, a TurboOCI layer, whose files are in that tar; it may be compressed with gzip or
    /// zstd. An EROFS that "mkfs.erofs --tar=i" made, also of several that were merged, has one for each tar, in order
    #[arg(long = "target", value_name = "TAR", value_hint = ValueHint::FilePath)]
    targets: Vec<PathBuf>,
    /// The index of the target before it, a gzip file (gzip.meta of a TurboOCI layer): only what is needed of that is
    /// decompressed. "verify" and "up" need all of it, and check the index
    #[arg(long = "gzip-index", value_name = "FILE", requires = "targets", value_hint = ValueHint::FilePath)]
    gzip_indexes: Vec<PathBuf>,
}

impl Args for Targets {
    fn augment_args(command: clap::Command) -> clap::Command {
        TargetOptions::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        TargetOptions::augment_args_for_update(command)
    }
}

impl FromArgMatches for Targets {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Self::from_arg_matches_mut(&mut matches.clone())
    }

    fn from_arg_matches_mut(matches: &mut ArgMatches) -> Result<Self, clap::Error> {
        // The layers are called one or the other; the field that takes them comes after this one.
        let layers = ["names", "layers"]
            .into_iter()
            .find(|id| matches.ids().any(|known| known == id));
        let places = |id: &str| -> Vec<usize> {
            matches
                .indices_of(id)
                .map(Iterator::collect)
                .unwrap_or_default()
        };
        let layers = layers.map(places).unwrap_or_default();
        let (targets_at, indexes_at) = (places("targets"), places("gzip_indexes"));
        let given = TargetOptions::from_arg_matches_mut(matches)?;
        let wrong = |what| Err(clap::Error::raw(ErrorKind::ValueValidation, what));
        let mut targets: Vec<GivenTarget> = Vec::new();
        for (at, tar) in targets_at.iter().zip(given.targets) {
            let before = layers.iter().filter(|layer| **layer < *at).count();
            let Some(layer) = before.checked_sub(1) else {
                return wrong("--target TAR comes after the LAYER that it belongs to\n");
            };
            targets.push(GivenTarget {
                layer,
                tar,
                gzip_index: None,
            });
        }
        for (at, index) in indexes_at.into_iter().zip(given.gzip_indexes) {
            let before = targets_at.iter().filter(|target| **target < at).count();
            let target = before.checked_sub(1).and_then(|last| targets.get_mut(last));
            let Some(target) = target else {
                return wrong("--gzip-index FILE comes after the --target that it belongs to\n");
            };
            if target.gzip_index.replace(index).is_some() {
                return wrong("one --target has one --gzip-index\n");
            }
        }
        Ok(Self(targets))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// How much of a target is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// What is read.
    Parts,
    /// All of it, in a file.
    All,
    /// The same, for a device: squashed files may stand for layers of an image.
    Mapped,
}

impl GivenTarget {
    fn open(&self, need: Need, report: &Report) -> Result<Target> {
        report.begin("decompressing", 0);
        Ok(match (&self.gzip_index, need) {
            (None, _) => Target::open(&self.tar, report)?,
            (Some(index), Need::All | Need::Mapped) => {
                Target::open_checked(&self.tar, index, report)?
            }
            (Some(index), Need::Parts) => Target::open_ranges(&self.tar, index)?,
        })
    }
}

impl Targets {
    /// The layers that `names` mean, bottom first, with their targets.
    ///
    /// # Errors
    ///
    /// Those of [`StoreOption::resolve`] and [`Target::open`], and a target of what is no single file.
    pub fn resolve(
        &self,
        names: &[OsString],
        store: &StoreOption,
        need: Need,
        report: &Report,
    ) -> Result<Vec<LayerPath>> {
        let mut layers = Vec::new();
        for (number, name) in names.iter().enumerate() {
            let of_image = match need {
                Need::Mapped => Found::layers,
                Need::Parts | Need::All => Found::blobs,
            };
            let mut found = store.resolve_one(name, of_image)?;
            let given: Vec<_> = self.0.iter().filter(|one| one.layer == number).collect();
            if !given.is_empty() {
                let [LayerPath::Sealed(blob)] = &found[..] else {
                    let what = "is no layer in one file, which alone can have a --target";
                    return Err(ovbd_layers::Error::new(Path::new(name), what).into());
                };
                let targets = given.iter().map(|target| target.open(need, report));
                found = vec![LayerPath::Joined {
                    blob: blob.clone(),
                    targets: targets.collect::<Result<_>>()?,
                }];
            }
            layers.append(&mut found);
        }
        Ok(layers)
    }
}

/// The layers of a verb.
#[derive(Clone, Debug, Args)]
pub struct Layers {
    /// Targets. Before the names, of which it needs the places.
    #[command(flatten)]
    pub targets: Targets,
    /// Layers or images, bottom first
    #[arg(required = true, value_name = "LAYER", value_hint = ValueHint::FilePath)]
    pub names: Vec<OsString>,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
}

impl Layers {
    /// The layers that the names mean.
    ///
    /// # Errors
    ///
    /// Those of [`Targets::resolve`].
    pub fn resolve(&self, need: Need, report: &Report) -> Result<Vec<LayerPath>> {
        self.targets.resolve(&self.names, &self.store, need, report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_names() {
        assert_eq!(split_layout("dir"), ("dir", None));
        assert_eq!(split_layout("dir:"), ("dir", None));
        assert_eq!(
            split_layout("/d/e:h.x:5000/a:b"),
            ("/d/e", Some("h.x:5000/a:b"))
        );
    }
}
