// SPDX-License-Identifier: GPL-2.0

//! Beginning a new generation: an empty store on top of a device in use, which freezes what was written before.
//!
//! All is made beside the device. Then one ioctl suspends it, replaces its table and resumes it, which takes as long as
//! the writes that are under way and the file system's freezing. For that moment nothing is needed of the device, so that
//! it can be the one that the system lives on.
//!
//! dm-snapshot sends a flush to its own store only. So what was written before must be on the disk before the next flush
//! goes to the new store. A file system on the device sees to that when it is frozen. For all other users the old store is
//! flushed while the device is suspended, by two ioctls; who does that must not need the device.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::{fs::FileTypeExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use ovbd_image::lsmt::UuidText;
use ovbd_kernel::{
    dm::{Control, Id, Line as TableLine, Suspend},
    Number,
};
use rustix::mm::{mlockall, munlockall, MlockAllFlags};

use crate::{
    cow::enough_for,
    generations::{Chain, Generation},
    hold_still::{check_elsewhere, check_no_swap, is_only_mounted, Frozen},
    layer_place::{line, linear},
    mapped::{Mapped, Mapper},
    plan::{self, Device, Step},
    record::{Below, Record},
    running::Role,
    storage::Storage,
    store_files::{self, Place},
    up::snapshot,
    Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    file_range::FileRange,
    output::directory,
    report::Report,
};

/// How long a device that others have open besides its file system is looked at again: udev does that for a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a new generation needs to know.
pub struct Freezing<'a> {
    /// Name of the stack.
    pub name: &'a str,
    /// Its generations.
    pub chain: &'a Chain,
    /// UUID of its topmost layer.
    pub uuid: Option<UuidText>,
    /// Where the new store is to be, if not beside the old one.
    pub next: Option<&'a Path>,
    /// A file that is written later.
    pub out: &'a Path,
    /// What is where.
    pub storage: &'a Storage,
    /// For warnings.
    pub report: &'a dyn Report,
}

impl Freezing<'_> {
    /// Puts an empty store on top, and leaves the device of [`Role::Probe`], which takes longer to remove.
    ///
    /// # Errors
    ///
    /// There is no place for it, something uses the device in a way that does not allow it, and the system's. The device
    /// is then as it was.
    pub fn run(&self, control: &Control, interrupt: &Interrupt) -> Result<()> {
        check_no_swap(&self.chain.top, self.storage)?;
        let old = self.chain.newest();
        let number = old.number.checked_add(1).ok_or_else(|| {
            let what = "has had as many generations as there are numbers";
            Error::new(&old.device.node(), what)
        })?;
        let record = self.record_of(old)?;
        let fail = |e| Error::io(&old.store_node(), "number", e);
        let sectors = self.chain.top.sectors();
        let own = Record::new(number, sectors, Below::Store(record.own)).map_err(fail)?;
        let place = self.place(number)?;
        self.check_place(&place)?;
        let bytes = FileRange::open(&old.store_node())?.bytes();
        let (before, bytes) = match Place::of(old.store, self.storage) {
            Ok(Place::File(path)) => (Some(path), bytes),
            // A new file after a device that may be small.
            Ok(Place::Device(path)) => (Some(path), bytes.max(enough_for(sectors))),
            Ok(Place::Unnamed) | Err(_) => (None, bytes),
        };
        if let Place::File(path) = &place {
            store_files::remove_unused(path, &record, self.storage)?;
            store_files::create(path, before, bytes, old.chunk_sectors, &own)?;
        }
        let steps = self.steps(number, &place, bytes, &own);
        let result = plan::run(control, &steps, interrupt, self.report, || {
            self.swap(control, number)
        });
        if let (Err(_), Place::File(path)) = (&result, &place) {
            // As long as the device is there it may be in use.
            let uuid = Role::Generation(number).device_uuid(self.name, self.uuid);
            if let Ok(None) = control.table(Id::Uuid(&uuid)) {
                let storage = Storage::look()?;
                if let Err(e) = store_files::remove_unused(path, &record, &storage) {
                    self.report.warn(&e);
                }
            }
        }
        result
    }

    /// The record of the store that is to be frozen, which gets one where it has none: the new one names it.
    fn record_of(&self, old: &Generation) -> Result<Record> {
        let node = old.store_node();
        if old.chunk_sectors < 2 {
            let what = "a store with chunks of 512 bytes, which has no room for a record of what it was written over \
                        (ovbd build --base makes a layer of a copy of the device)";
            return Err(Error::new(&node, what));
        }
        if let Some(record) = Record::read(&node)? {
            return Ok(record);
        }
        if !self.chain.frozen().is_empty() {
            return Err(Error::new(&node, "the store lost its record"));
        }
        let below = Below::layer(self.uuid);
        let record = Record::new(old.number, self.chain.top.sectors(), below)
            .map_err(|e| Error::io(&node, "number", e))?;
        record.write(&node)?;
        Ok(record)
    }

    fn place(&self, number: u32) -> Result<Place> {
        if let Some(path) = self.next {
            if FileId::at(path)?.is_some() {
                return Err(Error::new(path, "exists, and a new store needs a new file"));
            }
            return Ok(Place::File(path.to_owned()));
        }
        match Place::of(self.chain.newest().store, self.storage)? {
            Place::Unnamed => Ok(Place::Unnamed),
            Place::File(path) => Ok(Place::File(store_files::name_of(&path, number))),
            Place::Device(path) => {
                let what =
                    "what is written is on this device, which cannot have the next store too \
                            (--cow FILE says where that is to be)";
                Err(Error::new(&path, what))
            }
        }
    }

    /// Refuses to put the new store on the stack itself: it would wait for itself.
    fn check_place(&self, place: &Place) -> Result<()> {
        let folder = match place {
            Place::File(path) => directory(path),
            Place::Unnamed | Place::Device(_) => Path::new(plan::UNNAMED_FOLDER),
        };
        let below = self.storage.below_path(folder)?;
        let mut ours = self.chain.generations.iter();
        if below.contains(&self.chain.top.number)
            || ours.any(|one| below.contains(&one.device.number))
        {
            let what = format!(
                "on {} itself, which cannot keep there what is written to it (--cow FILE says where)",
                self.chain.top.node().display()
            );
            return Err(Error::new(folder, what));
        }
        Ok(())
    }

    fn steps(&self, number: u32, place: &Place, bytes: u64, own: &Record) -> Vec<Step> {
        let old = self.chain.newest();
        let sectors = self.chain.top.sectors();
        let variable = "cow";
        let map = |role: Role, read_only, words| Step::Map {
            name: role.device_name(self.name),
            uuid: role.device_uuid(self.name, self.uuid),
            read_only,
            table: vec![line(sectors, words)],
        };
        let device = |role: Role| Device::Mapped(role.device_name(self.name));
        let store = match place {
            Place::File(path) => Step::Cow {
                variable: variable.to_owned(),
                path: Some(path.clone()),
                create: None,
                beginning: None,
            },
            Place::Unnamed | Place::Device(_) => Step::Cow {
                variable: variable.to_owned(),
                path: None,
                create: Some(bytes),
                beginning: Some(crate::cow::beginning(old.chunk_sectors, own)),
            },
        };
        let (lower, generation) = (Role::Lower(number), Role::Generation(number));
        let frozen = Device::Number(old.device.number);
        let loop_device = Device::Loop(variable.to_owned());
        let words = snapshot(device(lower), loop_device, old.chunk_sectors, old.discards);
        vec![
            map(lower, true, linear(&frozen, 0)),
            store,
            map(generation, false, words),
            // A table that does not fit leaves the device that gets it suspended, so another one gets it first.
            map(Role::Probe, false, linear(&device(generation), 0)),
        ]
    }

    /// Puts the device over the new generation.
    fn swap(&self, control: &Control, number: u32) -> Result<()> {
        let mapper = Mapper::new(control)?;
        let top = &self.chain.top;
        let uuid = Role::Generation(number).device_uuid(self.name, self.uuid);
        let generation = number_of(control, &uuid, &top.node())?;
        let table = [TableLine {
            start: 0,
            sectors: top.sectors(),
            kind: "linear".to_owned(),
            text: format!("{generation} 0"),
        }];
        let suspended = if self.is_free(control)? {
            let how = Suspend::default();
            mapper.load(&top.name, &top.uuid, &table, false)?;
            // The less is left for the freezing the better.
            for mount in self.storage.mounts_on(top.number) {
                sync(&mount.seen_from_here(&mount.point));
            }
            let begin = Instant::now();
            mapper.switch(&top.name, &top.uuid, how)?;
            begin.elapsed()
        } else {
            self.swap_for_others(control, &mapper, &table)?
        };
        tracing::debug!(name = top.name, ?suspended, "a new generation is on top");
        // It is done: whatever is still wrong undoes nothing.
        if let Err(e) = mapper.finish() {
            self.report.warn(&e);
        }
        Ok(())
    }

    /// The device as it is now.
    fn top_now(&self, control: &Control) -> Result<Mapped> {
        let mut top = self.chain.top.clone();
        let found = control.table(top.id());
        if let Some((info, _)) = found.map_err(|e| Error::io(&top.node(), "look up", e))? {
            top.opens = info.opens;
        }
        Ok(top)
    }

    /// Whether one ioctl is enough.
    fn is_free(&self, control: &Control) -> Result<bool> {
        let begin = Instant::now();
        loop {
            let top = self.top_now(control)?;
            if is_only_mounted(&top, self.storage) {
                return Ok(!Frozen::is_needed(&top, self.storage)?);
            }
            let is_mounted = self.storage.mounts_on(top.number).next().is_some();
            if !is_mounted || begin.elapsed() > PATIENCE {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The same where others use the device than a file system directly on it: with a flush of the old store meanwhile.
    /// Returns for how long they waited.
    fn swap_for_others(
        &self,
        control: &Control,
        mapper: &Mapper<'_>,
        table: &[TableLine],
    ) -> Result<Duration> {
        let top = &self.top_now(control)?;
        check_elsewhere(top, self.out, self.storage)?;
        let node = self.chain.newest().store_node();
        let store = File::open(&node).map_err(|e| Error::io(&node, "open", e))?;
        let flush = || store.sync_data().map_err(|e| Error::io(&node, "sync", e));
        let points = Frozen::points_above(top, self.storage)?;
        // What is on the disk by then need not be written while everybody waits.
        points.iter().for_each(|point| sync(point));
        sync(&top.node());
        flush()?;
        let watch = Watch::begin(top, &points)?;
        let _locked = Locked::begin();
        let begin = Instant::now();
        let frozen = Frozen::above(top, self.storage, self.report)?;
        let fail = |action, e| Error::io(&top.node(), action, e);
        let suspended = control
            .suspend(top.id(), Suspend::default())
            .map_err(|e| fail("suspend", e));
        let result = suspended.and_then(|()| {
            flush()?;
            mapper.reload(&top.name, &top.uuid, table, false, Suspend::default())
        });
        let result = result.inspect_err(|_| {
            // It may be suspended still, with the table that it had.
            let resumed = ovbd_kernel::udev::Cookie::new().and_then(|cookie| {
                control.resume(
                    top.id(),
                    Suspend::default(),
                    cookie.event(Role::rules(&top.uuid)),
                )
            });
            if let Err(e) = resumed {
                self.report.warn(&fail("resume", e));
            }
        });
        drop(frozen);
        let elapsed = begin.elapsed();
        watch.end();
        result.map(|()| elapsed)
    }
}

/// Number of a device with a UUID; an error is about `path`.
pub fn number_of(control: &Control, uuid: &str, path: &Path) -> Result<Number> {
    let found = control
        .table(Id::Uuid(uuid))
        .map_err(|e| Error::io(path, "look up what is below", e))?;
    found
        .map(|(info, _)| info.number)
        .ok_or_else(|| Error::new(path, "what is to be below it went away"))
}

/// Has a file system, or what is written to a device past file systems, written out, so that the suspension takes less.
fn sync(path: &Path) {
    if let Ok(file) = File::open(path) {
        // Whoever wrote it is told what fails, as at any other time.
        let _ = match file.metadata() {
            Ok(found) if found.file_type().is_block_device() => file.sync_all(),
            _ => rustix::fs::syncfs(&file).map_err(Into::into),
        };
    }
}

/// The memory of the program stays in memory: to read it may take the suspended device.
struct Locked(bool);

impl Locked {
    fn begin() -> Self {
        // Without it, it is as where files are known to be elsewhere.
        Self(mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).is_ok())
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.0 {
            let _ = munlockall();
        }
    }
}

/// A program that lets the device go on if this one dies.
struct Watch {
    child: Child,
    pipe: ChildStdin,
}

/// Says that it is there, and reads a line, which comes unless the other end dies.
const WATCH: &str =
    "command -v dmsetup >/dev/null || exit; echo; exec >/dev/null; uuid=$1; shift; read -r line && exit; \
     dmsetup resume --noudevsync --uuid \"$uuid\"; for point; do fsfreeze --unfreeze \"$point\"; done";

impl Watch {
    fn begin(device: &Mapped, points: &[PathBuf]) -> Result<Self> {
        let fail = |e| Error::io(Path::new("sh"), "run", e);
        let mut child = Command::new("sh")
            .args(["-c", WATCH, "sh", &device.uuid])
            .args(points)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(fail)?;
        let (Some(pipe), Some(mut ready)) = (child.stdin.take(), child.stdout.take()) else {
            let what = "there is no pipe to the program that watches";
            return Err(Error::new(Path::new("sh"), what));
        };
        let mut said = [0];
        if ready.read(&mut said).map_err(fail)? == 0 {
            let what = "not found, and it lets the device go on if ovbd dies meanwhile";
            return Err(Error::new(Path::new("dmsetup"), what));
        }
        Ok(Self { child, pipe })
    }

    fn end(mut self) {
        // Where that fails, it resumes a device that is not suspended.
        let _ = self.pipe.write_all(b"\n");
        drop(self.pipe);
        let _ = self.child.wait();
    }
}
