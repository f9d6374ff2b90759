// SPDX-License-Identifier: GPL-2.0

//! The metadata of a thin pool: its state, and a metadata snapshot of it for as long as it is read.
//!
//! The kernel has one metadata snapshot per pool. It outlives the program that asked for it, so ours is noted first
//! ([`crate::undo`]) and held only while a program of thin-provisioning-tools runs. Who else holds one is waited for.

use std::{
    fs::File,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use ovbd_devices::{
    lock::{self, FOLDER},
    Interrupt,
};
use ovbd_kernel::dm::{self, Control, Id};
use ovbd_layers::{
    block_device::block_number,
    error::{Error, Result},
    report::Report,
};

use crate::{
    undo::{Action, Undo},
    Name, Volume,
};

/// How long another program's metadata snapshot is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// The lock of thin-send-recv, which holds metadata snapshots as we do.
const NEIGHBOUR_LOCK: &str = "/var/run/thin-send-recv.lock";

/// What `dmsetup status` says of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Block of the metadata snapshot, if there is one.
    pub held_root: Option<u64>,
    /// `rw`, `ro` or `out_of_data_space`.
    pub mode: String,
    /// Whether `thin_check` must be run before metadata can change.
    pub needs_check: bool,
    /// Used and all blocks of data.
    pub data: (u64, u64),
    /// Used and all blocks of metadata.
    pub metadata: (u64, u64),
    /// Whether writes wait where the pool is full.
    pub queues_when_full: bool,
}

impl Status {
    /// Reads what device-mapper says of a target.
    fn parse(kind: &str, text: &str) -> std::result::Result<Self, String> {
        if kind != "thin-pool" {
            return Err("not a thin pool".to_owned());
        }
        let rest: Vec<&str> = text.split_whitespace().collect();
        let [_transaction, metadata, data, root, mode, more @ ..] = rest.as_slice() else {
            // "Fail" or "Error" alone.
            return Err(format!("the pool is in the state \"{}\"", rest.join(" ")));
        };
        let pair = |text: &str| {
            let (used, all) = text.split_once('/')?;
            Some((used.parse().ok()?, all.parse().ok()?))
        };
        let unknown = || format!("an unknown status: {text}");
        Ok(Self {
            held_root: match *root {
                "-" => None,
                root => Some(root.parse().map_err(|_| unknown())?),
            },
            mode: (*mode).to_owned(),
            needs_check: more.contains(&"needs_check"),
            data: pair(data).ok_or_else(unknown)?,
            metadata: pair(metadata).ok_or_else(unknown)?,
            queues_when_full: more.contains(&"queue_if_no_space"),
        })
    }
}

/// The status of a pool by its name for device-mapper; `None` if it is not active.
///
/// # Errors
///
/// It failed, or is something else.
pub fn status(device: &str) -> Result<Option<Status>> {
    let node = dm::node(device);
    let Some(number) = block_number(&node) else {
        return Ok(None);
    };
    let lines = control(&node)?.status(Id::Number(number));
    let lines = lines.map_err(|e| Error::io(&node, "ask for the status", e))?;
    let Some(lines) = lines else {
        return Ok(None);
    };
    let line = lines.first();
    let (kind, text) = line.map_or(("", ""), |line| (line.kind.as_str(), line.text.as_str()));
    Status::parse(kind, text)
        .map(Some)
        .map_err(|what| Error::new(&node, what))
}

/// Sends a message to a pool.
///
/// # Errors
///
/// The kernel's.
pub fn message(device: &str, text: &str) -> Result<()> {
    let node = dm::node(device);
    let Some(number) = block_number(&node) else {
        return Err(Error::new(&node, "the pool is not active"));
    };
    control(&node)?
        .message(Id::Number(number), text)
        .map_err(|e| Error::io(&node, text, e))
}

fn control(node: &Path) -> Result<Control> {
    Control::open().map_err(|e| Error::io(node, "open device-mapper", e))
}

/// The name of the pool's device that takes messages.
pub fn target(pool: &Volume) -> String {
    pool.part("-tpool")
}

/// Refuses a pool of which nothing can be read as it is now. It is active.
///
/// # Errors
///
/// Why not.
pub fn check(pool: &Volume) -> Result<Status> {
    let Some(status) = status(&target(pool))? else {
        return Err(pool.name.error("the pool is not active"));
    };
    let why = match status.mode.as_str() {
        "rw" | "out_of_data_space" if status.needs_check => Some("its metadata needs a check"),
        "rw" | "out_of_data_space" => None,
        _ if status.needs_check => Some("it is read-only, and its metadata needs a check"),
        _ => Some("it is read-only"),
    };
    match why {
        None => Ok(status),
        Some(why) => Err(pool.name.error(format!(
            "{why}: no metadata snapshot can be taken (lvconvert --repair {} mends it)",
            pool.name
        ))),
    }
}

/// One process at a time has a metadata snapshot of a pool.
struct Reading(#[allow(dead_code)] Vec<File>);

impl Reading {
    fn wait(pool: &Volume, interrupt: &Interrupt, report: &dyn Report) -> Result<Self> {
        let folder = Path::new(FOLDER);
        lock::make_folder(folder)?;
        let own = folder.join(format!("pool-{}.lock", pool.uuid));
        let file = lock::open_file(&own)?;
        wait_for(&file, &own, &pool.name, interrupt, report)?;
        let mut files = vec![file];
        let other = Path::new(NEIGHBOUR_LOCK);
        if let Ok(file) = File::open(other) {
            wait_for(&file, other, &pool.name, interrupt, report)?;
            files.push(file);
        }
        Ok(Self(files))
    }
}

/// The right to make the volume of a name, until this is dropped.
#[derive(Debug)]
pub struct Turn(#[allow(dead_code)] File);

impl Turn {
    /// Waits until no other process makes a volume of that name.
    ///
    /// # Errors
    ///
    /// An interrupt, and the system's.
    pub fn wait(name: &Name, interrupt: &Interrupt, report: &dyn Report) -> Result<Self> {
        let folder = Path::new(FOLDER);
        lock::make_folder(folder)?;
        let path = folder.join(format!("volume-{}-{}.lock", name.vg, name.lv));
        let file = lock::open_file(&path)?;
        wait_for(&file, &path, name, interrupt, report)?;
        Ok(Self(file))
    }
}

/// Waits for the lock of a file, of which `subject` is in want.
fn wait_for(
    file: &File,
    path: &Path,
    subject: &Name,
    interrupt: &Interrupt,
    report: &dyn Report,
) -> Result<()> {
    lock::wait_for(file, path, interrupt, report, || {
        let what = format!("waiting for another process ({} is locked)", path.display());
        subject.error(what)
    })
}

/// Takes a metadata snapshot of a pool, which must be active, lets `read` read it from the device with the metadata, and
/// releases it.
///
/// # Errors
///
/// Another program's metadata snapshot that stays, those of the kernel and of `read`.
pub fn with_metadata<T>(
    pool: &Volume,
    undo: &Undo,
    interrupt: &Interrupt,
    report: &dyn Report,
    patience: Duration,
    read: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    let _turn = Reading::wait(pool, interrupt, report)?;
    let device = target(pool);
    wait_for_others(pool, &device, interrupt, report, patience)?;
    let noted = Action::Reserved {
        device: device.clone(),
        root: None,
    };
    let number = undo.note(noted)?;
    if let Err(e) = message(&device, "reserve_metadata_snap") {
        undo.forget(number);
        return Err(e);
    }
    let reserved = Reserved {
        device: &device,
        undo,
        number,
    };
    let root = status(&device)?.and_then(|status| status.held_root);
    let noted = Action::Reserved {
        device: device.clone(),
        root,
    };
    undo.change(number, noted)?;
    let node = Path::new("/dev/mapper").join(pool.part("_tmeta"));
    let result = read(&node);
    reserved.release()?;
    result
}

/// Whether the metadata snapshot in block `held` is still there after some time.
///
/// # Errors
///
/// As [`status`].
pub(crate) fn stays(device: &str, held: u64, time: Duration) -> Result<bool> {
    let start = Instant::now();
    while status(device)?.is_some_and(|status| status.held_root == Some(held)) {
        if start.elapsed() >= time {
            return Ok(true);
        }
        thread::sleep(PAUSE);
    }
    Ok(false)
}

/// Releases the metadata snapshot however this ends.
struct Reserved<'a> {
    device: &'a str,
    undo: &'a Undo,
    number: u64,
}

impl Reserved<'_> {
    fn release(self) -> Result<()> {
        // What is dropped does it.
        message(self.device, "release_metadata_snap")?;
        self.undo.forget(self.number);
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        // Where it fails the note stays, and the next process tries again.
        if message(self.device, "release_metadata_snap").is_ok() {
            self.undo.forget(self.number);
        }
    }
}

fn wait_for_others(
    pool: &Volume,
    device: &str,
    interrupt: &Interrupt,
    report: &dyn Report,
    patience: Duration,
) -> Result<()> {
    let start = Instant::now();
    let mut said = false;
    loop {
        let Some(root) = check(pool)?.held_root else {
            return Ok(());
        };
        if start.elapsed() >= patience {
            let what = format!(
                "another program holds a metadata snapshot of the pool (block {root}, field 7 of \"dmsetup status \
                 {device}\"), and has not released it within {} s (\"ovbd lvm recover --force {}\" does)",
                patience.as_secs(),
                pool.name
            );
            return Err(pool.name.error(what));
        }
        if !said {
            said = true;
            report.warn(
                &pool
                    .name
                    .error("waiting for another program's metadata snapshot"),
            );
        }
        interrupt.check(&pool.name.path())?;
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states() {
        let parse = |text: &str| Status::parse("thin-pool", text);
        let status =
            parse("3 32/1024 640/9600 - rw discard_passdown queue_if_no_space - 1024").unwrap();
        assert_eq!(status.held_root, None);
        assert_eq!((status.data, status.metadata), ((640, 9600), (32, 1024)));
        assert!(status.queues_when_full && !status.needs_check && status.mode == "rw");
        let status =
            parse("3 32/1024 640/9600 57 ro discard_passdown error_if_no_space needs_check 1024");
        let status = status.unwrap();
        assert_eq!(status.held_root, Some(57));
        assert!(status.needs_check && !status.queues_when_full && status.mode == "ro");
        assert!(parse("Fail").unwrap_err().contains("Fail"));
        assert!(parse("3 32/1024 x - rw").is_err());
        assert!(Status::parse("linear", "").is_err());
    }
}
