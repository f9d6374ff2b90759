// SPDX-License-Identifier: GPL-2.0

//! `ovbd pull`.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::{cow, up, Interrupt};
use ovbd_image::{lsmt, tar};
use ovbd_layers::{
    layer::LayerPath, parents as layers, report::Report as _, stack::Stack, units, zfile::Zfile,
};
use ovbd_oci::{
    annotations::RESTORED_FROM, Compression, Descriptor, Error, Image, ImageLayer, Kind, LayerKind,
    Manifest, MediaType, Platform, Reference, Registry, Store,
};
use serde_json::json;

use crate::{
    checked::VerityOption,
    cli::{wrong_usage, Parents},
    commands::images::{layer_count, stored, virtual_bytes},
    convert,
    documents::note_blob,
    names::{block_layers, data_layers, StoreOption},
    policy::Rule,
    pull_lazy,
    pull_thin::{self, ImageSource, ThinTarget},
    pull_vg,
    remote::{Shown, Transfer},
    report::Report,
    seal_note::{rule, NamedImage},
    turbo::{self, TurboLayer},
};

/// Bytes of a compressed layer that show what it holds: more than a block of zstd.
const LOOK_BYTES: u64 = 160 << 10;

const EXAMPLES: &str = "Examples:

  ovbd pull reg.example:5000/vm/web:mon
      into /var/lib/ovbd; \"ovbd up web reg.example:5000/vm/web:mon\" maps it

  ovbd pull --up web --writable reg.example:5000/vm/web:mon
      fetches it and maps it to /dev/mapper/web

  ovbd pull --lazy --up web reg.example:5000/vm/web:mon
      maps it to /dev/mapper/web in a moment and fetches it then

  ovbd pull --convert --up web docker.io/library/debian:13
      an ordinary container image, mapped to /dev/mapper/web

  ovbd pull --limit 10M --jobs 1 -o usb/images reg.example:5000/vm/web:mon
      into another folder, slowly

  ovbd pull --thin vg/pool/web reg.example:5000/vm/web:mon
      as a thin volume, of which only what vg/pool lacks is fetched and written

  ovbd pull --vg vg --up web --writable --size 2G reg.example:5000/vm/web:mon
      its layers in volumes of vg, as they are, mapped to /dev/mapper/web; what is written is in vg/web-cow";

/// Fetch an image from a registry into the store.
///
/// Layers that are in the store are not fetched again. What was fetched before a failure stays: the next pull goes on
/// with it. Every file is checked against its digest before it is in the store.
///
/// Then "ovbd up NAME REF" maps it, and the other verbs take REF as their LAYER.
///
/// With --convert an ordinary container image becomes one of block layers with an EROFS. Its layers are checked against the
/// diff IDs of the original, and can be again by whoever has that: "ovbd verify --diff-id". Pushed to the same repository it is
/// listed as another form of the original.
///
/// An image of TurboOCI layers is fetched with the layers of the original image that those point into, and each is made one
/// layer over the original tar.
///
/// With --lazy the device is there in a moment. Whoever reads what is missing waits until it has come; the rest is fetched
/// meanwhile. A layer that is complete and has its digest is read from its file from then on, and when all are, no process is
/// needed any more. "ovbd ls" shows how far it is. When the process is killed readers wait: the same command goes on.
///
/// With --thin the image becomes a thin volume of LVM instead: a snapshot of the volume in the pool that has most of its
/// layers, with only the others fetched and written. It is read-only and can be the base of the next push; what is
/// to be changed is the snapshot of it with the name given.
///
/// With --vg each layer is kept as it is in a volume ovbd-DIGEST of LVM, read-only and checked, without a file system; images
/// share them. "ovbd up" maps them as it maps files. lvremove removes those that are not wanted any more.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Pull {
    /// Fetch into the image layout in this folder instead of the store
    #[arg(short, long = "output", value_name = "DIR", conflicts_with = "store", value_hint = ValueHint::DirPath)]
    pub output: Option<PathBuf>,
    /// Map the image to the block device NAME then
    #[arg(long, value_name = "NAME")]
    pub up: Option<String>,
    /// Make that device writable
    #[arg(long, requires = "up")]
    pub writable: bool,
    /// Map it at once, and fetch what is read before all the rest. A process serves what is missing, and ends when nothing is
    #[arg(long, requires = "up", conflicts_with_all = ["thin", "vg", "convert"])]
    pub lazy: bool,
    /// With --lazy: let a read fail that has waited for this many seconds, 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "lazy")]
    pub io_timeout: u64,
    /// With --lazy: take parts of layers from this repository too, when REF does not send them; may be given several times
    #[arg(long, value_name = "REPOSITORY", requires = "lazy")]
    pub mirror: Vec<Reference>,
    /// With --lazy: map it only when all is there that is read first, as the trace that was published for the image has it
    #[arg(long, requires = "lazy")]
    pub prefetch: bool,
    /// With --lazy: note for this many seconds what is read, for "ovbd trace", and only then let go of what serves it
    #[arg(long, value_name = "SECONDS", requires = "lazy")]
    pub trace: Option<u64>,
    /// With --lazy: do not go to the background
    #[arg(long, requires = "lazy")]
    pub foreground: bool,
    /// What is checked on that device.
    #[command(flatten)]
    pub verity: VerityOption,
    /// Machines that the image is for, as OS/ARCHITECTURE[/VARIANT] [default: this one]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<Platform>,
    /// Make an image of block layers of an ordinary container image, each over the original tar (see "ovbd build --from-tar")
    #[arg(long, conflicts_with_all = ["thin", "vg"])]
    pub convert: bool,
    /// Do not unpack more than this of layers that are compressed, by a copying tool or for --convert
    #[arg(long, value_name = "BYTES", value_parser = units::parse)]
    pub max_size: Option<u64>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// How to fetch.
    #[command(flatten)]
    pub transfer: Transfer,
    /// Make a thin volume of the image in this pool of LVM: a read-only one, and NAME, a writable snapshot of it [default
    /// name: the last part of the repository]
    #[arg(long, value_name = "VG/POOL[/NAME]", conflicts_with_all = ["output", "up"])]
    pub thin: Option<ThinTarget>,
    /// Keep each layer in a read-only volume of this group of LVM, which images share; --up maps the stack over them, and
    /// with --writable a volume NAME-cow has what is written
    #[arg(long, value_name = "VG", conflicts_with_all = ["output", "thin"], value_parser = volume_group)]
    pub vg: Option<String>,
    /// Room for what is written in NAME-cow, for instance 2G [default: enough for everything]
    #[arg(long, value_name = "BYTES", requires_all = ["vg", "writable"], value_parser = units::parse)]
    pub size: Option<u64>,
    /// The image: [HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST], or for --thin and --vg oci:DIR[:NAME] too
    #[arg(value_name = "REF")]
    pub from: ImageSource,
}

fn volume_group(text: &str) -> Result<String, String> {
    match ovbd_lvm::volume::is_name(text) {
        true => Ok(text.to_owned()),
        false => Err("LVM allows no such name".to_owned()),
    }
}

impl Pull {
    /// Fetches the image.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        self.run_as(std::env::args_os().skip(1).collect(), report)
    }

    /// The same for who says it otherwise; `words` are those of this call.
    pub fn run_as(self, words: Vec<OsString>, report: &Report) -> Result<ExitCode> {
        if self.verity.verity.is_some() && self.up.is_none() {
            wrong_usage("pull", "--verity is for --up".to_owned());
        }
        if let Some(target) = &self.thin {
            return pull_thin::run(&self, &self.from, target, report);
        }
        if let Some(vg) = &self.vg {
            return pull_vg::run(&self, &self.from, vg, report);
        }
        let ImageSource::Registry(reference) = &self.from else {
            let what = "an image layout is used where it is: every verb takes its name as a LAYER";
            return Err(Error::new(Kind::Refused, &self.from, what).into());
        };
        if let (true, Some(name)) = (self.lazy, &self.up) {
            return pull_lazy::run(&self, words, reference, name, report);
        }
        let store = self.open_store()?;
        // Until loop devices have the files.
        let _guard = store.protect()?;
        let platform = self.platform.unwrap_or_else(Platform::here);
        let limit = self.max_size.unwrap_or(u64::MAX);
        let transfer = &self.transfer;
        // Nothing is asked of a registry that nothing is taken from.
        if matches!(rule(reference)?, Rule::SignedBy(_)) && self.convert {
            let what = "must be signed, and an ordinary image has no root hash that could be";
            return Err(Error::new(Kind::Refused, reference, what).into());
        }
        let (image, layers) = match self.convert {
            true => {
                let limit = limit.min(store.free_bytes()?);
                let (image, layers) =
                    convert::fetch(reference, &store, transfer, &platform, limit, report)?;
                name_image(&image, reference, &store, report)?;
                (image, layers)
            }
            false => fetch(
                reference,
                &store,
                transfer,
                &platform,
                limit,
                self.parents.of_device(),
                report,
            )?,
        };
        let size = virtual_bytes(&image.manifest)
            .map_or(String::new(), |size| format!(" of {}", units::size(size)));
        let answer = match self.json {
            true => format!(
                "{}\n",
                json!({
                    "name": reference.to_string(), "digest": image.descriptor.digest,
                    "layers": image.manifest.layers.len(), "stored": stored(&image.manifest), "virtual": virtual_bytes(&image.manifest),
                })
            ),
            false => format!(
                "{}  {}  {}, {}{size}\n",
                reference,
                image.descriptor.digest,
                layer_count(image.manifest.layers.len()),
                units::size(stored(&image.manifest)),
            ),
        };
        report.print(&answer)?;
        let Some(name) = self.up else {
            return Ok(ExitCode::SUCCESS);
        };
        let subject = reference.to_string();
        let named = named_image(Some(reference), &subject, &image.manifest);
        let verity = self.verity.of_stack(&[named], true)?;
        let options = up::Options {
            name,
            layers,
            writable: self.writable.then(cow::Options::default),
            parents: self.parents.of_device(),
            wipe_cow: false,
            // Only layers on devices are looked for.
            assume_elsewhere: false,
            verity,
        };
        up::up(&options, &Interrupt::install()?, report, |device| {
            report.answer(&format!("{}\n", device.display()))
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Pull {
    /// The store that the image is fetched into.
    ///
    /// # Errors
    ///
    /// Those of [`Store::create`].
    pub fn open_store(&self) -> Result<Store> {
        match &self.output {
            Some(_) => Ok(Store::create(&self.store_path())?),
            None => self.store.create(),
        }
    }

    /// Its folder, which may not be there yet.
    pub fn store_path(&self) -> PathBuf {
        match self.output.as_ref().map(|folder| folder.to_string_lossy()) {
            Some(folder) => folder.strip_prefix("oci:").unwrap_or(&folder).into(),
            None => self.store.path(),
        }
    }
}

/// Fetches an image into a store and names it there; no more than `limit` bytes of a layer that has to be unpacked. Returns
/// it and its block layers, bottom first.
///
/// # Errors
///
/// What cannot be fetched, is no image of block layers, or cannot be opened as one.
pub fn fetch(
    reference: &Reference,
    store: &Store,
    transfer: &Transfer,
    platform: &Platform,
    limit: u64,
    parents: layers::Parents,
    report: &Report,
) -> Result<(Image, Vec<LayerPath>)> {
    // Nobody sweeps what has no name yet.
    let _guard = store.protect()?;
    let registry = Registry::to_pull(reference, transfer.options());
    let mut image = registry.image(platform)?;
    let subject = reference.to_string();
    named_image(Some(reference), &subject, &image.manifest).check()?;
    let mut compressed = Vec::new();
    for layer in data_layers(&image, &subject)? {
        if layer.kind == LayerKind::TurboOci {
            continue;
        }
        if let Some(how) = look(&registry, store, &layer, &subject)? {
            compressed.push((layer.number, how));
        }
    }
    let turbo = turbo::find_targets(&image, &registry, &subject)?;
    // All of them: an image without one of its parts could not be sent on.
    let mut layers: Vec<Descriptor> = image.manifest.layers.to_vec();
    let title = |(number, layer): (usize, &Descriptor)| {
        format!("layer {number}: {}", units::size(layer.size))
    };
    let mut titles: Vec<String> = layers.iter().enumerate().map(title).collect();
    titles.extend(turbo.iter().map(TurboLayer::title));
    layers.extend(turbo.iter().map(|layer| layer.target.clone()));
    let shown = Shown::new(
        report,
        "pulling",
        layers
            .iter()
            .zip(titles)
            .map(|(layer, title)| (layer.digest.clone(), title, layer.size)),
    );
    ovbd_oci::fetch_blobs(
        &registry,
        store,
        &layers,
        usize::from(transfer.jobs),
        &shown,
    )?;
    if !compressed.is_empty() {
        let text = "recompressed by a copying tool, which should have been told to keep it as it is (skopeo \
                    --preserve-digests): it is unpacked, and has another digest here";
        report.warning(&Error::new(Kind::Invalid, &subject, text).into());
        image = restore(
            image,
            &compressed,
            store,
            limit.min(store.free_bytes()?),
            &subject,
            report,
        )?;
    }
    if !turbo.is_empty() {
        let limit = limit.min(store.free_bytes()?);
        image = turbo::join_layers(&image, &turbo, store, limit, &subject, report)?;
    }
    let paths: Vec<LayerPath> = block_layers(&image, &subject)?
        .iter()
        .map(|layer| LayerPath::Sealed(store.blob_path(&layer.descriptor.digest)))
        .collect();
    // What cannot be opened gets no name.
    Stack::open(&paths, parents)?;
    name_image(&image, reference, store, report)?;
    Ok((image, paths))
}

/// Puts manifest and configuration into the store, and gives the image its name.
///
/// # Errors
///
/// The system's.
pub fn name_image(
    image: &Image,
    reference: &Reference,
    store: &Store,
    report: &Report,
) -> Result<()> {
    store.put(&image.manifest.config, &image.config_bytes)?;
    store.put(&image.descriptor, &image.manifest_bytes)?;
    let name = reference.to_string();
    if let Some(before) = store.set_name(&name, &image.descriptor)? {
        report.note(format_args!("{name} was {before}"));
    }
    Ok(())
}

/// An image that comes from a registry or a layout, to look at its seal.
pub fn named_image<'a>(
    reference: Option<&Reference>,
    subject: &'a str,
    manifest: &'a Manifest,
) -> NamedImage<'a> {
    NamedImage {
        name: subject,
        // A registry that is asked for a digest has sent what has it.
        has_digest: reference.is_some_and(|reference| reference.digest().is_some()),
        reference: reference.cloned(),
        manifest,
    }
}

/// How a block layer is compressed, None if it is not. Its first bytes decide, where annotations do not.
///
/// # Errors
///
/// It is no block layer, and all that keeps its first bytes from coming.
pub fn look(
    registry: &Registry,
    store: &Store,
    layer: &ImageLayer<'_>,
    subject: &str,
) -> Result<Option<Compression>> {
    if layer.kind == LayerKind::Overlaybd
        || (layer.kind == LayerKind::Unknown && store.has_blob(layer.descriptor)?)
    {
        return Ok(None);
    }
    let first = registry.first_bytes(layer.descriptor, LOOK_BYTES)?;
    let how = Compression::recognise(&first);
    let content = how.map_or(first.clone(), |how| how.first_bytes(&first, 4096));
    // Of what is compressed the size is not known.
    let size = if how.is_some() {
        u64::MAX >> 1
    } else {
        layer.descriptor.size
    };
    if !holds_blocks(&content, size) {
        let what = format!(
            "an ordinary container image: layer {} is not OverlayBD (--convert makes one of it)",
            layer.number
        );
        return Err(Error::new(Kind::Refused, subject, what).into());
    }
    Ok(how)
}

/// Whether a file of `size` bytes that starts with `first` holds a block layer, in a tar or not.
fn holds_blocks(first: &[u8], size: u64) -> bool {
    let start = match tar::recognise(&first[..first.len().min(tar::LOOK_BYTES)], size) {
        Ok(Some(member)) => member.offset,
        Ok(None) => 0,
        Err(_) => return false,
    };
    let rest = usize::try_from(start)
        .ok()
        .and_then(|start| first.get(start..))
        .unwrap_or_default();
    Zfile::recognise(rest, size) || lsmt::Header::recognise(rest)
}

/// The image with the layers as they were before they were compressed.
fn restore(
    image: Image,
    compressed: &[(usize, Compression)],
    store: &Store,
    limit: u64,
    subject: &str,
    report: &Report,
) -> Result<Image> {
    report.begin("unpacking", 0);
    let mut layers: Vec<Descriptor> = image.manifest.layers.to_vec();
    let ids: Vec<_> = image.config.rootfs.diff_ids.iter().collect();
    for (number, how) in compressed {
        let mut whole = store.unpack(&layers[*number], *how, ids[*number], limit, |bytes| {
            report.add(bytes)
        })?;
        note_blob(&mut whole);
        layers[*number] = whole;
    }
    let mut manifest = Manifest::new(
        MediaType::OciManifest,
        image.manifest.config.clone(),
        layers,
    );
    manifest.annotations = image.manifest.annotations.clone();
    manifest.annotations.insert(
        RESTORED_FROM.to_owned(),
        image.descriptor.digest.to_string(),
    );
    Ok(Image::of_manifest(&subject, manifest, image.config_bytes)?)
}
