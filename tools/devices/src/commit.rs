// SPDX-License-Identifier: GPL-2.0

//! Making a layer of what was written over a stack.
//!
//! An empty store is put on top ([`crate::freeze`]), and what was written before is frozen: its exceptions say which chunks
//! were written, and only these are read. What they hold is compared with the stack below, so that the layer is that which
//! `ovbd build --base` makes of a copy. Then the new store is put over the stack with that layer ([`crate::rebase`]), and
//! the old one goes.
//!
//! Whatever is interrupted leaves generations above each other, which read as the device did. The next commit makes one
//! layer of all that are frozen.

use std::{
    fs::File,
    path::{Path, PathBuf},
    thread,
};

use ovbd_image::{
    lsmt::{Identity, UuidText},
    merge::MAX_LAYERS,
};
use ovbd_kernel::{dm::Control, Number};

use crate::{
    block_writer::{BlockWriter, Origin},
    check_root,
    freeze::Freezing,
    frozen_stores::FrozenStores,
    generations::{remove_leftovers, Chain, Generation, State},
    hold_still::Frozen,
    lock::Lock,
    mapped::{self, Mapper},
    rebase::rebase,
    record::{self, Below, Record},
    running::{check_name, Role, Running},
    storage::Storage,
    store_files::{self, Place},
    users::device_name,
    Interrupt,
};
use ovbd_layers::{
    blob::Content,
    build::{finish_output, start_blob, Options},
    compare::Base,
    direct::Aligned,
    error::{Error, Result},
    file_id::FileId,
    file_range::FileRange,
    layer::{read_trailer, LayerPath},
    layer_writer::{check_dax_size, segments_of, MAX_SEGMENTS},
    output::{directory, Output, Rules},
    parents::{is_same, Parents},
    pipeline,
    report::Report,
    stack::Stack,
    units,
};

/// Which part of a commit to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    #[default]
    Whole,
    /// What follows after a new generation was begun.
    Rest,
}

/// What to commit.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Name of the stack.
    pub name: &'a str,
    /// Where the next store is to be, if not beside the one that there is.
    pub next: Option<&'a Path>,
    /// How much of it.
    pub part: Part,
    /// See [`Storage::assume_elsewhere`].
    pub assume_elsewhere: bool,
}

/// Begins a new generation and makes no layer. Returns the device of what was written until then.
///
/// # Errors
///
/// As [`commit`].
pub fn snapshot(
    request: &Request<'_>,
    interrupt: &Interrupt,
    report: &dyn Report,
) -> Result<PathBuf> {
    let work = Work::begin(request, interrupt, report)?;
    work.check_not_folding()?;
    // Nothing is written that the device could be needed for.
    work.freeze(Path::new("/"))?;
    let work = work.again(request)?;
    work.remove_probe();
    Ok(work.chain.newest().lower.node())
}

/// Writes what was written over a stack to the new layer `out`, and puts the stack on it. Returns whether it is.
///
/// # Errors
///
/// The stack is not writable or its snapshot invalid, `out` cannot be written, and those of reading. The device goes on,
/// and nothing that was written is lost.
pub fn commit(
    request: &Request<'_>,
    out: &Path,
    options: &Options,
    interrupt: &Interrupt,
    report: &dyn Report,
) -> Result<bool> {
    options.check().map_err(|what| Error::new(out, what))?;
    let mut work = Work::begin(request, interrupt, report)?;
    work.check_not_folding()?;
    work.check_room(out)?;
    let lower = Lower::new(&work.stack)?;
    if options
        .uuid
        .zip(lower.uuid)
        .is_some_and(|(new, below)| is_same(new, below))
    {
        return Err(Error::new(out, "the layer below has this UUID"));
    }
    work.check_uuid(out, options)?;
    let inputs = work.inputs()?;
    let rules = Rules {
        replace: options.replace,
        // A layer of the stack, or a store of it, would be gone when the stack is taken down.
        inputs: &inputs,
        ..Rules::default()
    };
    let output = Output::create_file(out, rules)?;
    let stays = work.why_stack_stays(out, &output)?;
    // A file without a name would be in the layer itself. One that is elsewhere stays made.
    let mut output = Some(output).filter(|_| stays != Some(ON_ITSELF));
    let is_frozen = !work.chain.frozen().is_empty();
    match request.part {
        Part::Rest if !is_frozen => {
            let what = "no commit was interrupted: there is one generation, which is written to";
            return Err(Error::new(&work.chain.top.node(), what));
        }
        Part::Rest => work.check_is_frozen()?,
        Part::Whole if is_frozen && work.is_unchanged()? => {}
        Part::Whole => {
            work.freeze(out)?;
            work = work.again(request)?;
        }
    }
    let output = match output.take() {
        Some(output) => output,
        None => Output::create_file(out, rules)?,
    };
    let (identity, start, end) = thread::scope(|scope| {
        // The kernel waits for whoever may be in it still, and nobody has to wait for that.
        scope.spawn(|| work.remove_probe());
        work.write(out, &output, options, &lower)
    })?;
    // From now on the new store is one over that layer too, whether it gets its name or not.
    let newest = work.chain.newest().store_node();
    let lost = || Error::new(&newest, "the store lost its record");
    let record = Record::read(&newest)?.ok_or_else(lost)?;
    if stays.is_none() {
        let layer = record::number(Some(identity.uuid));
        Record { layer, ..record }.write(&newest)?;
    }
    finish_output(output, options, start, end)?;
    if let Some(why) = stays {
        let what =
            format!("{why}, so the stack is not put on it: the next layer has all of it too");
        report.warn(&Error::new(out, what));
        return Ok(false);
    }
    work.put_on(out, identity.uuid).map_err(|e| {
        let what = format!(
            "is complete, but the stack is not on it: {e} (the next layer would have all of it too)"
        );
        Error::new(out, what)
    })?;
    Ok(true)
}

/// Why a stack cannot be put on a layer, which can still be made.
const ON_ITSELF: &str = "is on the stack itself";

/// As [`ON_ITSELF`]: the root hash that the stack is checked against is not that of a longer one.
const UNCHECKED: &str = "is not sealed";

/// A stack that is being committed.
pub(crate) struct Work<'a> {
    pub(crate) control: Control,
    name: &'a str,
    next: Option<&'a Path>,
    pub(crate) storage: Storage,
    stack: Running,
    pub(crate) chain: Chain,
    interrupt: &'a Interrupt,
    report: &'a dyn Report,
    _lock: Lock,
}

impl<'a> Work<'a> {
    /// Looks at a stack, and tidies up after commits that were interrupted.
    pub(crate) fn begin(
        request: &Request<'a>,
        interrupt: &'a Interrupt,
        report: &'a dyn Report,
    ) -> Result<Self> {
        check_root()?;
        check_name(request.name)?;
        let control = mapped::open()?;
        let lock = Lock::take(request.name, interrupt, report)?;
        let stack = Running::find(&control, request.name)?;
        let chain = Chain::of(&stack)?;
        let top = &chain.top;
        if top.suspended {
            let what = format!("suspended; \"dmsetup resume {}\" goes on", top.name);
            return Err(Error::new(&top.node(), what));
        }
        for generation in &chain.generations {
            generation.check_valid(&control)?;
        }
        let storage = Storage::look()?.assume_elsewhere(request.assume_elsewhere);
        let work = Self {
            control,
            name: request.name,
            next: request.next,
            storage,
            stack,
            chain,
            interrupt,
            report,
            _lock: lock,
        };
        work.tidy()?;
        work.again(request)
    }

    /// The same after something changed.
    pub(crate) fn again(self, request: &Request<'_>) -> Result<Self> {
        let stack = Running::find(&self.control, self.name)?;
        Ok(Self {
            chain: Chain::of(&stack)?,
            stack,
            storage: Storage::look()?.assume_elsewhere(request.assume_elsewhere),
            ..self
        })
    }

    fn tidy(&self) -> Result<()> {
        let mapper = Mapper::new(&self.control)?;
        let removed = remove_leftovers(&self.control, &self.stack, &self.chain, &mapper);
        mapper.finish()?;
        removed?;
        let layers: Vec<Number> = self
            .stack
            .layers()
            .iter()
            .map(|layer| layer.device)
            .collect();
        let needed = [self.chain.numbers(), layers].concat();
        let devices = self.stack.devices.iter().map(|(_, device)| device);
        mapped::make_missing_nodes(devices.filter(|device| needed.contains(&device.number)))?;
        // A store that a layer made unneeded may have kept its name.
        let [only] = self.chain.generations.as_slice() else {
            return Ok(());
        };
        let Place::File(path) = Place::of(only.store, &self.storage).unwrap_or(Place::Unnamed)
        else {
            return Ok(());
        };
        let Some(record) = Record::read(&only.store_node())? else {
            return Ok(());
        };
        if !matches!(record.below, Below::Store(_)) || record.layer.is_none() {
            return Ok(());
        }
        let _stores = Lock::take_stores(self.interrupt, self.report)?;
        // Some may have been in use until now.
        let old = store_files::below(&path, &record, &Storage::look()?)?;
        store_files::settle(&old, &Place::File(path))
    }

    /// Refuses one that the kernel folds back at this moment: what looks frozen changes.
    fn check_not_folding(&self) -> Result<()> {
        if self.chain.newest().merging {
            let what = format!(
                "is being folded back (\"ovbd commit --fold-back {}\" completes that)",
                self.name
            );
            return Err(Error::new(&self.chain.newest().device.node(), what));
        }
        Ok(())
    }

    /// Refuses to make a layer of what is below the newest generation where some of that has gone there.
    fn check_is_frozen(&self) -> Result<()> {
        let newest = self.chain.newest();
        let folding = Record::read(&newest.store_node())?.is_some_and(|record| record.folding);
        if folding && newest.state(&self.control)? == State::Written {
            let what = "part of it was folded back, so that what is below is of no single moment \
                        (without --continue the layer has all)";
            return Err(Error::new(&newest.device.node(), what));
        }
        Ok(())
    }

    /// Refuses a UUID that a layer of the same generations has, which was made without the stack being put on it: by it
    /// the stores would be found to be over either.
    fn check_uuid(&self, out: &Path, options: &Options) -> Result<()> {
        let Some(uuid) = record::number(options.uuid) else {
            return Ok(());
        };
        for generation in &self.chain.generations {
            let record = Record::read(&generation.store_node())?;
            if record.is_some_and(|record| record.layer == Some(uuid)) {
                let what = "an interrupted commit made another layer with this UUID";
                return Err(Error::new(out, what));
            }
        }
        Ok(())
    }

    /// Refuses what takes more segments than a layer can have. What is known now can only become more.
    fn check_room(&self, out: &Path) -> Result<()> {
        let mut most = Some(0_u64);
        for generation in &self.chain.generations {
            let chunk_sectors = u64::from(generation.chunk_sectors);
            let written = generation.written_sectors(&self.control)?;
            let chunks = written.and_then(|sectors| sectors.checked_div(chunk_sectors));
            // Each chunk elsewhere.
            let segments = chunks.map(|chunks| chunks * segments_of(chunk_sectors));
            most = most.zip(segments).map(|(sum, more)| sum + more);
        }
        if most.is_some_and(|most| most <= MAX_SEGMENTS) {
            return Ok(());
        }
        let stores = FrozenStores::open(&self.chain.generations, self.chain.top.sectors())?;
        stores.runs(out).map(drop)
    }

    /// The files that the stack is made of.
    fn inputs(&self) -> Result<Vec<PathBuf>> {
        let layers = self.stack.layers().into_iter().map(|layer| layer.path);
        let mut inputs: Vec<PathBuf> = layers.collect();
        for generation in &self.chain.generations {
            match Place::of(generation.store, &self.storage) {
                Ok(Place::File(path) | Place::Device(path)) => inputs.push(path),
                Ok(Place::Unnamed) | Err(_) => {}
            }
        }
        // The names of files that have none any more are nobody's output.
        inputs.retain(|path| path.exists());
        Ok(inputs)
    }

    /// Why the stack cannot be put on the layer; `None` if it can.
    fn why_stack_stays(&self, out: &Path, output: &Output) -> Result<Option<&'static str>> {
        if output.is_stream() {
            return Ok(Some("is a pipe"));
        }
        if self.stack.verity().is_some() {
            return Ok(Some(UNCHECKED));
        }
        if self.stack.layers().len() >= MAX_LAYERS {
            return Ok(Some("would be the 256th layer"));
        }
        let folder = directory(out);
        let below = self.storage.below_path(folder)?;
        if below.contains(&self.chain.top.number) {
            return Ok(Some(ON_ITSELF));
        }
        let kept = self.chain.generations.iter().find_map(|generation| {
            let place = Place::of(generation.store, &self.storage).ok()?;
            place.on_disk(&self.storage)
        });
        match kept {
            Some(path) if self.storage.is_in_memory(folder) => {
                let what = format!(
                    "would be in memory only, and what was written is on a disk, in {}",
                    path.display()
                );
                Err(Error::new(out, what))
            }
            _ => Ok(None),
        }
    }

    /// Whether nothing was written since the newest generation was begun.
    fn is_unchanged(&self) -> Result<bool> {
        let top = &self.chain.top;
        if Frozen::is_needed(top, &self.storage)? {
            return Ok(false);
        }
        // What is in memory still must be seen.
        for mount in self.storage.mounts_on(top.number) {
            let point = mount.seen_from_here(&mount.point);
            let Ok(file) = File::open(&point) else {
                return Ok(false);
            };
            rustix::fs::syncfs(&file).map_err(|e| Error::io(&mount.point, "sync", e.into()))?;
        }
        let node = top.node();
        let file = File::open(&node).map_err(|e| Error::io(&node, "open", e))?;
        file.sync_all().map_err(|e| Error::io(&node, "sync", e))?;
        Ok(self.chain.newest().state(&self.control)? == State::Empty)
    }

    /// Begins a new generation.
    fn freeze(&self, out: &Path) -> Result<()> {
        let _stores = Lock::take_stores(self.interrupt, self.report)?;
        let freezing = Freezing {
            name: self.name,
            chain: &self.chain,
            uuid: Lower::new(&self.stack)?.uuid,
            next: self.next,
            out,
            storage: &self.storage,
            report: self.report,
        };
        freezing.run(&self.control, self.interrupt)
    }

    /// Removes the device that tried the table of the device. What cannot be removed the next commit removes.
    fn remove_probe(&self) {
        let Some(probe) = self.stack.device(Role::Probe) else {
            return;
        };
        if let Err(e) = mapped::remove(&self.control, [probe]) {
            self.report.warn(&e);
        }
    }

    /// The stack below from its files, of which the part that is compared can be read without a device: where nothing is,
    /// nothing is read, and blocks are decompressed where they are needed. `None` where the files do not have all of it,
    /// where only the device checks what is read, and where reading the indexes may take longer than that of `bytes`.
    fn layers_below(&self, bytes: u64) -> Option<Stack> {
        let is_joined = |(role, _): &(Role, _)| matches!(role, Role::Turbo(_));
        if self.stack.verity().is_some() || self.stack.devices.iter().any(is_joined) {
            return None;
        }
        let stored: u64 = self
            .stack
            .layers()
            .iter()
            .map(|layer| layer.stored_bytes)
            .sum();
        // The index of compressed blocks is a thousandth of these.
        if bytes < stored / 64 {
            return None;
        }
        let files = self.stack.layer_files().ok()?;
        let paths: Vec<LayerPath> = files.iter().cloned().map(LayerPath::Sealed).collect();
        let stack = Stack::open(&paths, Parents::Ignored).ok()?;
        // They were that when they were opened, too.
        (self.stack.layer_files().ok()? == files).then_some(stack)
    }

    /// Writes the layer of all that is frozen; returns what it is, its first byte and the one after it.
    fn write(
        &self,
        out: &Path,
        output: &Output,
        options: &Options,
        lower: &Lower,
    ) -> Result<(Identity, u64, u64)> {
        let frozen = self.chain.frozen();
        for generation in frozen {
            generation.check_valid(&self.control)?;
        }
        let sectors = self.chain.top.sectors();
        let stores = FrozenStores::open(frozen, sectors)?;
        let runs = stores.runs(out)?;
        self.report.expect(stores.bytes());
        let layers = self.layers_below(stores.bytes());
        let below = match &layers {
            Some(layers) => Origin::Layers(Base::new(layers)),
            None => Origin::device(&self.chain.stack.node())?,
        };
        let (blob, start) = start_blob(output, out, options)?;
        let first = Identity {
            virtual_size: lower.virtual_size,
            uuid: options.uuid.unwrap_or(UuidText::NIL),
            parent_uuid: options.parent(lower.uuid),
        };
        if options.dax {
            check_dax_size(out, lower.virtual_size)?;
        }
        let layer = options.begin_layer(blob, out, &first, false)?;
        let mut writer = BlockWriter::new(layer, runs, MAX_SEGMENTS);
        let buffers = pipeline::Pool::<Aligned>::default();
        pipeline::run(
            stores.parts(),
            |part| stores.read(&part, &below, buffers.take().unwrap_or_default()),
            |blocks| blocks.compare(&below),
            |compared| {
                self.interrupt.check(out)?;
                self.report.add(compared.bytes());
                writer.add(&compared)?;
                buffers.put(compared.into_memory());
                Ok(())
            },
        )?;
        let written = writer.finish();
        if written.same > 0 {
            let what = format!(
                "so scattered that segments do not suffice: {} that did not change are stored too",
                units::size(written.same)
            );
            self.report.warn(&Error::new(out, what));
        }
        let hash = written.content;
        let identity = Identity {
            uuid: options
                .uuid
                .unwrap_or_else(|| hash.uuid(lower.virtual_size, first.parent_uuid)),
            ..first
        };
        let end = written.layer.finish(&identity)?;
        Ok((identity, start, end))
    }

    /// Puts the newest generation over the stack with the layer, and removes those that were frozen.
    fn put_on(&self, out: &Path, uuid: UuidText) -> Result<()> {
        let (newest, frozen) = (self.chain.newest(), self.chain.frozen());
        let out = std::path::absolute(out).map_err(|e| Error::io(out, "find", e))?;
        let mut old: Vec<(Place, FileId)> = frozen
            .iter()
            .filter_map(|generation| self.file_of(generation))
            .collect();
        let oldest = match frozen.last() {
            Some(oldest) => Record::read(&oldest.store_node())?,
            None => None,
        };
        let place = Place::of(newest.store, &self.storage);
        rebase(
            &self.control,
            self.name,
            &self.chain,
            newest,
            &out,
            uuid,
            self.report,
        )?;
        let mapper = Mapper::new(&self.control)?;
        let removed = mapper.remove_each(frozen.iter().flat_map(Generation::devices));
        mapper.finish()?;
        // The stack is on the layer. What could not be removed the next commit removes.
        let settled = removed.and_then(|()| {
            let _stores = Lock::take_stores(self.interrupt, self.report)?;
            if let (Some((Place::File(path), _)), Some(record)) = (old.last(), oldest) {
                // What an earlier one could not remove.
                let more = store_files::below(path, &record, &Storage::look()?)?;
                old.extend(more);
            }
            store_files::settle(&old, &place.unwrap_or(Place::Unnamed))
        });
        if let Err(e) = settled {
            self.report.warn(&e);
        }
        Ok(())
    }

    /// The file of a store, if it is in one that has a name.
    pub(crate) fn file_of(&self, generation: &Generation) -> Option<(Place, FileId)> {
        let place = Place::of(generation.store, &self.storage).ok()?;
        let Place::File(path) = &place else {
            return None;
        };
        let id = FileId::at(path).ok()??;
        Some((place, id))
    }
}

/// What the new layer must know of the one below.
struct Lower {
    virtual_size: u64,
    uuid: Option<UuidText>,
}

impl Lower {
    fn new(stack: &Running) -> Result<Self> {
        let mut lower = Self {
            virtual_size: 0,
            uuid: None,
        };
        let layers = stack.layers();
        for (number, layer) in layers.iter().enumerate().rev() {
            let device = FileRange::open(Path::new(&device_name(layer.device)))?;
            if layer.bytes > device.bytes() {
                return Err(Error::new(device.path(), "smaller than its layer"));
            }
            let trailer = read_trailer(&Content::Plain(device.part(0, layer.bytes)))?;
            if number + 1 == layers.len() {
                lower.uuid = trailer.uuid;
            }
            lower.virtual_size = trailer.virtual_size;
            if lower.virtual_size != 0 {
                break;
            }
        }
        Ok(lower)
    }
}
