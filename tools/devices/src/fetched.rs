// SPDX-License-Identifier: GPL-2.0

//! Stacks whose layers are still being fetched: NAME-blob<n> is dm-linear over a part of a ublk device that a process serves.
//! When all of a layer is there, its devices get the tables of a layer in a file.
//!
//! The tables say which layers are on which device. What the process says of itself is in `/run/ovbd/NAME.fetch`, for who
//! looks only: nothing depends on it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_kernel::Number;
use ovbd_ublk::Device as Ublk;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::{
    layer_place::{blob_table, line, lone_layer_steps, LayerPlace},
    lock::{self, Lock},
    loops, mapped,
    plan::{self, Device, Step, Word},
    running::{Role, Running},
    storage::Storage,
    users::{block_number, device_name},
    Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    layer::LayerPath,
    report::Report,
    sysfs::holders,
};

/// What a process says about the layers that it fetches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its number.
    pub process: u32,
    /// All layers of the image, bottom first.
    pub layers: Vec<LayerStatus>,
}

/// A layer that is being fetched. Sizes are in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerStatus {
    /// The file that it will be.
    pub path: PathBuf,
    /// Its size.
    pub size: u64,
    /// What of it is here.
    pub local: u64,
    /// `local`, `fetching`, `elsewhere`, `unstored` or `damaged`.
    pub state: String,
    /// What failed last.
    pub error: Option<String>,
}

impl Status {
    fn path(name: &str) -> PathBuf {
        Path::new(lock::FOLDER).join(format!("{name}.fetch"))
    }

    /// What the process of the stack `name` said last, if there is one.
    pub fn read(name: &str) -> Option<Self> {
        serde_json::from_slice(&fs::read(Self::path(name)).ok()?).ok()
    }

    /// Says it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn write(&self, name: &str) -> Result<()> {
        let path = Self::path(name);
        lock::make_folder(Path::new(lock::FOLDER))?;
        let fail = |e| Error::io(&path, "write", e);
        let text = serde_json::to_vec(self).map_err(|e| fail(e.into()))?;
        let new = path.with_extension("fetch.new");
        fs::write(&new, text).map_err(fail)?;
        fs::rename(&new, &path).map_err(fail)
    }

    /// Says nothing any more.
    pub fn forget(name: &str) {
        let _ = fs::remove_file(Self::path(name));
    }
}

/// The ublk device of a number.
fn ublk(number: Number) -> Option<Ublk> {
    let name = device_name(number);
    let digits = name.strip_prefix("/dev/ublkb")?;
    digits.parse().ok().map(Ublk)
}

/// A layer that is on a ublk device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Its number.
    pub layer: usize,
    /// The device.
    pub device: Ublk,
    /// Byte of the device at which the mapped blob begins.
    pub start: u64,
}

impl Running {
    /// Whether the table of one of its devices names a device.
    fn names(&self, number: Number) -> bool {
        let mut targets = self.devices.iter().flat_map(|(_, device)| &device.table);
        targets
            .any(|target| (0..target.words.len()).any(|word| target.device(word) == Some(number)))
    }

    /// The layers that are still being fetched.
    pub fn fetched(&self) -> Vec<Fetched> {
        let devices = self.devices.iter();
        devices
            .filter_map(|(role, device)| {
                let Role::Blob(layer) = *role else {
                    return None;
                };
                let target = device.target().filter(|target| target.kind == "linear")?;
                Some(Fetched {
                    layer,
                    device: ublk(target.device(0)?)?,
                    start: target.number(1)?.checked_mul(SECTOR_BYTES)?,
                })
            })
            .collect()
    }
}

/// The layers of the stack `name` that are still being fetched, and whether there is such a stack at all.
///
/// # Errors
///
/// Those of the ioctls.
pub fn find(name: &str) -> Result<Option<Vec<Fetched>>> {
    let Some(control) = mapped::open_existing()? else {
        return Ok(None);
    };
    let stacks = Running::of(&control, &mapped::list(&control)?, |found| found == name)?;
    Ok(stacks.first().map(Running::fetched))
}

/// Has layer `layer` of the stack `name`, all of which is in `file` by now, read from there, by the tables that [`crate::up`]
/// would have made. Nothing above is suspended or touched; reads that are under way are completed first.
///
/// What is not compressed is mapped by the stack itself, which is left alone here: see [`complete`].
///
/// # Errors
///
/// The system's. The layer is then where it was.
pub fn hand_over(
    name: &str,
    layer: usize,
    file: &Path,
    interrupt: &Interrupt,
    report: &dyn Report,
) -> Result<()> {
    let control = mapped::open()?;
    let _lock = Lock::take(name, interrupt, report)?;
    let stack = Running::find(&control, name)?;
    let mut fetched = stack.fetched().into_iter();
    let is_there = fetched.any(|fetched| fetched.layer == layer);
    let Some(blob) = stack.device(Role::Blob(layer)).filter(|_| is_there) else {
        // By somebody else, or taken down and brought up again.
        return Ok(());
    };
    loops::prepare()?;
    let place = LayerPlace::open(&LayerPath::Sealed(file.to_owned()))?;
    let mut steps = file_steps(name, layer, &place);
    // The first device over the file is one that there is.
    let at = steps
        .iter()
        .position(|step| matches!(step, Step::Map { .. }));
    let (device, table) = match at.map(|at| steps.split_off(at).swap_remove(0)) {
        Some(Step::Map { uuid, table, .. }) => {
            let mut devices = stack.devices.iter().map(|(_, device)| device);
            let device = devices.find(|device| device.uuid == uuid);
            (device.ok_or_else(|| strange(file))?, table)
        }
        _ => {
            let sectors = place.bytes.div_ceil(SECTOR_BYTES);
            let variable = Device::Loop(format!("layer{layer}"));
            (blob, blob_table(&variable, sectors, None))
        }
    };
    let sectors: u64 = table.iter().map(|line| line.sectors).sum();
    if sectors != device.sectors() {
        return Err(strange(file));
    }
    steps.push(Step::Reload {
        name: device.name.clone(),
        uuid: device.uuid.clone(),
        table,
    });
    // What was begun is completed.
    plan::run(&control, &steps, &Interrupt::default(), report, || Ok(()))?;
    match device.uuid == blob.uuid {
        true => Ok(()),
        false => mapped::remove(&control, [blob]),
    }
}

/// Has the stack `name` map its layers that are not compressed from their files, `layers`, where [`hand_over`] has left
/// a device between. The stack is suspended for a moment; what is above is not touched.
///
/// # Errors
///
/// The system's. All goes on as it was.
pub fn complete(
    name: &str,
    layers: &[(usize, PathBuf)],
    interrupt: &Interrupt,
    report: &dyn Report,
) -> Result<()> {
    let control = mapped::open()?;
    let _lock = Lock::take(name, interrupt, report)?;
    let running = Running::find(&control, name)?;
    let Some((stack, table)) = running
        .stack()
        .and_then(|stack| Some((stack, stack.target()?)))
    else {
        return Ok(());
    };
    let mut words = vec![Word::from(table.kind.as_str())];
    words.extend(table.words.iter().map(|word| Word::from(word.as_str())));
    let (mut steps, mut blobs) = (Vec::new(), Vec::new());
    for (layer, file) in layers {
        let Some(blob) = running.device(Role::Blob(*layer)) else {
            continue;
        };
        if !running.names(blob.number) {
            // Who did this before was killed when the stack had its new table.
            blobs.push(blob);
            continue;
        }
        let place = LayerPlace::open(&LayerPath::Sealed(file.clone()))?;
        // The place of its device in the parameters, after the number of layers.
        let at = 1 + 2 * layer;
        if table.device(at) != Some(blob.number) {
            continue;
        }
        let own = file_steps(name, *layer, &place);
        if own.iter().any(|step| matches!(step, Step::Map { .. })) {
            continue;
        }
        steps.extend(own);
        words[1 + at] = Device::Loop(format!("layer{layer}")).into();
        blobs.push(blob);
    }
    if steps.is_empty() {
        return mapped::remove(&control, blobs);
    }
    steps.push(Step::Reload {
        name: stack.name.clone(),
        uuid: stack.uuid.clone(),
        table: vec![line(stack.sectors(), words)],
    });
    plan::run(&control, &steps, &Interrupt::default(), report, || Ok(()))?;
    mapped::remove(&control, blobs)
}

/// The steps for a layer in a file, as in a stack of its own.
fn file_steps(name: &str, layer: usize, place: &LayerPlace) -> Vec<Step> {
    let mut steps = Vec::new();
    lone_layer_steps(name, layer, place, &mut steps);
    steps
}

fn strange(file: &Path) -> Error {
    Error::new(file, "not what was mapped while it was fetched")
}

/// Ends what a process that is gone has left undone, so that devices over it can be removed: nobody uses them, and what
/// was read ahead gets an error.
///
/// # Errors
///
/// The system's.
pub fn stop_unserved(fetched: &[Fetched]) -> Result<()> {
    for device in devices(fetched) {
        let served = matches!(device.server(), Ok(ovbd_ublk::Server::Process(_)));
        if !served {
            let stopped = device.stop();
            stopped.map_err(|e| Error::io(&device.node(), "stop", e))?;
        }
    }
    Ok(())
}

/// Removes devices over which nothing is mapped any more.
///
/// # Errors
///
/// The system's.
pub fn remove(fetched: &[Fetched]) -> Result<()> {
    for device in devices(fetched) {
        device
            .remove()
            .map_err(|e| Error::io(&device.node(), "remove", e))?;
    }
    Ok(())
}

/// Whether something is mapped over a ublk device. Where that cannot be told, it is taken to be so.
pub fn is_mapped(device: Ublk) -> bool {
    let over = block_number(&device.node()).map(holders);
    !matches!(over, Some(Ok(over)) if over.is_empty())
}

/// Removes the ublk device of the stack `name` where nothing is mapped over it and nobody has it open: somebody has removed
/// the stack by other means than [`crate::down`]. Returns whether this has removed it.
///
/// # Errors
///
/// The system's.
pub fn remove_unused(name: &str, device: Ublk, report: &dyn Report) -> Result<bool> {
    // Who takes the stack down removes the device too.
    let _lock = Lock::take(name, &Interrupt::default(), report)?;
    if is_mapped(device) {
        return Ok(false);
    }
    match device.remove() {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => Ok(false),
        Err(error) => Err(Error::io(&device.node(), "remove", error)),
        Ok(()) => Ok(true),
    }
}

/// By what the ublk device of the stack `name` is known, also where nothing is mapped over it: FNV-1a of the name.
pub fn owner(name: &str) -> u64 {
    let text = format!("ovbd {name}");
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Removes devices that a process which was killed has left behind: they were made for the stack `name`, nobody serves
/// them, and nothing is mapped over them.
///
/// # Errors
///
/// The system's; somebody has one open.
pub fn remove_left(name: &str) -> Result<()> {
    // Without ublk there is none.
    let left = Ublk::of(owner(name)).unwrap_or_default();
    let used = devices(&find(name)?.unwrap_or_default());
    for device in left.into_iter().filter(|device| !used.contains(device)) {
        if let Ok(ovbd_ublk::Server::Gone) = device.server() {
            tracing::debug!(device = %device.node().display(), "left behind");
            let removed = device.remove();
            removed.map_err(|e| Error::io(&device.node(), "remove", e))?;
        }
    }
    Ok(())
}

/// Whether the layers of the stack `name` are read from exactly these files.
///
/// # Errors
///
/// Those of the ioctls, and of asking loop devices.
pub fn is_made_of(name: &str, files: &[PathBuf]) -> Result<bool> {
    let found = Running::find(&mapped::open()?, name)?.layer_files()?;
    Ok(found == files)
}

/// Refuses a folder on the stack `name` itself for what is fetched: what is missing of the stack would be waited for by the
/// process that fetches it. Where a folder does not tell on what it is, it is let be: readers wait.
///
/// # Errors
///
/// That one; those of the ioctls, and of asking the system what is mounted.
pub fn check_elsewhere(name: &str, folder: &Path) -> Result<()> {
    let stack = Running::find(&mapped::open()?, name)?;
    match Storage::look()?.below_path(folder) {
        Ok(below) if stack.numbers().any(|number| below.contains(&number)) => {
            let what = format!(
                "on {}, which is fetched into it: it would wait for itself (--store DIR that is elsewhere)",
                mapped::node(name).display()
            );
            Err(Error::new(folder, what))
        }
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::warn!(%error, "cannot tell whether what is fetched is kept elsewhere");
            Ok(())
        }
    }
}

fn devices(fetched: &[Fetched]) -> Vec<Ublk> {
    let mut devices: Vec<Ublk> = fetched.iter().map(|fetched| fetched.device).collect();
    devices.dedup();
    devices
}

/// What is wrong with taking `stack` for something that needs all of its layers in files.
///
/// # Errors
///
/// That one.
pub fn check_none(stack: &Running) -> Result<()> {
    match stack.fetched().first() {
        None => Ok(()),
        Some(fetched) => {
            let what = format!("its layer {} is still being fetched", fetched.layer);
            Err(Error::new(&mapped::node(&stack.name), what))
        }
    }
}
