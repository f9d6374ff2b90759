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
    layer::{read_header, read_trailer, LayerPath},
    parents::Ancestry,
    turbo::Turbo,
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
    /// What it is besides, if it is a TurboOCI layer.
    turbo: Option<TurboPlace>,
}

/// Where the parts of a TurboOCI layer are.
struct TurboPlace {
    /// Sectors of the blob that are part of it.
    head_sectors: u64,
    /// The target, by a name that opens it here.
    target: PathBuf,
    /// What the user calls it.
    named: PathBuf,
    /// The file that was opened.
    file: FileId,
    /// Whether that is a block device.
    is_device: bool,
    /// Its whole sectors.
    target_sectors: u64,
    /// What follows them: a last partial sector, index and trailer.
    rest: Vec<u8>,
}

impl TurboPlace {
    fn new(turbo: &Turbo) -> Result<Self> {
        let tar = turbo.target().file()?;
        let named = turbo.target().path().to_owned();
        let found = tar.file().metadata();
        let found = found.map_err(|e| Error::io(&named, "look up", e))?;
        let whole = tar.bytes() / SECTOR_BYTES;
        let at = turbo.head_bytes() + whole * SECTOR_BYTES;
        let mut rest = vec![0; (turbo.bytes() - at) as usize];
        turbo.read(&mut Cursor::default(), &mut rest, at)?;
        Ok(Self {
            head_sectors: turbo.head_bytes() / SECTOR_BYTES,
            target: turbo.target().name()?,
            named,
            file: FileId::of(&found),
            is_device: found.file_type().is_block_device(),
            target_sectors: whole,
            rest,
        })
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
            LayerPath::Sealed(path) | LayerPath::Turbo { blob: path, .. } => path,
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
        let (trailer, turbo) = match layer {
            LayerPath::Turbo { target, .. } => {
                let turbo = Box::new(Turbo::new(opened.content.clone(), target.clone())?);
                let place = TurboPlace::new(&turbo)?;
                (read_trailer(&Content::Turbo(turbo))?, Some(place))
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
            start: input.start(),
            bytes: input.bytes(),
            original_bytes,
            trailer,
            turbo,
        })
    }

    /// Bytes of the layer on the device that [`layer_steps`] makes.
    pub fn mapped_bytes(&self) -> u64 {
        match &self.turbo {
            None => self.original_bytes.unwrap_or(self.bytes),
            Some(turbo) => {
                let sectors = turbo.head_sectors + turbo.target_sectors;
                sectors * SECTOR_BYTES + turbo.rest.len() as u64
            }
        }
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
        match &self.turbo {
            None => Ok(()),
            Some(turbo) => check_not_written(&turbo.named, turbo.file, storage),
        }
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
    match &blob.turbo {
        None => device,
        Some(turbo) => turbo_steps(name, number, blob, turbo, &device, steps),
    }
}

/// The steps that put `head`, the device of the blob of a TurboOCI layer, its target, and an index for both together.
fn turbo_steps(
    name: &str,
    number: usize,
    blob: &LayerPlace,
    turbo: &TurboPlace,
    head: &Device,
    steps: &mut Vec<Step>,
) -> Device {
    let target = if turbo.is_device {
        Device::Path(turbo.target.clone())
    } else {
        let part = Part {
            offset: 0,
            bytes: turbo.target_sectors * SECTOR_BYTES,
            block_bytes: SECTOR_BYTES as u32,
        };
        attach(format!("target{number}"), &turbo.target, part, steps)
    };
    let variable = format!("index{number}");
    steps.push(Step::Memory {
        variable: variable.clone(),
        bytes: turbo.rest.clone(),
    });
    let rest = turbo.rest.len() as u64 / SECTOR_BYTES;
    let mut table = Vec::new();
    let mut start = 0;
    for (device, sectors) in [
        (head, turbo.head_sectors),
        (&target, turbo.target_sectors),
        (&Device::Loop(variable), rest),
    ] {
        if sectors > 0 {
            table.push(Line {
                start,
                ..line(sectors, linear(device, 0))
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
        hidden: true,
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
