// SPDX-License-Identifier: GPL-2.0

//! `ovbd pull --lazy`: a stack that can be used before its layers are there.
//!
//! A process serves what is missing, and ends when nothing is: then every layer is read from its file, as if `ovbd up` had
//! mapped it. When it is killed, whoever reads what is missing waits; the same command goes on, with the same image, whatever
//! its name means by then. Which image that is stands in `ingest/lazy-NAME.json` of the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{bail, Context as _, Result};
use ovbd_devices::{
    cow, fetched,
    fetched::{Fetched, LayerStatus, Status},
    mapped::node,
    programs::run as run_program,
    up, Interrupt,
};
use ovbd_fetch::{Event, Options, Progress, Server, State, Wanted};
use ovbd_layers::layer::LayerPath;
use ovbd_oci::{
    Descriptor, Digest, Error, Image, Kind, LayerKind, Platform, Reference, Registry, Store,
};
use ovbd_ublk::{Device, Server as Serving};
use rustix::mm::{mlockall, MlockAllFlags};
use serde::{Deserialize, Serialize};

use crate::{
    acceleration,
    acceleration::Read,
    background::{let_go_of_output, ready, start},
    chunk_lists,
    chunk_lists::Trust,
    commands::pull::{look, name_image, named_image, Pull},
    names::block_layers,
    report::Report,
    trace,
    trace::Trace,
};

/// How often is said how far it is.
const STEP: Duration = Duration::from_secs(1);
/// How often is looked whether what is read first is there.
const PREFETCH_STEP: Duration = Duration::from_millis(10);
/// How often what has come is put on the disk.
const SYNC: Duration = Duration::from_secs(5);
/// How often in a row nothing may be found mapped over the device before it is taken to be left.
const UNUSED_STEPS: u32 = 5;

/// What a stack is being fetched from.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The image as it was named.
    reference: String,
    /// Its manifest.
    manifest: Digest,
    /// The list of the chunks of each layer that has one.
    #[serde(default)]
    lists: BTreeMap<Digest, Digest>,
}

impl Record {
    fn path(store: &Store, name: &str) -> PathBuf {
        store.path().join(format!("ingest/lazy-{name}.json"))
    }

    fn read(store: &Store, name: &str) -> Option<Self> {
        serde_json::from_slice(&fs::read(Self::path(store, name)).ok()?).ok()
    }

    fn write(&self, store: &Store, name: &str) -> Result<()> {
        let path = Self::path(store, name);
        let new = path.with_extension("new");
        let mut file = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .with_context(|| format!("{}: cannot write", new.display()))?;
        serde_json::to_writer(&mut file, self)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        Ok(())
    }

    /// The chunk lists of `layers`, from the store where they are there.
    fn read_lists(
        &self,
        registry: &Registry,
        store: &Store,
        layers: &[Descriptor],
    ) -> Vec<Option<chunk_lists::Named>> {
        let read = |layer: &Descriptor| {
            let digest = self.lists.get(&layer.digest)?;
            // Of what is there no list is needed, and perhaps no registry answers.
            if store.has_blob(layer).unwrap_or(false) {
                return None;
            }
            match chunk_lists::get(registry, store, layer, digest) {
                Ok(list) => Some((digest.clone(), list?)),
                Err(error) => {
                    tracing::warn!(%error, "going on without a chunk list");
                    None
                }
            }
        };
        layers.iter().map(read).collect()
    }
}

/// Maps the image `reference` to `name` and fetches it then. `words` is a command line of this program that does the same.
///
/// # Errors
///
/// All that [`up::up`] and [`Registry`] say, and a kernel without ublk.
pub fn run(
    pull: &Pull,
    words: Vec<OsString>,
    reference: &Reference,
    name: &str,
    report: &Report,
) -> Result<ExitCode> {
    check_ublk()?;
    let running = fetched::find(name)?;
    if running.is_some() {
        // Before anything is written there, which might wait for what nobody serves.
        fetched::check_elsewhere(name, &pull.store_path())?;
    }
    let store = pull.open_store()?;
    if let Some(fetched) = &running {
        check_unserved(name, fetched, &store)?;
    }
    if !pull.foreground {
        return start(name, words, report);
    }
    // A program that lives on what it serves must not have to read itself.
    if mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).is_err() {
        tracing::debug!("memory is not locked");
    }
    let _guard = store.protect()?;
    let interrupt = Interrupt::install()?;
    let session = Session::open(pull, reference, name, &store, running.is_some(), report)?;
    match running {
        Some(fetched) => session.recover(&fetched, report)?,
        None => session.map(pull, &interrupt, report)?,
    }
    session.serve(pull, &interrupt, report)
}

/// Refuses a registry that only sends blobs as a whole.
fn check_parts(registry: &Registry, store: &Store, blobs: &[Descriptor]) -> Result<()> {
    for blob in blobs.iter().filter(|blob| blob.size > 1) {
        if !store.has_blob(blob)? {
            return registry
                .range(blob, blob.size - 1, 1)
                .map(drop)
                .context("pull without --lazy");
        }
    }
    Ok(())
}

/// Refuses a kernel that has no ublk.
fn check_ublk() -> Result<()> {
    let result = match ovbd_ublk::check() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Where that does not help the next attempt says so.
            let _ = run_program("modprobe", ["ublk_drv"]);
            ovbd_ublk::check()
        }
        result => result,
    };
    result.map_err(|error| {
        let what = match error.kind() {
            io::ErrorKind::NotFound => {
                "this kernel has no ublk (modprobe ublk_drv): pull without --lazy".to_owned()
            }
            io::ErrorKind::Unsupported => {
                "the ublk of this kernel is too old: pull without --lazy".to_owned()
            }
            _ => format!("cannot use ublk: {error}"),
        };
        Error::new(Kind::System, "/dev/ublk-control", what).into()
    })
}

/// Refuses a stack that is no lazily pulled one, or that a process serves.
fn check_unserved(name: &str, fetched: &[Fetched], store: &Store) -> Result<()> {
    let Some(first) = fetched.first() else {
        if Record::read(store, name).is_some() {
            // All was handed over, and what comes after that was not done.
            return Ok(());
        }
        bail!(Error::new(
            Kind::Refused,
            node(name).display(),
            "exists already"
        ));
    };
    match first.device.server() {
        Ok(Serving::Process(process)) => {
            let what = format!("is being fetched by process {process}");
            bail!(Error::new(Kind::Refused, node(name).display(), what));
        }
        _ => Ok(()),
    }
}

/// One image that is being fetched for one stack.
struct Session<'a> {
    name: &'a str,
    reference: &'a Reference,
    store: &'a Store,
    image: Image,
    /// The layers with blocks, bottom first.
    blobs: Vec<Descriptor>,
    server: Server,
    events: Receiver<Event>,
    /// By what is checked what comes.
    trust: Trust,
    /// What is to be fetched first.
    first: Vec<(usize, u64)>,
    /// The same as the original's acceleration layer has it.
    reads: Vec<Read>,
}

impl<'a> Session<'a> {
    fn open(
        pull: &Pull,
        reference: &'a Reference,
        name: &'a str,
        store: &'a Store,
        is_running: bool,
        report: &Report,
    ) -> Result<Self> {
        // Once, so that it logs in once.
        let asked = Registry::to_pull(reference, pull.transfer.options());
        let platform = pull.platform.clone().unwrap_or_else(Platform::here);
        let mut options = pull.transfer.options();
        // Each read is tried for as long as it may wait.
        options.retries.tries = 1;
        let record = Record::read(store, name).filter(|_| is_running);
        let image = match &record {
            Some(record) => pinned(record, reference, name, store, pull)?,
            None if is_running => {
                let what = format!(
                    "is no stack that is fetched into {}",
                    store.path().display()
                );
                bail!(Error::new(Kind::Refused, node(name).display(), what));
            }
            None => asked.image(&platform)?,
        };
        let subject = reference.to_string();
        named_image(Some(reference), &subject, &image.manifest).check()?;
        let registry = Registry::to_pull(reference, options);
        let layers = block_layers(&image, &subject)?;
        for layer in layers
            .iter()
            .filter(|layer| layer.kind != LayerKind::Overlaybd)
        {
            if look(&registry, store, layer, &subject)?.is_some() {
                let what = "a copying tool has compressed its layers: pull without --lazy";
                bail!(Error::new(Kind::Refused, &subject, what));
            }
        }
        let blobs: Vec<Descriptor> = layers
            .iter()
            .map(|layer| layer.descriptor.clone())
            .collect();
        check_parts(&registry, store, &blobs)?;
        let unique: BTreeSet<String> = blobs.iter().map(|blob| blob.digest.to_string()).collect();
        if unique.len() != blobs.len() {
            let what = "has a layer twice: pull without --lazy";
            bail!(Error::new(Kind::Refused, &subject, what));
        }
        store.put(&image.manifest.config, &image.config_bytes)?;
        store.put(&image.descriptor, &image.manifest_bytes)?;
        let how = Options {
            jobs: usize::from(pull.transfer.jobs),
            patience: (pull.io_timeout > 0).then(|| Duration::from_secs(pull.io_timeout)),
        };
        let (lists, trust) = match &record {
            Some(record) => (record.read_lists(&asked, store, &blobs), Trust::Image),
            None => chunk_lists::fetch(&asked, store, &image, &blobs)?,
        };
        let mut named = BTreeMap::new();
        let mut wanted = Vec::new();
        for (blob, list) in blobs.iter().zip(lists) {
            let (digest, list) = list.unzip();
            named.extend(digest.map(|digest| (blob.digest.clone(), digest)));
            let blob = blob.clone();
            wanted.push(Wanted { blob, list });
        }
        let local = match named.is_empty() {
            true => Vec::new(),
            false => chunk_lists::of_other_images(&registry, store, reference, &blobs),
        };
        let mut sources = vec![registry];
        for mirror in &pull.mirror {
            let mut options = pull.transfer.options();
            options.retries.tries = 1;
            sources.push(Registry::to_pull(mirror, options));
        }
        let (server, events) = Server::new(sources, store, wanted, &local, how)?;
        let (mut first, mut reads) = (Vec::new(), Vec::new());
        if record.is_none() {
            let trace = trace::published(&asked, &image);
            match trace {
                Some(trace) => first = trace.chunks(&blobs),
                None => reads = acceleration::fetch(&asked, &image),
            }
            server.fetch_first(first.iter().copied());
        }
        Record {
            reference: subject,
            manifest: image.descriptor.digest.clone(),
            lists: named,
        }
        .write(store, name)?;
        report.note(format_args!("{reference} is {}", image.descriptor.digest));
        Ok(Self {
            name,
            reference,
            store,
            image,
            blobs,
            server,
            events,
            trust,
            first,
            reads,
        })
    }

    /// Brings the stack up.
    fn map(&self, pull: &Pull, interrupt: &Interrupt, report: &Report) -> Result<()> {
        let layout = self.server.layout();
        let local = |blob| self.server.local(blob).filter(|_| pull.trace.is_none());
        let all_local = (0..self.blobs.len()).all(|blob| local(blob).is_some());
        let device = match all_local {
            true => None,
            false => {
                fetched::remove_left(self.name)?;
                self.server.start()?;
                Some(self.make_device()?)
            }
        };
        let mut layers = Vec::new();
        for blob in 0..self.blobs.len() {
            layers.push(match (local(blob), device, layout.place(blob)) {
                (None, Some(device), Some((start, bytes))) => LayerPath::Part {
                    path: device.node(),
                    start,
                    bytes,
                },
                (Some(path), ..) => LayerPath::Sealed(path),
                _ => bail!(Error::new(Kind::Invalid, self.reference, "has no layers")),
            });
        }
        let result = match device {
            Some(device) => self.prefetch(&device.node(), pull, interrupt),
            None => Ok(()),
        };
        let result = result.and_then(|()| self.bring_up(pull, layers, interrupt, report));
        if let (Err(_), Some(device)) = (&result, device) {
            if let Err(error) = device.remove() {
                tracing::warn!(%error, "the ublk device stays");
            }
            self.forget();
        }
        result
    }

    fn bring_up(
        &self,
        pull: &Pull,
        layers: Vec<LayerPath>,
        interrupt: &Interrupt,
        report: &Report,
    ) -> Result<()> {
        let subject = self.reference.to_string();
        let named = named_image(Some(self.reference), &subject, &self.image.manifest);
        let options = up::Options {
            name: self.name.to_owned(),
            layers,
            writable: pull.writable.then(cow::Options::default),
            parents: pull.parents.of_device(),
            wipe_cow: false,
            assume_elsewhere: false,
            verity: pull.verity.of_stack(&[named], true)?,
        };
        match options.verity {
            // Each block that is read needs a path of the tree, which is the topmost layer.
            Some(_) => self.server.fetch_blob_first(self.blobs.len() - 1),
            None => match self.trust {
                Trust::Image => {}
                Trust::Published => report.note(format_args!(
                    "what is read of a layer before it is complete is checked against a list that somebody has published for \
                     the image: that finds damage, and not what they have made (--verity does)"
                )),
                Trust::Nothing => report.note(format_args!(
                    "what is read of a layer before it is complete has not been checked against its digest: the image has no chunk \
                     lists (--verity checks it)"
                )),
            },
        }
        self.write_status();
        up::up(&options, interrupt, report, |device| {
            report.answer(&format!("{}\n", device.display()))
        })?;
        ready();
        Ok(())
    }

    /// Has fetched first what is read first, and waits for it, if that is wanted.
    fn prefetch(&self, device: &Path, pull: &Pull, interrupt: &Interrupt) -> Result<()> {
        let mut first = self.first.clone();
        if first.is_empty() && !self.reads.is_empty() {
            first = acceleration::chunks(&self.reads, device, self.server.layout());
            self.server.fetch_first(first.iter().copied());
        }
        while pull.prefetch && !self.server.has(&first) {
            interrupt.check(&node(self.name))?;
            std::thread::sleep(PREFETCH_STEP);
        }
        Ok(())
    }

    fn make_device(&self) -> Result<Device> {
        let bytes = self.server.layout().bytes();
        let owner = fetched::owner(self.name);
        let device = Device::serve(bytes, owner, self.server.reads(), self.server.ended())
            .context("cannot make a ublk device")?;
        Ok(device)
    }

    /// Goes on for a stack whose process has gone.
    fn recover(&self, fetched: &[Fetched], report: &Report) -> Result<()> {
        let layout = self.server.layout();
        let Some(device) = fetched.first().map(|first| first.device) else {
            let blobs = self.blobs.iter();
            let files: Vec<_> = blobs
                .map(|blob| self.store.blob_path(&blob.digest))
                .collect();
            if !fetched::is_made_of(self.name, &files)? {
                bail!(Error::new(
                    Kind::Refused,
                    node(self.name).display(),
                    "exists already, and is not made of this image"
                ));
            }
            return self.announce(report);
        };
        for layer in fetched {
            let place = layout.place(layer.layer);
            let is_inside = place.is_some_and(|(start, bytes)| {
                layer.start >= start && layer.start < start.saturating_add(bytes)
            });
            if !is_inside || layer.device != device {
                let what = format!("layer {} is not where it was put", layer.layer);
                bail!(Error::new(Kind::Refused, node(self.name).display(), what));
            }
        }
        self.server.start()?;
        device
            .recover(layout.bytes(), self.server.reads(), self.server.ended())
            .context("cannot take over the ublk device")?;
        self.announce(report)
    }

    /// Says that this process is the one that does what is left to do, and that the stack is there.
    fn announce(&self, report: &Report) -> Result<()> {
        self.write_status();
        report.answer(&format!("{}\n", node(self.name).display()))?;
        ready();
        Ok(())
    }

    /// Serves until nothing is missing.
    fn serve(&self, pull: &Pull, interrupt: &Interrupt, report: &Report) -> Result<ExitCode> {
        // Nobody waits for us any more, and who closes the terminal does not mean us.
        let_go_of_output(self.name);
        self.server.fetch_all();
        let fetched = fetched::find(self.name)?.unwrap_or_default();
        let device = fetched.first().map(|first| first.device);
        let mut remaining: BTreeSet<usize> = fetched.iter().map(|fetched| fetched.layer).collect();
        // Those that are to be handed over as soon as nobody notes what is read of them.
        let mut ready: BTreeSet<usize> = (remaining.iter().copied())
            .filter(|layer| self.server.local(*layer).is_some())
            .collect();
        let noted_until = Instant::now() + Duration::from_secs(pull.trace.unwrap_or(0));
        let mut synced = Instant::now();
        let mut looked = Instant::now();
        let mut unused = 0;
        loop {
            if Instant::now() >= noted_until {
                for layer in std::mem::take(&mut ready) {
                    if let Some(file) = self.server.local(layer) {
                        self.hand_over(layer, &file, &mut remaining, report);
                    }
                }
            }
            if remaining.is_empty() {
                break;
            }
            match self.events.recv_timeout(STEP) {
                Ok(Event::Complete(layer)) => drop(ready.insert(layer)),
                Ok(Event::Damaged(layer, error)) => {
                    let what = format!("layer {layer} of {} stays where it is: {error}", self.name);
                    report.warning(&Error::new(Kind::Invalid, self.reference, what).into());
                }
                Ok(Event::Ended(why)) => return self.ended(why),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if let Some(device) = device.filter(|_| looked.elapsed() >= STEP) {
                looked = Instant::now();
                unused = if fetched::is_mapped(device) {
                    0
                } else {
                    unused + 1
                };
                if unused >= UNUSED_STEPS && fetched::remove_unused(self.name, device, report)? {
                    return self.ended(None);
                }
            }
            self.write_status();
            if synced.elapsed() >= SYNC {
                if let Err(error) = self.server.sync() {
                    tracing::error!(%error, "what was fetched may be fetched again");
                }
                synced = Instant::now();
            }
            if interrupt.check(&node(self.name)).is_err() {
                self.server.sync()?;
                let what = "not all of it is here: who reads what is missing waits until the same command goes on";
                bail!(Error::new(Kind::Refused, node(self.name).display(), what));
            }
        }
        self.write_trace();
        name_image(&self.image, self.reference, self.store, report)?;
        let files =
            (0..self.blobs.len()).filter_map(|layer| Some((layer, self.server.local(layer)?)));
        let files: Vec<_> = files.collect();
        let quiet = Interrupt::default();
        if let Err(error) = fetched::complete(self.name, &files, &quiet, report) {
            // It reads the same by one device more.
            report.warning(&error.into());
        }
        if let Some(device) = device {
            device
                .remove()
                .with_context(|| format!("{}: cannot remove", device.node().display()))?;
        }
        fetched::remove_left(self.name)?;
        // Last: without it nobody goes on.
        self.forget();
        Ok(ExitCode::SUCCESS)
    }

    fn hand_over(
        &self,
        layer: usize,
        file: &Path,
        remaining: &mut BTreeSet<usize>,
        report: &Report,
    ) {
        match fetched::hand_over(self.name, layer, file, &Interrupt::default(), report) {
            Ok(()) => drop(remaining.remove(&layer)),
            // It goes on to be served from the same file.
            Err(error) => report.warning(&error.into()),
        }
    }

    /// The device is no more.
    fn ended(&self, why: Option<String>) -> Result<ExitCode> {
        self.server.sync()?;
        Status::forget(self.name);
        match (fetched::find(self.name)?, why) {
            // Somebody took the stack down. What has come stays for the next time.
            (None, _) => {
                let _ = fs::remove_file(Record::path(self.store, self.name));
                Ok(ExitCode::SUCCESS)
            }
            (Some(_), why) => {
                let why = why.unwrap_or_else(|| "somebody removed it".to_owned());
                bail!(Error::new(
                    Kind::System,
                    node(self.name).display(),
                    format!("its ublk device is not served any more: {why}")
                ))
            }
        }
    }

    fn write_status(&self) {
        let layer = |progress: Progress| LayerStatus {
            path: progress.path,
            size: progress.size,
            local: progress.local,
            state: match progress.state {
                State::Local => "local",
                State::Fetching => "fetching",
                State::Elsewhere => "elsewhere",
                State::Unstored => "unstored",
                State::Damaged => "damaged",
            }
            .to_owned(),
            error: progress.error,
        };
        let status = Status {
            process: std::process::id(),
            layers: self.server.progress().into_iter().map(layer).collect(),
        };
        if let Err(error) = status.write(self.name) {
            tracing::debug!(%error, "nobody can see how far it is");
        }
        self.write_trace();
    }

    /// Says what was read first. Who goes on for a killed process saw only what came after.
    fn write_trace(&self) {
        let chunks = self.server.trace();
        if chunks.is_empty() {
            return;
        }
        if let Err(error) = Trace::new(&self.blobs, &chunks).write(self.name) {
            tracing::debug!(%error, "there is no trace");
        }
    }

    fn forget(&self) {
        Status::forget(self.name);
        let _ = fs::remove_file(Record::path(self.store, self.name));
    }
}

/// The image that a stack is made of already, from the store where it is there.
fn pinned(
    record: &Record,
    reference: &Reference,
    name: &str,
    store: &Store,
    pull: &Pull,
) -> Result<Image> {
    if record.reference != reference.to_string() {
        let what = format!("is made of {}", record.reference);
        bail!(Error::new(Kind::Refused, node(name).display(), what));
    }
    let path = store.blob_path(&record.manifest);
    if let Ok(found) = fs::metadata(&path) {
        for media_type in ovbd_oci::MediaType::ALL {
            let descriptor =
                Descriptor::new(media_type.name(), record.manifest.clone(), found.len());
            if let Ok(image) = store.image(&descriptor, &Platform::here()) {
                return Ok(image);
            }
        }
    }
    let pinned: Reference = format!("{}@{}", reference.name(), record.manifest)
        .parse()
        .with_context(|| format!("{}: cannot be named by its digest", record.reference))?;
    Ok(Registry::to_pull(&pinned, pull.transfer.options()).image(&Platform::here())?)
}
