// SPDX-License-Identifier: GPL-2.0

//! Bringing a stack up: what its layers need so that device-mapper can read them.
//!
//! A layer in a file gets a loop device from its first byte on. That leaves out the last partial sector of a
//! file, so where a blob ends in one, dm-linear puts the loop device and a sector from memory together. A
//! blob in a wrapper on a block device gets dm-linear as well. A compressed layer gets dm-zfile on top.
//!
//! Where direct I/O wants larger blocks than sectors, the loop device of a compressed layer has those and begins with the
//! file, and dm-zfile is told where the blob begins. What is not compressed is mapped sector by sector: its loop device
//! then goes by way of the page cache.

use std::{collections::BTreeSet, path::Path};

use ovbd_image::lsmt::{topmost_size, SECTOR_BYTES};
use ovbd_kernel::dm::Control;

use crate::{
    check_root, cow, dax, discards, in_parallel,
    layer_place::{layer_steps, line, linear, LayerPlace, TAILS},
    lock::Lock,
    loops,
    mapped::{self, node},
    plan::{self, Device, Step, Word},
    programs::run,
    record::Below,
    running::{check_name, Role, Running},
    script,
    storage::Storage,
    verity::{self, Checked},
    Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    file_range::FileRange,
    layer::LayerPath,
    parents::{self, Parents},
    report::Report,
    stack::check_count,
};

/// What to bring up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the device.
    pub name: String,
    /// Layers, bottom first.
    pub layers: Vec<LayerPath>,
    /// Where writes go, for a writable device.
    pub writable: Option<cow::Options>,
    /// What is demanded of the layers' parents.
    pub parents: Parents,
    /// Overwrite what the COW file or device holds.
    pub wipe_cow: bool,
    /// See [`Storage::assume_elsewhere`].
    pub assume_elsewhere: bool,
    /// What every block that is read is checked against.
    pub verity: Option<verity::Options>,
}

/// Makes the device, and tells its node to `announce`.
///
/// # Errors
///
/// All that is wrong with the layers, the names, the COW store and the system, and that of `announce`: a device of which
/// nobody hears is none. Nothing is left behind then.
pub fn up(
    options: &Options,
    interrupt: &Interrupt,
    report: &dyn Report,
    announce: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    up_direct(options, None, interrupt, report, announce)
}

/// As [`up`], where `dax` has file systems access the memory of the layers directly. Such a stack is neither writable nor
/// checked.
///
/// # Errors
///
/// As [`up`], and layers that have no such memory.
pub fn up_direct(
    options: &Options,
    dax: Option<&dax::Options>,
    interrupt: &Interrupt,
    report: &dyn Report,
    announce: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    check_root()?;
    check_name(&options.name)?;
    let control = mapped::open()?;
    let _lock = Lock::take(&options.name, interrupt, report)?;
    // From the look at a COW store until it is in use.
    let _stores = match &options.writable {
        Some(_) => Some(Lock::take_stores(interrupt, report)?),
        None => None,
    };
    check_no_stack(&control, &options.name)?;
    loops::prepare()?;
    let discards = options.writable.is_some() && discards::are_possible(&control, &options.name);
    let steps = steps(options, dax, discards)?;
    check_names(&control, &options.name, &steps)?;
    for target in targets(&steps) {
        check_target(target)?;
    }
    plan::run(&control, &steps, interrupt, report, || {
        let node = node(&options.name);
        if options.writable.is_some() {
            warn_of_volume(&node, report);
        }
        announce(&node)
    })
}

/// Warns where LVM would find its physical volume twice: on the device and on the one below.
fn warn_of_volume(node: &Path, report: &dyn Report) {
    // LVM looks into the first four sectors for its label.
    let found = FileRange::open(node).and_then(|device| device.first(4 * SECTOR_BYTES as usize));
    let is_label = |sector: &[u8]| sector.starts_with(b"LABELONE");
    if found.is_ok_and(|found| found.chunks(SECTOR_BYTES as usize).any(is_label)) {
        let what = "holds a physical volume of LVM, which the device below holds too: \
                    tell LVM to leave what is below alone (global_filter in lvm.conf)";
        report.warn(&Error::new(node, what));
    }
}

/// The shell commands that make the device.
///
/// # Errors
///
/// As [`up_direct`], as far as it shows without making anything.
pub fn dry_run(options: &Options, dax: Option<&dax::Options>) -> Result<String> {
    for layer in &options.layers {
        let LayerPath::Joined { targets, .. } = layer else {
            continue;
        };
        for target in targets {
            if !target.has_name() {
                let what = "is compressed, and no command can name the file it is decompressed to";
                return Err(Error::new(target.path(), what));
            }
        }
    }
    Ok(script::print(&steps(options, dax, false)?))
}

/// Everything that has to be done; `discards` says whether snapshots can discard.
fn steps(options: &Options, dax: Option<&dax::Options>, discards: bool) -> Result<Vec<Step>> {
    check_name(&options.name)?;
    check_count(&options.layers)?;
    let opened = in_parallel(&options.layers, LayerPlace::open);
    let blobs = opened.into_iter().collect::<Result<Vec<_>>>()?;
    let ancestry: Vec<_> = blobs.iter().map(LayerPlace::ancestry).collect();
    parents::check(&ancestry, options.parents)?;
    // Who is not root can only have the commands printed, and is not told all of this.
    let storage = match rustix::process::geteuid().is_root() {
        true => Storage::look()?.assume_elsewhere(options.assume_elsewhere),
        false => Storage::default(),
    };
    for blob in &blobs {
        blob.check_not_written(&storage)?;
    }
    let virtual_bytes = topmost_size(blobs.iter().map(|blob| blob.trailer.virtual_size));
    let sectors = virtual_bytes.div_ceil(SECTOR_BYTES);
    let top = blobs.last().map(|blob| blob.path.as_path());
    if sectors == 0 {
        return Err(Error::new(
            top.unwrap_or(Path::new("-")),
            "no layer has a size",
        ));
    }

    let mut steps = Vec::new();
    let tails: Vec<usize> = (0..blobs.len()).filter(|i| blobs[*i].has_tail()).collect();
    if !tails.is_empty() {
        steps.push(Step::Tails {
            variable: TAILS.to_owned(),
            tails: tails.iter().map(|i| blobs[*i].tail()).collect(),
        });
    }
    let mut words = vec!["overlaybd".into(), (blobs.len() as u64).into()];
    for (number, blob) in blobs.iter().enumerate() {
        let tail = blob.has_tail().then(|| {
            let before = tails.iter().take_while(|i| **i < number);
            before.map(|i| blobs[*i].block_sectors()).sum()
        });
        let device = layer_steps(&options.name, number, blob, tail, &mut steps);
        words.push(device.into());
        words.push(blob.mapped_bytes().into());
    }
    if let Some(how) = dax {
        blobs.iter().try_for_each(dax::check_layer)?;
        match &how.zeros {
            None => words.extend([1.into(), "dax".into()]),
            Some(zeros) => {
                dax::check_zeros(zeros, sectors)?;
                let device = Device::Path(zeros.clone());
                words.extend([3.into(), "dax".into(), "zeros".into(), device.into()]);
            }
        }
    }
    let uuid = blobs.last().and_then(|blob| blob.trailer.uuid);
    let map = |role: Role, sectors, read_only, words| Step::Map {
        name: role.device_name(&options.name),
        uuid: role.device_uuid(&options.name, uuid),
        read_only,
        table: vec![line(sectors, words)],
    };
    let device = |role: Role| Device::Mapped(role.device_name(&options.name));
    let (mut sectors, mut words) = (sectors, words);
    if let Some(how) = &options.verity {
        let checked = Checked::new(&options.name, &options.layers, options.parents, how)?;
        if let Some(signature) = &how.signature {
            let (description, signature) = (verity::key_of(&options.name), signature.clone());
            steps.push(Step::Key {
                description,
                signature,
            });
        }
        steps.push(map(Role::Sealed, sectors, true, words));
        words = checked.words(&device(Role::Sealed));
        sectors = checked.sectors();
    }
    let Some(writable) = &options.writable else {
        steps.push(map(Role::Stack, sectors, true, words));
        return Ok(steps);
    };
    let check_no_layer = |path: &Path| match FileId::at(path)? {
        Some(found) => match blobs.iter().find(|blob| blob.file == found) {
            Some(blob) => Err(Error::new(&blob.path, "both a layer and the COW store")),
            None => Ok(()),
        },
        None => Ok(()),
    };
    if let Some(path) = &writable.path {
        check_no_layer(path)?;
    }
    let stores = cow::Store::prepare(
        writable,
        sectors,
        Below::layer(uuid),
        options.parents == Parents::Ignored,
        options.wipe_cow,
        storage.loops(),
    )?;
    stores
        .iter()
        .try_for_each(|store| check_no_layer(&store.path))?;
    let mut below = words;
    // The oldest generation first.
    for store in stores.into_iter().rev() {
        let number = store.record.map_or(0, |record| record.generation);
        let (lower, generation) = (Role::Lower(number), Role::Generation(number));
        steps.push(map(lower, sectors, true, below));
        steps.extend(store.steps);
        let words = snapshot(device(lower), store.device, store.chunk_sectors, discards);
        steps.push(map(generation, sectors, false, words));
        below = linear(&device(generation), 0);
    }
    steps.push(map(Role::Top, sectors, false, below));
    Ok(steps)
}

/// The table of a generation. With `O` a store that is full refuses writes and keeps what it has; without, it loses all.
/// What is discarded becomes zero, and room in the file of the store, where the kernel can do `discards`.
pub fn snapshot(below: Device, store: Device, chunk_sectors: u32, discards: bool) -> Vec<Word> {
    let mut words = vec![
        "snapshot".into(),
        below.into(),
        store.into(),
        "PO".into(),
        u64::from(chunk_sectors).into(),
    ];
    if discards {
        words.extend([1.into(), discards::FEATURE.into()]);
    }
    words
}

/// Refuses the name of a stack of which anything exists.
fn check_no_stack(control: &Control, name: &str) -> Result<()> {
    let fail = |what| Err(Error::new(&node(name), what));
    let existing = mapped::list(control)?;
    let stacks = Running::of(control, &existing, |found| found == name)?;
    match stacks.first().map(|stack| stack.top()) {
        None => Ok(()),
        Some(Some(top)) if top.name != name => {
            fail(format!("exists already, under the name {}", top.name))
        }
        Some(Some(_)) => fail("exists already".to_owned()),
        Some(None) => fail(format!(
            "parts of it exist, \"ovbd down {name}\" removes them"
        )),
    }
}

/// Refuses names of devices that exist.
fn check_names(control: &Control, name: &str, steps: &[Step]) -> Result<()> {
    let existing = mapped::list(control)?;
    for step in steps {
        if let Step::Map { name: device, .. } = step {
            if existing.iter().any(|existing| existing.name == *device) {
                let what = format!("a device {device} exists already");
                return Err(Error::new(&node(name), what));
            }
        }
    }
    Ok(())
}

/// The targets that the tables name.
pub fn targets(steps: &[Step]) -> BTreeSet<&str> {
    let tables = steps.iter().filter_map(|step| match step {
        Step::Map { table, .. } => Some(table),
        _ => None,
    });
    tables
        .flatten()
        .filter_map(|line| match line.words.first() {
            Some(Word::Text(target)) => Some(target.as_str()),
            _ => None,
        })
        .collect()
}

/// Loads the module of a target that a kernel may lack, before anything is made.
///
/// # Errors
///
/// It is not there.
pub fn check_target(target: &str) -> Result<()> {
    let what = match target {
        "overlaybd" | "zfile" => "the module is not loaded",
        "snapshot" => "this kernel has none, and it keeps what is written (without --writable it is not needed)",
        _ => return Ok(()),
    };
    let module = format!("dm-{target}");
    let loaded = Path::new("/sys/module").join(module.replace('-', "_"));
    if loaded.exists() || run("modprobe", [&module]).is_ok() {
        return Ok(());
    }
    let what = format!("{what}: modprobe does not find it; load it with insmod {module}.ko");
    Err(Error::new(Path::new(&module), what))
}
