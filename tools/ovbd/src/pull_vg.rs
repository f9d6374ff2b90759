// SPDX-License-Identifier: GPL-2.0

//! Pulling an image into a volume group: each layer's file in a read-only volume of its own, which images share by digest, and
//! the stack over them mapped by dm-overlaybd. Nothing is unpacked.

use std::{fs::File, os::unix::fs::FileExt, process::ExitCode};

use anyhow::{Context as _, Result};
use ovbd_devices::{check_root, cow, running::check_name, up, Interrupt};
use ovbd_image::tar;
use ovbd_layers::{
    direct::{Aligned, DirectFile},
    layer::LayerPath,
    report::Report as _,
    stack::Stack,
    units,
};
use ovbd_lvm::{
    pool::Turn,
    program,
    snapshot::{self, Made},
    tags,
    undo::{self, Undo},
    Name, Volume, Volumes,
};
use ovbd_oci::{Descriptor, Error, Hasher, Kind, Store};
use serde_json::json;

use crate::{
    commands::{
        images::layer_count,
        pull::{named_image, Pull},
    },
    layer_files::fetch_layers,
    names::block_layers,
    pull_thin::{look, ImageSource, Known},
    pulled_volume::{self, part_of},
    report::Report,
    watch::Watch,
};

/// How names of volumes begin that hold a layer.
const PREFIX: &str = "ovbd-";

/// Digits of a layer's digest in the name of its volume.
const DIGITS: usize = 12;

/// Bytes that are copied, and read back, at once.
const PIECE_BYTES: usize = 1 << 20;

/// Pulls `from` into the group `vg`, and maps it where that is wanted.
///
/// # Errors
///
/// A group without room, volumes in the way, those of the registry, of LVM and of [`up::up`]. Volumes of whole layers stay
/// then, and are found by the next pull.
pub fn run(pull: &Pull, from: &ImageSource, vg: &str, report: &Report) -> Result<ExitCode> {
    check_root()?;
    if let Some(name) = &pull.up {
        check_name(name)?;
    }
    let interrupt = Interrupt::install()?;
    for said in undo::recover(report)?.done {
        report.note(said);
    }
    let undo = Undo::begin()?;
    let store = from.open_store(pull)?;
    // Nobody sweeps what is to be copied.
    let _guard = store.protect()?;
    let known = look(pull, from, &store)?;
    let work = Work {
        pull,
        from,
        vg,
        store: &store,
        known: &known,
        undo: &undo,
        interrupt: &interrupt,
        report,
    };
    let (volumes, made) = work.layers()?;
    work.tag(&volumes)?;
    let nodes: Vec<String> = volumes
        .iter()
        .map(|volume| volume.device().display().to_string())
        .collect();
    let manifest = &known.image.descriptor.digest;
    let names: Vec<String> = volumes
        .iter()
        .map(|volume| volume.name.to_string())
        .collect();
    report.print(&match pull.json {
        true => format!(
            "{}\n",
            json!({
                "name": from.to_string(), "digest": manifest, "layers": names, "devices": nodes, "made": made,
            })
        ),
        false => format!(
            "{from}  {manifest}  {} in {vg}, {made} new\n{}",
            layer_count(names.len()),
            match &pull.up {
                Some(_) => String::new(),
                None => format!("ovbd up NAME {}\n", nodes.join(" ")),
            }
        ),
    })?;
    match &pull.up {
        Some(name) => work.map(name, &volumes),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// One pull.
struct Work<'a> {
    pull: &'a Pull,
    from: &'a ImageSource,
    vg: &'a str,
    store: &'a Store,
    known: &'a Known,
    undo: &'a Undo,
    interrupt: &'a Interrupt,
    report: &'a Report,
}

impl Work<'_> {
    /// The volumes of all layers, bottom first, and how many of them had to be made.
    fn layers(&self) -> Result<(Vec<Volume>, usize)> {
        let subject = self.from.to_string();
        let layers = block_layers(&self.known.image, &subject)?;
        let mut volumes = Vec::new();
        let mut made = 0;
        for (number, layer) in layers.iter().enumerate() {
            let layer = layer.descriptor;
            let name = Name {
                vg: self.vg.to_owned(),
                lv: format!("{PREFIX}{}", &layer.digest.hex()[..DIGITS]),
            };
            // Two pulls of one layer: the second finds it.
            let _turn = Turn::wait(&name, self.interrupt, self.report)?;
            if let Some(volume) = self.find(&name, layer)? {
                volumes.push(volume);
                continue;
            }
            let file = self.fetch(number)?;
            self.make(&name, layer, &file)?;
            made += 1;
            let now = Volumes::of_group(self.vg)?;
            volumes.push(now.get(&name)?.clone());
        }
        Ok((volumes, made))
    }

    /// The volume of a layer, if it is there. What an earlier pull has left of it is put in order.
    fn find(&self, name: &Name, layer: &Descriptor) -> Result<Option<Volume>> {
        let digest = layer.digest.to_string();
        let is_it = |volume: &Volume| {
            !volume.writable
                && !volume.tags.is_partial()
                && volume.bytes >= layer.size
                && volume.tags.get(tags::LAYER) == Some(&digest)
        };
        let what = format!("the layer {}", layer.digest.short());
        let volumes = Volumes::of_group(self.vg)?;
        if !pulled_volume::find(&volumes, name, &what, is_it)? {
            return Ok(None);
        }
        match volumes.find(name) {
            Some(volume) => Ok(Some(volume.clone())),
            // It has just got its name.
            None => Ok(Volumes::of_group(self.vg)?.find(name).cloned()),
        }
    }

    /// The file of a layer.
    fn fetch(&self, number: usize) -> Result<LayerPath> {
        let _watch = Watch::begin(self.interrupt, || ());
        let reference = self.from.reference();
        let (image, transfer) = (&self.known.image, &self.pull.transfer);
        // Those above come with it: they are fetched together.
        let files = fetch_layers(image, number, reference, self.store, transfer, self.report)?;
        files
            .into_iter()
            .next()
            .with_context(|| format!("{}: has no layer {number}", self.from))
    }

    /// Makes the volume of a layer, which gets its name once what is on it was read back and has the layer's digest.
    fn make(&self, name: &Name, layer: &Descriptor, file: &LayerPath) -> Result<()> {
        let part = part_of(name);
        let source = File::open(file.data())
            .with_context(|| format!("{}: cannot open", file.data().display()))?;
        let mut first =
            vec![0; tar::LOOK_BYTES.min(usize::try_from(layer.size).unwrap_or(usize::MAX))];
        source
            .read_exact_at(&mut first, 0)
            .with_context(|| format!("{}: cannot read", file.data().display()))?;
        if !matches!(tar::recognise(&first, layer.size), Ok(Some(_))) {
            let what = "a layer that is in no tar: where it ends would not be known on a volume (--thin, or without \
                        --vg into the store)";
            return Err(Error::new(Kind::Refused, layer.digest.short(), what).into());
        }
        // What cannot be opened gets no volume.
        Stack::open(
            std::slice::from_ref(file),
            ovbd_layers::parents::Parents::Ignored,
        )?;
        let made = Made::linear(&part, layer.size, self.undo)?;
        let now = Volumes::of_group(self.vg)?;
        let volume = now.get(&part)?;
        self.copy(&source, volume, layer)?;
        let found = self.read_back(volume, layer)?;
        if found != layer.digest {
            let what = format!(
                "what is on it has the digest {found}, and the layer has {}",
                layer.digest
            );
            return Err(part.error(what).into());
        }
        let words = ["--activate", "n", &part.to_string()];
        program::run(&part.path(), "lvchange", words)?;
        let new = [(tags::LAYER, layer.digest.to_string())];
        snapshot::tag_read_only(&part, &volume.tags, &new)?;
        made.keep();
        Ok(snapshot::rename(&part, name)?)
    }

    fn copy(&self, source: &File, volume: &Volume, layer: &Descriptor) -> Result<()> {
        let path = volume.name.path();
        let fail = |what: &str| format!("{}: cannot {what}", volume.name);
        let target = File::options().write(true).open(volume.device());
        let target = target.with_context(|| fail("open"))?;
        self.report.begin("writing", layer.size);
        let mut buffer = vec![0; PIECE_BYTES];
        let mut at = 0;
        while at < layer.size {
            self.interrupt.check(&path)?;
            let count = (PIECE_BYTES as u64).min(layer.size - at) as usize;
            source
                .read_exact_at(&mut buffer[..count], at)
                .with_context(|| format!("{}: cannot read", layer.digest.short()))?;
            target
                .write_all_at(&buffer[..count], at)
                .with_context(|| fail("write"))?;
            at += count as u64;
            self.report.add(count as u64);
        }
        target.sync_all().with_context(|| fail("flush"))
    }

    /// The digest of what is on a volume, read from it past the page cache.
    fn read_back(&self, volume: &Volume, layer: &Descriptor) -> Result<ovbd_oci::Digest> {
        let path = volume.name.path();
        let device = DirectFile::open(volume.device())?;
        self.report.begin("checking", layer.size);
        let mut buffer = Aligned::new(PIECE_BYTES);
        let mut hasher = Hasher::new(layer.digest.algorithm());
        let mut at = 0;
        while at < layer.size {
            self.interrupt.check(&path)?;
            let count = (PIECE_BYTES as u64).min(layer.size - at);
            // Volumes are whole sectors, and files need not be.
            let whole = count.next_multiple_of(4096).min(device.bytes() - at) as usize;
            let read = buffer.bytes(whole);
            device.read(read, at)?;
            hasher.update(&read[..count as usize]);
            at += count;
            self.report.add(count);
        }
        Ok(hasher.finish())
    }

    /// Notes on the topmost volume which image it completes.
    fn tag(&self, volumes: &[Volume]) -> Result<()> {
        let Some(top) = volumes.last() else {
            return Ok(());
        };
        let layer = top.tags.get(tags::LAYER);
        let layer = layer.map(|layer| (tags::LAYER, layer.to_owned()));
        let new = self.known.tags(layer);
        Ok(snapshot::tag(&top.name, &top.tags, &new)?)
    }

    /// Activates the volumes and maps the stack over them.
    fn map(&self, name: &str, volumes: &[Volume]) -> Result<ExitCode> {
        for volume in volumes {
            let words = ["--activate", "y", &volume.name.to_string()];
            program::run(&volume.name.path(), "lvchange", words)?;
        }
        let layers: Vec<LayerPath> = volumes
            .iter()
            .map(|volume| LayerPath::Sealed(volume.device().to_owned()))
            .collect();
        let subject = self.from.to_string();
        let manifest = &self.known.image.manifest;
        let named = named_image(self.from.reference(), &subject, manifest);
        let verity = self.pull.verity.of_stack(&[named], true)?;
        let (mut new, mut cow) = (None, None);
        if self.pull.writable {
            let stack = Stack::open(&layers, self.pull.parents.of_device())?;
            let store = Name {
                vg: self.vg.to_owned(),
                lv: format!("{name}-cow"),
            };
            let there = Volumes::of_group(self.vg)?.find(&store).is_some();
            if !there {
                let bytes = self
                    .pull
                    .size
                    .unwrap_or_else(|| cow::enough_for(stack.sectors()));
                let made = Made::linear(&store, bytes, self.undo)?;
                let now = Volumes::of_group(self.vg)?;
                let volume = now.get(&store)?;
                // From now on it may hold something that is nowhere else: whoever is killed leaves it.
                snapshot::tag(&store, &volume.tags, &[])?;
                made.keep();
                new = Some(volume.clone());
                self.report.note(format_args!(
                    "{store}: {} for what is written",
                    units::size(volume.bytes)
                ));
            }
            let words = ["--activate", "y", &store.to_string()];
            program::run(&store.path(), "lvchange", words)?;
            let now = Volumes::of_group(self.vg)?;
            cow = Some(now.get(&store)?.device().to_owned());
        }
        let options = up::Options {
            name: name.to_owned(),
            layers,
            writable: cow.map(|path| cow::Options {
                path: Some(path),
                size: None,
            }),
            parents: self.pull.parents.of_device(),
            // What the extents of a new volume held is nobody's.
            wipe_cow: new.is_some(),
            assume_elsewhere: false,
            verity,
        };
        let result = up::up(&options, self.interrupt, self.report, |device| {
            self.report.answer(&format!("{}\n", device.display()))
        });
        if let (Err(_), Some(volume)) = (&result, &new) {
            // Nothing was written to it. What keeps LVM from it is in the first error.
            let _ = snapshot::remove_unused(volume);
        }
        result?;
        Ok(ExitCode::SUCCESS)
    }
}
