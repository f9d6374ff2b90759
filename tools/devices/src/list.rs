// SPDX-License-Identifier: GPL-2.0

//! Which stacks run, what they are made of, and how they do.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::SECTOR_BYTES;
use serde::{Serialize, Serializer};

use ovbd_kernel::{dm::Control, Number};
use ovbd_ublk::Server;

use crate::{
    check_root,
    fetched::Status,
    generations::Chain,
    mapped::{self, Mapped, Target},
    running::{Running, RunningLayer},
    storage::Storage,
    users::{device_name, why_in_use},
    verity,
};
use ovbd_layers::{error::Result, sysfs::backing_file, units::size};

/// Running stacks. Sizes are in bytes.
#[derive(Debug, Serialize)]
pub struct List(Vec<Entry>);

/// A running stack.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Name.
    pub name: String,
    /// Device node; nothing if only parts of the stack exist.
    pub device: Option<PathBuf>,
    /// UUID of the device.
    pub uuid: String,
    /// Size of the device.
    pub bytes: u64,
    /// Where it is mounted, or the device that is made of it.
    pub used: Option<String>,
    /// Whether it is suspended.
    pub suspended: bool,
    /// Segments of the merged index.
    pub segments: u64,
    /// Memory of the merged index.
    pub index_bytes: u64,
    /// Bottom first.
    pub layers: Vec<LayerEntry>,
    /// What all that is read is checked against, if it is.
    pub verity: Option<VerityEntry>,
    /// Where writes go.
    pub cow: Option<CowEntry>,
    /// Generations below, newest first: what was written before, and is in no layer of the stack.
    pub frozen: Vec<CowEntry>,
}

/// A layer of a running stack.
#[derive(Debug, Serialize)]
pub struct LayerEntry {
    /// File or block device.
    #[serde(serialize_with = "text")]
    pub path: PathBuf,
    /// Size of the blob.
    pub stored_bytes: u64,
    /// Bytes of the device that come from this layer.
    pub owned_bytes: u64,
    /// Compression and errors, if the layer is compressed.
    pub zfile: Option<ZfileEntry>,
    /// How far it is, if it is still being fetched.
    pub fetch: Option<FetchEntry>,
}

/// A layer that is still being fetched.
#[derive(Debug, Serialize)]
pub struct FetchEntry {
    /// Bytes that are here, as its process said last.
    pub local_bytes: u64,
    /// `fetching`, `elsewhere` (another process fetches it), `unstored` (the disk is full), `damaged`, or `waiting`: there is no
    /// process, and who reads what is missing waits.
    pub state: String,
    /// What failed last.
    pub error: Option<String>,
}

/// A compressed layer.
#[derive(Debug, Serialize)]
pub struct ZfileEntry {
    /// `lz4` or `zstd`.
    pub algorithm: String,
    /// Blocks that had a wrong CRC.
    pub crc_errors: u64,
    /// Blocks that did not decompress.
    pub decode_errors: u64,
    /// Reads of the device below that failed.
    pub read_errors: u64,
}

/// dm-verity over a stack.
#[derive(Debug, Serialize)]
pub struct VerityEntry {
    /// The root hash and the bytes of the image, as `ovbd up --verity` takes them.
    pub root: String,
    /// `verified`, or `corrupted` once a block was not what was sealed.
    pub state: String,
    /// Whether the kernel has checked a signature of the root hash.
    pub signed: bool,
}

/// The COW store of a writable stack.
#[derive(Debug, Serialize)]
pub struct CowEntry {
    /// File or block device.
    #[serde(serialize_with = "text")]
    pub path: PathBuf,
    /// `valid`, or what dm-snapshot says about one that lost writes.
    pub state: String,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Size.
    pub bytes: u64,
}

/// A path as text, also where it is no UTF-8.
fn text<S: Serializer>(path: &Path, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_string_lossy())
}

impl List {
    /// Looks at all stacks.
    ///
    /// # Errors
    ///
    /// Those of the ioctls.
    pub fn new() -> Result<Self> {
        check_root()?;
        let Some(control) = mapped::open_existing()? else {
            return Ok(Self(Vec::new()));
        };
        let stacks = Running::all(&control)?;
        if stacks.is_empty() {
            return Ok(Self(Vec::new()));
        }
        // To ask all loop devices takes longer than everything else here.
        let is_open = |stack: &Running| stack.top().is_some_and(|device| device.opens > 0);
        let storage = match stacks.iter().any(is_open) {
            true => Storage::look()?,
            false => Storage::default(),
        };
        let entries = stacks.iter().map(|stack| entry(stack, &control, &storage));
        let entries: Result<_> = entries.collect();
        entries.map(Self)
    }

    /// The stack of a name.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.name == name)
    }
}

fn entry(stack: &Running, control: &Control, storage: &Storage) -> Result<Entry> {
    let mut status: HashMap<Number, Target> = HashMap::new();
    for (_, device) in &stack.devices {
        // A dm-linear says nothing.
        if device.target().is_some_and(|table| table.kind == "linear") {
            continue;
        }
        let target = device.status(control)?.into_iter().next();
        status.extend(target.map(|target| (device.number, target)));
    }
    let top = stack.top();
    let overlaybd = stack.stack().and_then(|device| status.get(&device.number));
    let number = |position| overlaybd.and_then(|status| status.number(position));
    let fetch = |layer: &RunningLayer, number| fetch(stack, layer, number);
    let layer = |(position, layer): (usize, RunningLayer)| LayerEntry {
        fetch: fetch(&layer, position),
        path: layer.path,
        stored_bytes: layer.stored_bytes,
        owned_bytes: number(4 + position).unwrap_or(0) * SECTOR_BYTES,
        zfile: layer.zfile.and_then(|number| zfile(status.get(&number)?)),
    };
    // What is not understood is none of them.
    let chain = Chain::of(stack).ok();
    let frozen = chain.iter().flat_map(|chain| chain.frozen());
    let frozen =
        frozen.filter_map(|one| cow(one.device.target()?, status.get(&one.device.number)?));
    Ok(Entry {
        name: stack.name.clone(),
        device: top.map(|device| device.node()),
        uuid: top.map_or_else(String::new, |device| device.uuid.clone()),
        bytes: top.map_or(0, |device| device.sectors() * SECTOR_BYTES),
        used: match top {
            Some(device) => used(device, storage)?,
            None => None,
        },
        suspended: top.is_some_and(|device| device.suspended),
        segments: number(1).unwrap_or(0),
        index_bytes: number(3).unwrap_or(0),
        layers: stack.layers().into_iter().enumerate().map(layer).collect(),
        verity: stack
            .verity()
            .and_then(|device| verity(device.target()?, status.get(&device.number)?)),
        cow: stack
            .snapshot()
            .and_then(|device| cow(device.target()?, status.get(&device.number)?)),
        frozen: frozen.collect(),
    })
}

/// Who uses a device. Mounts, swap and devices made of it have it open.
fn used(device: &Mapped, storage: &Storage) -> Result<Option<String>> {
    if device.opens == 0 {
        return Ok(None);
    }
    let why = why_in_use(device.number, &[], storage)?;
    Ok(why.or_else(|| Some("open in a program".to_owned())))
}

/// How far layer `number` is, if it is on a ublk device.
fn fetch(stack: &Running, layer: &RunningLayer, number: usize) -> Option<FetchEntry> {
    let fetched = stack.fetched();
    let fetched = fetched.iter().find(|fetched| fetched.layer == number)?;
    let is_served = matches!(fetched.device.server(), Ok(Server::Process(_)));
    let status = Status::read(&stack.name);
    let status = status.and_then(|status| status.layers.get(number).cloned());
    let status = status.filter(|status| status.size >= layer.stored_bytes);
    Some(FetchEntry {
        local_bytes: status.as_ref().map_or(0, |status| status.local),
        error: status.as_ref().and_then(|status| status.error.clone()),
        state: match status {
            Some(status) if is_served => status.state,
            None if is_served => "fetching".to_owned(),
            _ => "waiting".to_owned(),
        },
    })
}

fn zfile(status: &Target) -> Option<ZfileEntry> {
    Some(ZfileEntry {
        algorithm: status.words.first()?.clone(),
        crc_errors: status.number(6)?,
        decode_errors: status.number(7)?,
        read_errors: status.number(8)?,
    })
}

/// The words are those of Documentation/admin-guide/device-mapper/verity.rst.
fn verity(table: &Target, status: &Target) -> Option<VerityEntry> {
    let bytes = table.number(3)?.checked_mul(table.number(5)?)?;
    Some(VerityEntry {
        root: format!("{}:{bytes}", table.words.get(8)?),
        state: match status.words.first()?.as_str() {
            "V" => "verified".to_owned(),
            "C" => "corrupted".to_owned(),
            other => other.to_lowercase(),
        },
        signed: table.words.iter().any(|word| word == verity::KEY_OPTION),
    })
}

fn cow(table: &Target, status: &Target) -> Option<CowEntry> {
    let device = table.device(1)?;
    // "<used>/<all sectors> <sectors of metadata>", or words such as "Invalid".
    let usage = status.words.first().and_then(|word| word.split_once('/'));
    let sectors = |text: &str| text.parse::<u64>().unwrap_or(0) * SECTOR_BYTES;
    Some(CowEntry {
        path: backing_file(device).unwrap_or_else(|| device_name(device).into()),
        state: match usage {
            Some(_) => "valid".to_owned(),
            None => status.words.join(" ").to_lowercase(),
        },
        used_bytes: usage.map_or(0, |(used, _)| sectors(used)),
        bytes: usage.map_or(0, |(_, all)| sectors(all)),
    })
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|entry| write!(f, "{entry}"))
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (&self.device, self.suspended, &self.used) {
            (None, ..) => "incomplete",
            (_, true, _) => "suspended",
            (_, _, Some(used)) => used,
            _ => "not in use",
        };
        let (bytes, index) = (size(self.bytes), size(self.index_bytes));
        writeln!(
            f,
            "{}: {bytes}, {} segments in {index}, {state}",
            self.name, self.segments
        )?;
        for (number, layer) in self.layers.iter().enumerate() {
            let mut how = "lsmt".to_owned();
            if let Some(zfile) = &layer.zfile {
                let errors = zfile.crc_errors + zfile.decode_errors + zfile.read_errors;
                how.clone_from(&zfile.algorithm);
                if errors > 0 {
                    write!(how, ", {errors} errors")?;
                }
            }
            let (stored, owned) = (size(layer.stored_bytes), size(layer.owned_bytes));
            let path = layer.path.display();
            writeln!(
                f,
                "  layer {number}: {stored} ({how}), holds {owned}: {path}"
            )?;
            if let Some(fetch) = &layer.fetch {
                let local = size(fetch.local_bytes);
                write!(f, "    {}: {local} here", fetch.state)?;
                match &fetch.error {
                    Some(error) => writeln!(f, ", {error}")?,
                    None => writeln!(f)?,
                }
            }
        }
        if let Some(verity) = &self.verity {
            let signed = if verity.signed { ", signed" } else { "" };
            writeln!(f, "  {}{signed}: {}", verity.state, verity.root)?;
        }
        if let Some(cow) = &self.cow {
            let (used, bytes) = (size(cow.used_bytes), size(cow.bytes));
            let path = cow.path.display();
            match cow.state.as_str() {
                "valid" => writeln!(f, "  writes: {used} of {bytes}: {path}")?,
                state => writeln!(f, "  writes: {state}: {path}")?,
            }
        }
        for one in &self.frozen {
            let (used, path) = (size(one.used_bytes), one.path.display());
            writeln!(f, "  frozen: {used}, {}: {path}", one.state)?;
        }
        Ok(())
    }
}
