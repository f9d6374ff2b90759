// SPDX-License-Identifier: GPL-2.0

//! `ovbd push`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, Result};
use clap::{Args, FromArgMatches as _, ValueHint};
use ovbd_devices::verity;
use ovbd_image::tar;
use ovbd_layers::{
    blob::{Blob, Content},
    build::{self, wrapped_bytes},
    file_range::FileRange,
    layer::LayerPath,
    parents,
    report::Report as _,
    seal::seal,
    split,
    stack::Stack,
    tar::original::tar_bytes,
    units,
};
use ovbd_lvm::Name;
use ovbd_oci::{
    annotations::ARTIFACT_TYPE, BlobSource, Descriptor, Digest, Error, FilePart, Kind, Manifest,
    MediaType, Outgoing, Pieces, Platform, Reference, Registry, Store, MAX_LAYERS,
};
use rayon::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use crate::{
    checked, chunk_lists,
    cli::{self, wrong_usage, Parents},
    commands::images::{layer_count, stored, virtual_bytes},
    documents::{Composition, NewLayer},
    filesystem,
    names::{Found, StoreOption},
    place::Place,
    push_stack::{self, StackOptions},
    push_volume::{self, VolumeOptions},
    remote::{Counts, Shown, Transfer},
    report::Report,
    seal_note::SealNote,
    signing::SignOption,
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

  ovbd push --snapshot vg/web reg.example:5000/vm/web:mon
      a new snapshot of a thin volume, of which only what changed since the last is sent

  ovbd push --layer /var/lib/layers/tuesday.zfile root reg.example:5000/vm/web:tue
      the system that runs from the stack \"root\", as it is now

  ovbd push --seal --sign-key vm.key --certificate vm.pem root.layer reg.example:5000/vm/root:1
      with a hash tree of all that it holds, and a signature; ovbd up --verity image has dm-verity check it

  ovbd push --config config.json root.layer reg.example/vm/root:1
      a container too, with {\"Cmd\": [\"/sbin/init\"]} in config.json";

/// Send an image to a registry or an image layout.
///
/// The image is a stack of layers, bottom first, or one of the store or of the layout oci:DIR[:NAME], which is sent as it
/// is. An image followed by layers is that image with these on top. What the registry has is not sent; an upload that
/// was interrupted is gone on with. The same layers and options give the same image: pushing it again sends nothing.
///
/// A logical volume VG/LV of LVM, a thin or classic snapshot or one that --snapshot is to be taken of, is sent as one new layer
/// on top of the newest snapshot that was pushed to the same repository. Only chunks that LVM's metadata says may have
/// changed are read, and of them only blocks of 4 KiB that differ are stored. The snapshot is tagged with what it is.
///
/// A running stack NAME, which "ovbd up --writable" made, is committed first, as "ovbd commit" does and as shortly as that: what
/// was written until now becomes the layer --layer, on top of those that it has. It may be the one that the system runs
/// from. Layers that are an image of the store stay that image, with its configuration.
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
    /// Seal the image: the hash tree of all that it holds goes on top as a layer, and the root hash into its manifest
    #[arg(long, conflicts_with = "split")]
    pub seal: bool,
    /// With --seal: the root hash, or the file with it, of a seal among the layers: only what changed above that is read
    #[arg(long, value_name = "HASH|FILE", requires = "seal", value_hint = ValueHint::FilePath)]
    pub old_root: Option<String>,
    /// Say in the manifest that this is the root hash of the seal that is the topmost layer
    #[arg(long, value_name = "HASH|FILE", conflicts_with_all = ["seal", "split"], value_hint = ValueHint::FilePath)]
    pub verity: Option<String>,
    /// With what the root hash is signed.
    #[command(flatten)]
    pub sign: SignOption,
    /// Write Docker's media types, for old registries
    #[arg(long)]
    pub docker_types: bool,
    /// Say that the image is another form of this one, of the same repository
    #[arg(long, value_name = "REF")]
    pub subject: Option<Reference>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// What is for logical volumes.
    #[command(flatten)]
    pub volume: VolumeOptions,
    /// What is for running stacks.
    #[command(flatten)]
    pub stack: StackOptions,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// How to send.
    #[command(flatten)]
    pub transfer: Transfer,
    /// Layers or images, bottom first, or one logical volume VG/LV or running stack NAME, and then the name to push to:
    /// [HOST[:PORT]/]REPOSITORY[:TAG], or oci:DIR[:NAME] for an image layout
    #[arg(value_name = "LAYER|VG/LV|NAME|REF", required = true, num_args = 2.., value_hint = ValueHint::FilePath)]
    pub names: Vec<OsString>,
}

/// An image that is to be sent.
pub struct ToSend {
    /// Its manifest.
    pub manifest: Manifest,
    /// What that is.
    pub media_type: MediaType,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Layers and configuration, without those of which the registry is known to have them.
    pub blobs: Vec<Outgoing<'static>>,
}

impl Push {
    /// One that a command line without options means.
    pub fn plain(store: StoreOption) -> Result<Self> {
        let command = Self::augment_args(clap::Command::new("push"));
        let matches = command.try_get_matches_from(["push", "LAYER", "REF"])?;
        Ok(Self {
            store,
            ..Self::from_arg_matches(&matches)?
        })
    }

    /// Sends the image.
    pub fn run(mut self, report: &Report) -> Result<ExitCode> {
        let target = self.names.pop().unwrap_or_default();
        let target = target.to_str().context("the name to push to is not text")?;
        let place = Place::parse(target, &self.transfer)?;
        let is_sealed = self.seal || self.verity.is_some();
        if self.sign.sign_key.is_some() && !is_sealed {
            wrong_usage("push", "--sign-key is for --seal or --verity".to_owned());
        }
        if let Some(volume) = self.logical_volume()? {
            if is_sealed {
                let what =
                    "--seal and --verity are for layers and images, not for a logical volume";
                wrong_usage("push", what.to_owned());
            }
            return push_volume::run(&self, volume, &place, report);
        }
        if let Some((name, layer)) = self.running_stack()? {
            return push_stack::run(self, &name, &layer, &place, report);
        }
        self.push_names(&place, report)
    }

    /// Sends the image of what the names mean.
    pub fn push_names(&self, place: &Place, report: &Report) -> Result<ExitCode> {
        let mut image = self.image(place, report)?;
        let (digest, counts) = self.send(place, &mut image, report)?;
        let count = image.manifest.layers.len();
        let bytes = stored(&image.manifest);
        let size = virtual_bytes(&image.manifest);
        report.print(&match self.json {
            true => format!("{}\n", json!({
                "name": place.to_string(), "digest": digest, "layers": count, "stored": bytes, "virtual": size,
                "sent": counts.done, "present": counts.present, "mounted": counts.mounted,
            })),
            false => {
                let size = size.map_or(String::new(), |size| format!(" of {}", units::size(size)));
                format!("{place}  {digest}  {}, {}{size}\n", layer_count(count), units::size(bytes))
            }
        })
    }

    /// The image of what the names mean, for a place.
    ///
    /// # Errors
    ///
    /// Those of reading it, and of making a seal.
    pub fn image(&self, place: &Place, report: &Report) -> Result<ToSend> {
        let mut found = Vec::new();
        for name in &self.names {
            found.push(self.store.find(name)?);
        }
        let plain = !self.seal
            && self.verity.is_none()
            && self.config.is_none()
            && self.subject.is_none()
            && !self.docker_types
            && self.split.is_none()
            && self.fs.is_none();
        match &found[..] {
            [Some(found)] if plain => as_it_is(found),
            _ => self.compose(&found, place, report),
        }
    }

    /// Sends what the registry lacks of an image, and names the image there.
    pub fn send(
        &self,
        place: &Place,
        image: &mut ToSend,
        report: &Report,
    ) -> Result<(Digest, Counts)> {
        let config = &image.manifest.config.digest;
        let layers = &image.manifest.layers;
        let blobs = image.blobs.iter().map(|out| {
            let number = layers
                .iter()
                .position(|layer| layer.digest == out.blob.digest);
            let name = match number {
                Some(number) if out.blob.digest != *config => {
                    format!("layer {number}: {}", units::size(out.blob.size))
                }
                _ => "configuration".to_owned(),
            };
            (out.blob.digest.clone(), name, out.blob.size)
        });
        let shown = Shown::new(report, "pushing", blobs);
        let store = Store::open(&self.store.path()).ok();
        if let (Some(store), Some((target, _))) = (&store, place.registry()) {
            for out in &mut image.blobs {
                out.from = repositories_with(store, target, &out.blob)?;
            }
        }
        let _swept_by_nobody = place.protect()?;
        let _guard = store.as_ref().and_then(|store| store.protect().ok());
        // Without a store that can be written to, an upload is not gone on with by another process.
        let notes = store.as_ref().filter(|_| _guard.is_some());
        let jobs = usize::from(self.transfer.jobs);
        let counts = place.send(&image.blobs, jobs, notes, &shown)?;
        let lists = chunk_lists::send(image, place, jobs)?;
        let digest = place.name(image.media_type, &image.bytes)?;
        if let (Some(_), Some((_, registry))) = (&image.manifest.subject, place.registry()) {
            if !registry.knows_subjects() {
                let descriptor = Descriptor::of(image.media_type.name(), &image.bytes);
                registry.list_referrer(&image.manifest, &descriptor)?;
            }
        }
        if let Some((_, registry)) = place.registry() {
            let subject = Descriptor::of(image.media_type.name(), &image.bytes);
            chunk_lists::attach(registry, &subject, lists, report);
        }
        report.note(format_args!(
            "{} sent, {} already there, {} taken from other repositories",
            counts.done, counts.present, counts.mounted
        ));
        Ok((digest, counts))
    }

    /// Makes an image of layers, the first of which may be those of an image whose configuration is kept.
    fn compose(&self, found: &[Option<Found>], place: &Place, report: &Report) -> Result<ToSend> {
        let base = match found.first() {
            Some(Some(found)) => Some((
                found.named.name.clone(),
                found.image()?,
                found.blobs()?.len(),
            )),
            _ => None,
        };
        let mut paths = self.store.resolve(&self.names)?;
        // Goes when the layer in it is open.
        let mut folder = None;
        let note = self.seal_note(&mut paths, &mut folder, report)?;
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
        let tars = stack.layers().iter();
        let mut tars: Vec<Option<u64>> = tars
            .map(|layer| tar_bytes(layer.content()))
            .collect::<ovbd_layers::Result<_>>()?;
        if let (Some(most), Some(lowest)) = (self.split, paths.first()) {
            if kept > 0 {
                let what =
                    "--split is for the first push: the layers of an image are sent as they are";
                return Err(Error::new(Kind::Refused, lowest.data().display(), what).into());
            }
            let parts = split(lowest, most, MAX_LAYERS - (paths.len() - 1), report)?;
            names.splice(0..1, (0..parts.len()).map(|_| lowest.data().to_owned()));
            if parts.len() > 1 {
                tars.splice(0..1, vec![None; parts.len()]);
            }
            sources.splice(0..1, parts);
        }
        let bytes = sources[kept..].iter().map(|source| source.size()).sum();
        report.begin("hashing", bytes);
        let digests: Vec<_> = (kept..sources.len())
            .into_par_iter()
            .map(|number| {
                let digests = sources[number].digests(|bytes| report.add(bytes));
                digests.with_context(|| format!("{}: cannot read", names[number].display()))
            })
            .collect::<Result<_>>()?;
        let new = digests
            .into_iter()
            .zip(kept..)
            .map(|((digest, chunks), number)| NewLayer {
                digest,
                chunks,
                bytes: sources[number].size(),
                made_of: names[number]
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned()),
                tar_bytes: tars[number],
            })
            .collect();
        let composed = Composition {
            base: base
                .as_ref()
                .map(|(name, image, _)| (name.as_deref(), image)),
            new,
            virtual_bytes: stack.virtual_bytes(),
            source: "file",
            fs_type: fs_type.as_deref(),
            docker_types: self.docker_types,
            config: self.config.as_deref(),
        };
        drop(folder);
        let (mut manifest, config) = composed.documents()?;
        let media_type = composed.media_type();
        let layers = manifest.layers.to_vec();
        if let Some(note) = note {
            note.write(&mut manifest);
        }
        if let Some(subject) = &self.subject {
            let Some((_, registry)) = place.registry() else {
                let what = "a subject is for registries, which list what refers to it";
                return Err(Error::new(Kind::Refused, place, what).into());
            };
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

    /// What the manifest is to say of the seal, which becomes the topmost layer, in `folder`, if it is to be made.
    fn seal_note(
        &self,
        paths: &mut Vec<LayerPath>,
        folder: &mut Option<TempDir>,
        report: &Report,
    ) -> Result<Option<SealNote>> {
        let parents = self.parents.of_device();
        let root = match &self.verity {
            Some(text) => {
                let given = checked::root(text)?;
                verity::Root {
                    data_bytes: Some(verity::data_bytes(paths, parents, &given)?),
                    ..given
                }
            }
            None if self.seal => {
                cli::clean_up_on_signals()?;
                report.begin("sealing", 0);
                let made = folder.insert(temporary_folder()?);
                let path = made.path().join("seal");
                let options = build::Options {
                    base: paths.clone(),
                    parents,
                    ..build::Options::default()
                };
                let old_root = self.old_root.as_deref().map(checked::digest).transpose()?;
                let sealed = seal(&path, &options, old_root, report)?;
                paths.push(LayerPath::Sealed(path));
                verity::Root {
                    digest: sealed.root.to_vec(),
                    data_bytes: Some(sealed.data_bytes),
                }
            }
            None => return Ok(None),
        };
        let signature = self.sign.sign(&verity::hex(&root.digest))?;
        Ok(Some(SealNote { root, signature }))
    }

    /// The logical volume that is to be pushed, if it is one: neither a file nor an image has that name.
    fn logical_volume(&self) -> Result<Option<Name>> {
        let name = match &self.names[..] {
            [name] => name.to_str().and_then(|name| name.parse().ok()),
            _ => None,
        };
        match (name, &self.names[..]) {
            (Some(volume), [name]) => {
                let other = Path::new(name).exists() || self.store.find(name)?.is_some();
                Ok((!other || self.volume.is_given()).then_some(volume))
            }
            _ if self.volume.is_given() => {
                let what = "--snapshot, --base, --full, --trust-base, --check, --dry-run, --algo, --level and --block-size are for one \
                            logical volume, VG/LV";
                crate::cli::wrong_usage("push", what.to_owned())
            }
            _ => Ok(None),
        }
    }

    /// The name of the running stack that is to be pushed, if it is one, and where its layer goes.
    fn running_stack(&self) -> Result<Option<(String, PathBuf)>> {
        let name = match &self.names[..] {
            [name] => name.to_str().filter(|name| !name.contains('/')),
            _ => None,
        };
        let Some(name) = name else {
            if self.stack.is_given() {
                let what = "--layer, --cow and --assume-elsewhere are for one running stack, NAME";
                cli::wrong_usage("push", what.to_owned());
            }
            return Ok(None);
        };
        let is_device = || Path::new("/dev/mapper").join(name).exists();
        let is_other = Path::new(name).exists() || self.store.find(name.as_ref())?.is_some();
        match &self.stack.layer {
            Some(layer) => Ok(Some((name.to_owned(), layer.clone()))),
            None if !is_other && is_device() => {
                let what = format!(
                    "--layer FILE says where the layer of what was written to {name} is kept"
                );
                cli::wrong_usage("push", what)
            }
            None => Ok(None),
        }
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
        stored = stored(&image.manifest),
        virtual_bytes = virtual_bytes(&image.manifest),
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

/// A folder for layers that are only sent.
fn temporary_folder() -> Result<TempDir> {
    let folder = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    tempfile::tempdir_in(&folder)
        .with_context(|| format!("{}: cannot make a folder in it", folder.to_string_lossy()))
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
        Content::Plain(_) | Content::Joined(_) => None,
        Content::Zfile(zfile) => Some(zfile.options()),
    };
    cli::clean_up_on_signals()?;
    report.begin("splitting", data);
    let folder = temporary_folder()?;
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
pub fn wrapped(path: &LayerPath) -> Result<Arc<dyn BlobSource>> {
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
pub struct Shared(pub Arc<dyn BlobSource>);

impl BlobSource for Shared {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
        self.0.read_at(buffer, at)
    }
}
