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

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::{topmost_size, Trailer, SECTOR_BYTES};
use ovbd_kernel::{dm::Control, loops::Part, Number};
use rustix::fs::OFlags;

use crate::{
    check_root, cow, direct_io, in_parallel,
    lock::Lock,
    loops,
    mapped::{self, node},
    plan::{self, Device, Line, Step, Tail, Word},
    programs::run,
    record::Below,
    running::{check_name, Role, Running},
    storage::Storage,
    Interrupt,
};
use ovbd_layers::{
    blob::{Blob, Content},
    error::{Error, Result},
    file_id::FileId,
    file_range::FileRange,
    layer::{read_header, read_trailer, LayerPath},
    parents::{self, Ancestry, Parents},
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
    let steps = steps(options)?;
    check_names(&control, &options.name, &steps)?;
    for target in targets(&steps) {
        check_target(target)?;
    }
    loops::prepare()?;
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
/// As [`up`], as far as it shows without making anything.
pub fn dry_run(options: &Options) -> Result<String> {
    Ok(plan::print(&steps(options)?))
}

/// What a layer is and where its blob is.
struct LayerPlace {
    path: PathBuf,
    /// The file that was opened under this name.
    file: FileId,
    /// Whether it is on a block device that dm-linear can start at any sector of.
    is_device: bool,
    /// Bytes of the blocks of the loop device.
    block_bytes: u32,
    file_bytes: u64,
    /// First byte of the blob in the file.
    start: u64,
    /// Bytes of the blob.
    bytes: u64,
    /// Bytes of the uncompressed blob, if it is compressed.
    original_bytes: Option<u64>,
    trailer: Trailer,
}

impl LayerPlace {
    fn open(layer: &LayerPath) -> Result<Self> {
        let path = match layer {
            LayerPath::Sealed(path) => path,
            LayerPath::Writable { data, .. } => {
                return Err(Error::new(
                    data,
                    "a writable pair cannot be mapped, only a sealed layer",
                ))
            }
        };
        let opened = Blob::open(path)?;
        if matches!(opened.content, Content::Zfile(_)) && !opened.is_layer()? {
            return Err(Error::new(path, "a ZFile that holds no layer"));
        }
        read_header(&opened.content)?;
        let trailer = read_trailer(&opened.content)?;
        let input = opened.content.input();
        let found = input.file().metadata();
        let found = found.map_err(|e| Error::io(path, "look up", e))?;
        // Layers are made of sectors of 512 bytes, wrappers too. A disk with larger ones gets a loop device, as a file
        // does.
        let is_device = found.file_type().is_block_device()
            && rustix::fs::ioctl_blksszget(input.file())
                .map_err(|e| Error::io(path, "find the block size of", e.into()))?
                <= SECTOR_BYTES as u32;
        let original_bytes = match &opened.content {
            Content::Plain(_) => None,
            Content::Zfile(zfile) => Some(zfile.geometry().original_bytes()),
        };
        let block_bytes = match original_bytes {
            Some(_) if !is_device => direct_io::block_bytes(input.file(), path)?,
            _ => SECTOR_BYTES as u32,
        };
        Ok(Self {
            path: path.clone(),
            file: FileId::of(&found),
            is_device,
            // What is smaller than a block is all tail.
            block_bytes: match opened.file_bytes < u64::from(block_bytes) {
                true => SECTOR_BYTES as u32,
                false => block_bytes,
            },
            file_bytes: opened.file_bytes,
            start: input.start(),
            bytes: input.bytes(),
            original_bytes,
            trailer,
        })
    }

    fn ancestry(&self) -> Ancestry<'_> {
        Ancestry {
            path: &self.path,
            uuid: self.trailer.uuid,
            parent: self.trailer.parent_uuid,
        }
    }

    /// First byte of the file that is mapped.
    fn first(&self) -> u64 {
        match u64::from(self.block_bytes) > SECTOR_BYTES {
            true => 0,
            false => self.start,
        }
    }

    /// Sectors from there to the end of the blob's last block.
    fn sectors(&self) -> u64 {
        let bytes = self.start - self.first() + self.bytes;
        bytes.next_multiple_of(self.block_bytes.into()) / SECTOR_BYTES
    }

    /// Sectors of a block.
    fn block_sectors(&self) -> u64 {
        u64::from(self.block_bytes) / SECTOR_BYTES
    }

    /// Whether the last block of the blob is one that a loop device leaves out.
    fn has_tail(&self) -> bool {
        self.first() + self.sectors() * SECTOR_BYTES > self.file_bytes
    }

    /// The end of its file.
    fn tail(&self) -> Tail {
        Tail {
            path: self.path.clone(),
            block_bytes: self.block_bytes,
        }
    }

    /// Refuses a layer that somebody writes to.
    fn check_not_written(&self, storage: &Storage) -> Result<()> {
        let fail = |what: String| Err(Error::new(&self.path, what));
        let mut loops = storage.loops().iter();
        if let Some(user) = loops.find(|user| !user.status.read_only && user.is_on(self.file)) {
            return fail(format!("can be written through {}", user.node.display()));
        }
        let FileId::Device(device) = self.file else {
            return Ok(());
        };
        let device = Number::new(device);
        // What an overlay writes goes to another mount.
        let mounts = storage.mounts().iter();
        for mount in mounts.filter(|mount| !mount.read_only && mount.kind != "overlay") {
            let below = match storage.below_mount(mount) {
                Ok(below) => below,
                // Nobody claims the device, so that one is on another.
                Err(_) if is_unclaimed(&self.path) => continue,
                Err(e) => return Err(e),
            };
            if below.contains(&device) {
                return fail(format!("mounted for writing on {}", mount.point.display()));
            }
        }
        Ok(())
    }
}

/// Whether no file system and no other device has a block device for itself.
fn is_unclaimed(path: &Path) -> bool {
    let exclusive = OFlags::EXCL.bits() as i32;
    let opened = fs::File::options()
        .read(true)
        .custom_flags(exclusive)
        .open(path);
    opened.is_ok()
}

/// Everything that has to be done.
fn steps(options: &Options) -> Result<Vec<Step>> {
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
        words.push(blob.original_bytes.unwrap_or(blob.bytes).into());
    }
    let uuid = blobs.last().and_then(|blob| blob.trailer.uuid);
    let Some(writable) = &options.writable else {
        steps.push(Step::Map {
            name: options.name.clone(),
            uuid: Role::Stack.device_uuid(&options.name, uuid),
            read_only: true,
            hidden: false,
            table: vec![line(sectors, words)],
        });
        return Ok(steps);
    };
    for blob in &blobs {
        if cow::Store::is_same(writable, blob.file) {
            return Err(Error::new(&blob.path, "both a layer and the COW store"));
        }
    }
    let below = Below::layer(uuid);
    let store = cow::Store::prepare(writable, sectors, below, options.wipe_cow, storage.loops())?;
    if options.parents != Parents::Ignored {
        store.check_below(writable, below, top)?;
    }
    let number = store.record.map_or(0, |record| record.generation);
    let map = |role: Role, read_only, words| Step::Map {
        name: role.device_name(&options.name),
        uuid: role.device_uuid(&options.name, uuid),
        read_only,
        hidden: role != Role::Top,
        table: vec![line(sectors, words)],
    };
    let device = |role: Role| Device::Mapped(role.device_name(&options.name));
    let (lower, generation) = (Role::Lower(number), Role::Generation(number));
    steps.push(map(lower, true, words));
    steps.extend(store.steps);
    let words = snapshot(device(lower), store.device, store.chunk_sectors);
    steps.push(map(generation, false, words));
    steps.push(map(Role::Top, false, linear(&device(generation), 0)));
    Ok(steps)
}

/// The table of a generation. With `O` a store that is full refuses writes and keeps what it has; without, it loses all.
fn snapshot(below: Device, store: Device, chunk_sectors: u32) -> Vec<Word> {
    vec![
        "snapshot".into(),
        below.into(),
        store.into(),
        "PO".into(),
        u64::from(chunk_sectors).into(),
    ]
}

fn linear(device: &Device, start: u64) -> Vec<Word> {
    vec!["linear".into(), device.clone().into(), start.into()]
}

/// Variable of the loop device with the last blocks of all blobs that need it.
const TAILS: &str = "tails";

/// The steps for one layer; returns the device that holds its uncompressed blob. `tail` is the sector at which its last
/// block is among the tails.
fn layer_steps(
    name: &str,
    number: usize,
    blob: &LayerPlace,
    tail: Option<u64>,
    steps: &mut Vec<Step>,
) -> Device {
    let mut device = if blob.is_device {
        Device::Path(blob.path.clone())
    } else {
        let variable = format!("layer{number}");
        steps.push(Step::Layer {
            variable: variable.clone(),
            path: blob.path.clone(),
            part: Part {
                offset: blob.first(),
                bytes: (blob.sectors() - tail.map_or(0, |_| blob.block_sectors())) * SECTOR_BYTES,
                block_bytes: blob.block_bytes,
            },
        });
        Device::Loop(variable)
    };
    let mut map = |role: Role, table| {
        let device = role.device_name(name);
        steps.push(Step::Map {
            name: device.clone(),
            uuid: role.device_uuid(name, blob.trailer.uuid),
            read_only: true,
            hidden: true,
            table,
        });
        Device::Mapped(device)
    };
    if let Some(tail) = tail {
        let whole = blob.sectors() - blob.block_sectors();
        let tails = Device::Loop(TAILS.to_owned());
        let table = vec![
            line(whole, linear(&device, 0)),
            Line {
                start: whole,
                ..line(blob.block_sectors(), linear(&tails, tail))
            },
        ];
        device = map(Role::Blob(number), table);
    } else if blob.is_device && blob.start > 0 {
        let start = blob.start / SECTOR_BYTES;
        let table = vec![line(blob.sectors(), linear(&device, start))];
        device = map(Role::Blob(number), table);
    }
    if let Some(original) = blob.original_bytes {
        let mut words = vec!["zfile".into(), device.into(), blob.bytes.into()];
        let offset = blob.start - blob.first();
        // The device of a wrapped blob on a block device begins with the blob.
        if offset > 0 && !blob.is_device {
            words.extend([2.into(), "offset".into(), offset.into()]);
        }
        let table = vec![line(original.div_ceil(SECTOR_BYTES), words)];
        device = map(Role::Zfile(number), table);
    }
    device
}

/// A line that starts a table.
fn line(sectors: u64, words: Vec<Word>) -> Line {
    Line {
        start: 0,
        sectors,
        words,
    }
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
fn targets(steps: &[Step]) -> BTreeSet<&str> {
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

/// Loads the module of one of our targets where it is missing; device-mapper finds its own.
fn check_target(target: &str) -> Result<()> {
    let module = match target {
        "overlaybd" | "zfile" => format!("dm-{target}"),
        _ => return Ok(()),
    };
    let loaded = Path::new("/sys/module").join(module.replace('-', "_"));
    if loaded.exists() || run("modprobe", [&module]).is_ok() {
        return Ok(());
    }
    let what = format!(
        "the module is not loaded and modprobe does not find it; load it with insmod {module}.ko"
    );
    Err(Error::new(Path::new(&module), what))
}
