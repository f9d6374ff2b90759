// SPDX-License-Identifier: GPL-2.0

//! The metadata of a thin pool: its state, and a metadata snapshot of it for as long as it is read.
//!
//! The kernel has one metadata snapshot per pool. It outlives the program that asked for it, so ours is noted first
//! ([`crate::undo`]) and held only while a program of thin-provisioning-tools runs. Who else holds one is waited for.

use std::{
    fs::File,
    io::ErrorKind,
    path::{Path, PathBuf},
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
use rustix::{fs::FlockOperation, io::Errno};

use crate::{
    undo::{self, Action, Undo},
    Name, Volume,
};

/// How long another program's metadata snapshot is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long a metadata snapshot must stay of which is not known whose it is.
const UNKNOWN_OWNER: Duration = Duration::from_secs(15);

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

/// Bytes of a block of the metadata of a pool.
pub const METADATA_BLOCK: u64 = 4096;

/// Blocks of metadata that are taken at most where `mapped` chunks of a volume of `chunks` are mapped anew, or not any more.
pub fn metadata_blocks(mapped: u64, chunks: u64) -> u64 {
    // A leaf has room for 252 mappings and is half full at least, but for the last; of those that a snapshot shares with
    // its origin each one that changes is copied. What is above them, and the space maps, are a few blocks.
    const LEAF: u64 = 100;
    const OTHERS: u64 = 32;
    let new = mapped.div_ceil(LEAF);
    let copied = mapped.min(chunks.div_ceil(LEAF));
    new + copied + OTHERS
}

/// Why neither a volume nor a metadata snapshot can be made in a pool as it is now.
pub fn defect(status: &Status) -> Option<&'static str> {
    match status.mode.as_str() {
        "rw" | "out_of_data_space" if status.needs_check => Some("its metadata needs a check"),
        "rw" | "out_of_data_space" => None,
        _ if status.needs_check => Some("it is read-only, and its metadata needs a check"),
        _ => Some("it is read-only"),
    }
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
    match defect(&status) {
        None => Ok(status),
        Some(why) => Err(pool.name.error(format!(
            "{why}: no metadata snapshot can be taken (lvconvert --repair {} mends it)",
            pool.name
        ))),
    }
}

/// One process at a time has a metadata snapshot of a pool: that of this lock, until it is dropped.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] Vec<File>);

impl Lock {
    /// Waits for the lock of a pool, and for that of thin-send-recv where it is there.
    fn wait(pool: &Volume, interrupt: &Interrupt, report: &dyn Report) -> Result<Self> {
        let own = Self::wait_for_ours(pool, interrupt, report)?;
        let mut files = own.0;
        let other = Path::new(NEIGHBOUR_LOCK);
        match File::open(other) {
            Ok(file) => {
                wait_for(&file, other, &pool.name, interrupt, report)?;
                files.push(file);
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(other, "open", e)),
        }
        Ok(Self(files))
    }

    fn wait_for_ours(pool: &Volume, interrupt: &Interrupt, report: &dyn Report) -> Result<Self> {
        let (file, path) = Self::open(&pool.uuid)?;
        wait_for(&file, &path, &pool.name, interrupt, report)?;
        Ok(Self(vec![file]))
    }

    /// The lock of the pool with this UUID; `None` if another process has it.
    pub(crate) fn try_take(uuid: &str) -> Result<Option<Self>> {
        let (file, path) = Self::open(uuid)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(vec![file]))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(Error::io(&path, "lock", e.into())),
        }
    }

    fn open(uuid: &str) -> Result<(File, PathBuf)> {
        let folder = Path::new(FOLDER);
        lock::make_folder(folder)?;
        let path = folder.join(format!("pool-{uuid}.lock"));
        Ok((lock::open_file(&path)?, path))
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
    let _lock = Lock::wait(pool, interrupt, report)?;
    let device = target(pool);
    wait_for_others(pool, &device, interrupt, report, patience)?;
    let noted = Action::Reserved {
        pool: pool.uuid.clone(),
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
        pool: pool.uuid.clone(),
        device: device.clone(),
        root,
    };
    undo.change(number, noted)?;
    let node = Path::new("/dev/mapper").join(pool.part("_tmeta"));
    let result = read(&node);
    reserved.release()?;
    result
}

/// Releases the metadata snapshot that a dead process has left, in block `root` if that is known; says whether it did. The
/// caller has the pool's lock, so no other process of ours has one.
///
/// # Errors
///
/// Somebody reads the metadata: it may be theirs. And those of [`status`].
pub(crate) fn release_left(device: &str, root: Option<u64>) -> Result<bool> {
    let Some(held) = status(device)?.and_then(|status| status.held_root) else {
        return Ok(false);
    };
    // Somebody else's by now.
    if root.is_some_and(|ours| ours != held) {
        return Ok(false);
    }
    // Killed before it was noted where it is. Nobody had one when we began, so it is ours, unless somebody else took one
    // since: whoever lives reads the metadata, and releases it soon.
    let start = Instant::now();
    let time = root.map_or(UNKNOWN_OWNER, |_| Duration::ZERO);
    loop {
        if is_read(device)? {
            let what = format!(
                "a program that was killed has left a metadata snapshot, it seems, but another program reads the \
                 metadata now: it stays in block {held}"
            );
            return Err(Error::new(&dm::node(device), what));
        }
        if status(device)?.and_then(|status| status.held_root) != Some(held) {
            return Ok(false);
        }
        if start.elapsed() >= time {
            break;
        }
        thread::sleep(PAUSE);
    }
    message(device, "release_metadata_snap")?;
    Ok(true)
}

/// Whether somebody has the device with the metadata open, besides the pool.
fn is_read(device: &str) -> Result<bool> {
    let name = device.strip_suffix("-tpool").unwrap_or(device);
    let node = dm::node(&format!("{name}_tmeta"));
    let Some(number) = block_number(&node) else {
        return Err(Error::new(
            &node,
            "there is no such device: who reads the metadata is not known",
        ));
    };
    let found = control(&node)?.table(Id::Number(number));
    let found = found.map_err(|e| Error::io(&node, "look at", e))?;
    Ok(found.is_none_or(|(info, _)| info.opens > 1))
}

/// What [`release`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// The pool has no metadata snapshot, or is not active.
    Nothing,
    /// It was released.
    Released,
    /// It stays, and what is to be said of it.
    Left(String),
}

/// Releases the metadata snapshot of a pool, whosever it is, if that is `forced`; else says what there is. What dead processes
/// noted was taken back before ([`crate::undo::recover`]). Waits for a process of ours that has one.
///
/// # Errors
///
/// An interrupt, and the kernel's.
pub fn release(
    pool: &Volume,
    forced: bool,
    interrupt: &Interrupt,
    report: &dyn Report,
) -> Result<Held> {
    let _lock = Lock::wait_for_ours(pool, interrupt, report)?;
    let device = target(pool);
    let Some(held) = status(&device)?.and_then(|status| status.held_root) else {
        return Ok(Held::Nothing);
    };
    if forced {
        message(&device, "release_metadata_snap")?;
        return Ok(Held::Released);
    }
    let now = match is_read(&device)? {
        true => "a program reads it now",
        false => "no program reads it now",
    };
    Ok(Held::Left(format!(
        "has a metadata snapshot (block {held}) that is in no notes of ovbd: another program's, or of one that was killed \
         before a reboot; {now}; it stays (\"ovbd lvm recover --force {}\" releases it)",
        pool.name
    )))
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
        // It may be that of a process that died since we began.
        let found = undo::recover_pool(&pool.uuid, &())?;
        if !found.done.is_empty() {
            continue;
        }
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
    fn metadata_is_bounded_by_what_changes_and_by_the_volume() {
        assert_eq!(metadata_blocks(0, 1 << 20), 32);
        // Scattered: each chunk is in another leaf.
        assert_eq!(metadata_blocks(10, 1 << 20), 1 + 10 + 32);
        assert_eq!(metadata_blocks(10_000, 20_000), 100 + 200 + 32);
    }

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
