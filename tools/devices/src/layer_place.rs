// SPDX-License-Identifier: GPL-2.0

//! Where a layer's blob is, and the steps that make a device of it. [`crate::up`] says how.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::{Trailer, SECTOR_BYTES};
use ovbd_kernel::{loops::Part, Number};
use rustix::fs::OFlags;

use crate::{
    direct_io,
    plan::{Device, Line, Step, Tail, Word},
    running::Role,
    storage::Storage,
};
use ovbd_layers::{
    blob::{Blob, Content},
    error::{Error, Result},
    file_id::FileId,
    joined::Joined,
    layer::{read_header, read_trailer, LayerPath},
    parents::Ancestry,
    zfile::Cursor,
};

/// What a layer is and where its blob is.
pub struct LayerPlace {
    /// Its file or block device.
    pub path: PathBuf,
    /// The file that was opened under this name.
    pub file: FileId,
    /// Whether it is on a block device that dm-linear can start at any sector of.
    is_device: bool,
    /// Bytes of the blocks of the loop device.
    block_bytes: u32,
    file_bytes: u64,
    /// First byte of the blob in the file.
    start: u64,
    /// Bytes of the blob.
    pub bytes: u64,
    /// Bytes of the uncompressed blob, if it is compressed.
    pub original_bytes: Option<u64>,
    /// Its end, which has its UUIDs and size.
    pub trailer: Trailer,
    /// Whether it is to have a mapped device of its own whatever it is on.
    is_part: bool,
    /// What it is besides, if its data is in several files.
    joined: Option<JoinedPlace>,
}

/// Where the parts of a layer are whose data is in several files.
struct JoinedPlace {
    /// What comes first, whole sectors.
    front: Vec<u8>,
    /// Sectors of the blob that are part of it.
    head_sectors: u64,
    targets: Vec<TargetPlace>,
    /// What follows them: a last partial sector, index and trailer.
    rest: Vec<u8>,
}

/// Where a target is.
struct TargetPlace {
    /// A name that opens it here.
    path: PathBuf,
    /// What the user calls it.
    named: PathBuf,
    /// The file that was opened.
    file: FileId,
    /// Whether that is a block device.
    is_device: bool,
    /// Its whole sectors.
    sectors: u64,
}

impl JoinedPlace {
    fn new(joined: &Joined) -> Result<Self> {
        let mut targets = Vec::new();
        let mut at = joined.own_bytes();
        for part in joined.targets() {
            let named = part.target.path().to_owned();
            let found = part.target.file()?.file().metadata();
            let found = found.map_err(|e| Error::io(&named, "look up", e))?;
            at += part.whole_sectors() * SECTOR_BYTES;
            targets.push(TargetPlace {
                path: part.target.name()?,
                named,
                file: FileId::of(&found),
                is_device: found.file_type().is_block_device(),
                sectors: part.whole_sectors(),
            });
        }
        // Only the last may end in a sector that is not whole.
        let mut rest = vec![0; (joined.bytes() - at) as usize];
        joined.read(&mut Cursor::default(), &mut rest, at)?;
        Ok(Self {
            front: joined.front().to_vec(),
            head_sectors: joined.head_sectors(),
            targets,
            rest,
        })
    }

    /// Sectors of it.
    fn sectors(&self) -> u64 {
        let targets: u64 = self.targets.iter().map(|target| target.sectors).sum();
        let memory = (self.front.len() + self.rest.len()) as u64;
        self.head_sectors + targets + memory / SECTOR_BYTES
    }
}

impl LayerPlace {
    /// Looks at a layer.
    ///
    /// # Errors
    ///
    /// It is none that can be mapped, and the system's.
    pub fn open(layer: &LayerPath) -> Result<Self> {
        let path = match layer {
            LayerPath::Sealed(path)
            | LayerPath::Part { path, .. }
            | LayerPath::Joined { blob: path, .. } => path,
            LayerPath::Writable { data, .. } => {
                return Err(Error::new(
                    data,
                    "a writable pair cannot be mapped, only a sealed layer",
                ))
            }
        };
        let opened = match layer {
            LayerPath::Part { path, start, bytes } => Blob::open_part(path, *start, *bytes)?,
            _ => Blob::open(path)?,
        };
        if matches!(opened.content, Content::Zfile(_)) && !opened.is_layer()? {
            return Err(Error::new(path, "a ZFile that holds no layer"));
        }
        let (trailer, joined) = match layer {
            LayerPath::Joined { targets, .. } => {
                let joined = Box::new(Joined::open(opened.content.clone(), targets)?);
                let place = JoinedPlace::new(&joined)?;
                (read_trailer(&Content::Joined(joined))?, Some(place))
            }
            _ => {
                read_header(&opened.content)?;
                (read_trailer(&opened.content)?, None)
            }
        };
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
            Content::Zfile(zfile) => Some(zfile.geometry().original_bytes()),
            _ => None,
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
            is_part: matches!(layer, LayerPath::Part { .. }),
            start: input.start(),
            bytes: input.bytes(),
            original_bytes,
            trailer,
            joined,
        })
    }

    /// Bytes of the layer on the device that [`layer_steps`] makes.
    pub fn mapped_bytes(&self) -> u64 {
        match &self.joined {
            None => self.original_bytes.unwrap_or(self.bytes),
            Some(joined) => joined.sectors() * SECTOR_BYTES,
        }
    }

    /// Whether its device holds the blob from its first byte on, and is all that it takes to map it.
    pub fn is_whole_device(&self) -> bool {
        self.is_device
            && !self.is_part
            && !self.has_tail()
            && self.start == 0
            && self.joined.is_none()
            && self.original_bytes.is_none()
    }

    /// What says whether it is on the right layer.
    pub fn ancestry(&self) -> Ancestry<'_> {
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
    pub fn block_sectors(&self) -> u64 {
        u64::from(self.block_bytes) / SECTOR_BYTES
    }

    /// Whether the last block of the blob is one that a loop device leaves out.
    pub fn has_tail(&self) -> bool {
        self.first() + self.sectors() * SECTOR_BYTES > self.file_bytes
    }

    /// The end of its file.
    pub fn tail(&self) -> Tail {
        Tail {
            path: self.path.clone(),
            block_bytes: self.block_bytes,
        }
    }

    /// Refuses a layer that somebody writes to.
    ///
    /// # Errors
    ///
    /// That one, and where it cannot be told.
    pub fn check_not_written(&self, storage: &Storage) -> Result<()> {
        check_not_written(&self.path, self.file, storage)?;
        let targets = self.joined.iter().flat_map(|joined| &joined.targets);
        targets
            .into_iter()
            .try_for_each(|target| check_not_written(&target.named, target.file, storage))
    }
}

/// Refuses the file or device at `path`, part of a layer, if somebody writes to it.
fn check_not_written(path: &Path, file: FileId, storage: &Storage) -> Result<()> {
    let fail = |what: String| Err(Error::new(path, what));
    let mut loops = storage.loops().iter();
    if let Some(user) = loops.find(|user| !user.status.read_only && user.is_on(file)) {
        return fail(format!("can be written through {}", user.node.display()));
    }
    let FileId::Device(device) = file else {
        return Ok(());
    };
    let device = Number::new(device);
    // What an overlay writes goes to another mount.
    let mounts = storage.mounts().iter();
    for mount in mounts.filter(|mount| !mount.read_only && mount.kind != "overlay") {
        let below = match storage.below_mount(mount) {
            Ok(below) => below,
            // Nobody claims the device, so that one is on another.
            Err(_) if is_unclaimed(path) => continue,
            Err(e) => return Err(e),
        };
        if below.contains(&device) {
            return fail(format!("mounted for writing on {}", mount.point.display()));
        }
    }
    Ok(())
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

/// All of a device from a sector on.
pub fn linear(device: &Device, start: u64) -> Vec<Word> {
    vec!["linear".into(), device.clone().into(), start.into()]
}

/// Variable of the loop device with the last blocks of all blobs that need it.
pub const TAILS: &str = "tails";

/// The table of a blob: `whole` sectors of `device`, and of the tails those from one on, as many as that.
pub fn blob_table(device: &Device, whole: u64, tail: Option<(u64, u64)>) -> Vec<Line> {
    let mut table = Vec::new();
    if whole > 0 {
        table.push(line(whole, linear(device, 0)));
    }
    if let Some((start, sectors)) = tail {
        let tails = Device::Loop(TAILS.to_owned());
        table.push(Line {
            start: whole,
            ..line(sectors, linear(&tails, start))
        });
    }
    table
}

/// The steps for a layer whose last block is the only one among the tails, if it is there at all; returns the device that
/// holds its uncompressed blob.
pub fn lone_layer_steps(
    name: &str,
    number: usize,
    blob: &LayerPlace,
    steps: &mut Vec<Step>,
) -> Device {
    let tail = blob.has_tail().then_some(0);
    if tail.is_some() {
        steps.push(Step::Tails {
            variable: TAILS.to_owned(),
            tails: vec![blob.tail()],
        });
    }
    layer_steps(name, number, blob, tail, steps)
}

/// The steps for one layer; returns the device that holds its uncompressed blob. `tail` is the sector at which its last
/// block is among the tails.
pub fn layer_steps(
    name: &str,
    number: usize,
    blob: &LayerPlace,
    tail: Option<u64>,
    steps: &mut Vec<Step>,
) -> Device {
    let mut device = if blob.is_device {
        Device::Path(blob.path.clone())
    } else {
        let part = Part {
            offset: blob.first(),
            bytes: (blob.sectors() - tail.map_or(0, |_| blob.block_sectors())) * SECTOR_BYTES,
            block_bytes: blob.block_bytes,
        };
        attach(format!("layer{number}"), &blob.path, part, steps)
    };
    let mut map = |role, table| map(name, role, blob, table, steps);
    if let Some(tail) = tail {
        let whole = blob.sectors() - blob.block_sectors();
        let table = blob_table(&device, whole, Some((tail, blob.block_sectors())));
        device = map(Role::Blob(number), table);
    } else if blob.is_device && (blob.start > 0 || blob.is_part) {
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
    match &blob.joined {
        None => device,
        Some(joined) => joined_steps(name, number, blob, joined, &device, steps),
    }
}

/// The steps that put the parts of a layer together, of whose blob `head` is the device.
fn joined_steps(
    name: &str,
    number: usize,
    blob: &LayerPlace,
    joined: &JoinedPlace,
    head: &Device,
    steps: &mut Vec<Step>,
) -> Device {
    let mut memory = |variable: String, bytes: &[u8]| {
        steps.push(Step::Memory {
            variable: variable.clone(),
            bytes: bytes.to_vec(),
        });
        (Device::Loop(variable), bytes.len() as u64 / SECTOR_BYTES)
    };
    let mut parts = Vec::new();
    if !joined.front.is_empty() {
        parts.push(memory(format!("header{number}"), &joined.front));
    }
    let rest = memory(format!("index{number}"), &joined.rest);
    parts.push((head.clone(), joined.head_sectors));
    for (at, target) in joined.targets.iter().enumerate() {
        let device = if target.is_device {
            Device::Path(target.path.clone())
        } else {
            let part = Part {
                offset: 0,
                bytes: target.sectors * SECTOR_BYTES,
                block_bytes: SECTOR_BYTES as u32,
            };
            let variable = match at {
                0 => format!("target{number}"),
                at => format!("target{number}_{at}"),
            };
            attach(variable, &target.path, part, steps)
        };
        parts.push((device, target.sectors));
    }
    parts.push(rest);
    let mut table = Vec::new();
    let mut start = 0;
    for (device, sectors) in &parts {
        if *sectors > 0 {
            table.push(Line {
                start,
                ..line(*sectors, linear(device, 0))
            });
        }
        start += sectors;
    }
    map(name, Role::Turbo(number), blob, table, steps)
}

/// The step that attaches a file; returns its device.
fn attach(variable: String, path: &Path, part: Part, steps: &mut Vec<Step>) -> Device {
    steps.push(Step::Layer {
        variable: variable.clone(),
        path: path.to_owned(),
        part,
    });
    Device::Loop(variable)
}

/// The step that makes a device of a layer which is only part of another one; returns it.
fn map(
    name: &str,
    role: Role,
    blob: &LayerPlace,
    table: Vec<Line>,
    steps: &mut Vec<Step>,
) -> Device {
    let device = role.device_name(name);
    steps.push(Step::Map {
        name: device.clone(),
        uuid: role.device_uuid(name, blob.trailer.uuid),
        read_only: true,
        table,
    });
    Device::Mapped(device)
}

/// A line that starts a table.
pub fn line(sectors: u64, words: Vec<Word>) -> Line {
    Line {
        start: 0,
        sectors,
        words,
    }
}
