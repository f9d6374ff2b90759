// SPDX-License-Identifier: GPL-2.0

//! The mapped devices that exist, making and removing them.
//!
//! By ioctl, as `dmsetup` does it and what it waits for: a stack of 100 layers is 201 devices, each of which would be a
//! process and a wait for udev. What an administrator would type is what `ovbd up --dry-run` prints.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use ovbd_kernel::{
    dm::{self, Control, Id, Line, Listed},
    udev::{self, Cookie, Event, Rules},
    Number,
};
use rustix::{
    fs::{FileType, Mode, OFlags, CWD},
    io::Errno,
};

use crate::{programs::run, running::Role};
use ovbd_layers::error::{Error, Result};

pub use ovbd_kernel::dm::node;

/// How long a device that something has open is tried to be removed: udev looks at a device after every program that
/// wrote to it.
const RETRY: Duration = Duration::from_secs(5);

/// Opens device-mapper, whose module is loaded where it is missing.
///
/// # Errors
///
/// It cannot be opened.
pub fn open() -> Result<Control> {
    match Control::open() {
        Err(e) if is_missing(&e) => {
            // Where that does not help the next attempt says why.
            let _ = run("modprobe", ["dm-mod"]);
            Control::open()
        }
        result => result,
    }
    .map_err(|e| control_error("open", e))
}

/// As [`open`], for who only looks: nothing where there is no device-mapper, and so no device.
///
/// # Errors
///
/// It cannot be opened.
pub fn open_existing() -> Result<Option<Control>> {
    match Control::open() {
        Err(e) if is_missing(&e) => Ok(None),
        result => result.map(Some).map_err(|e| control_error("open", e)),
    }
}

fn is_missing(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::NOENT, Errno::NODEV, Errno::NXIO].contains(&errno))
}

fn control_error(action: &str, error: io::Error) -> Error {
    Error::io(Path::new(dm::CONTROL), action, error)
}

/// All mapped devices.
///
/// # Errors
///
/// Those of the ioctl.
pub fn list(control: &Control) -> Result<Vec<Listed>> {
    let fail = |e| control_error("list the devices of", e);
    control.devices().map_err(fail)
}

/// A line of a table or of a status.
#[derive(Clone, Debug)]
pub struct Target {
    /// Sectors.
    pub sectors: u64,
    /// Name of the target.
    pub kind: String,
    /// Its parameters or its status.
    pub words: Vec<String>,
}

impl Target {
    /// The word at `position` as a number.
    pub fn number(&self, position: usize) -> Option<u64> {
        self.words.get(position)?.parse().ok()
    }

    /// The word at `position` as a device.
    pub fn device(&self, position: usize) -> Option<Number> {
        self.words.get(position)?.parse().ok()
    }
}

impl From<Line> for Target {
    fn from(line: Line) -> Self {
        Self {
            sectors: line.sectors,
            kind: line.kind,
            words: line.text.split_whitespace().map(str::to_owned).collect(),
        }
    }
}

/// A mapped device of a stack.
#[derive(Clone, Debug)]
pub struct Mapped {
    /// Name, which somebody may have changed.
    pub name: String,
    /// UUID, by which it is known.
    pub uuid: String,
    /// Number.
    pub number: Number,
    /// How often it is open; by mounts and by devices made of it too.
    pub opens: u32,
    /// Whether it is suspended.
    pub suspended: bool,
    /// The lines of its table.
    pub table: Vec<Target>,
}

impl Mapped {
    /// Looks at a device; `None` if it went away.
    ///
    /// # Errors
    ///
    /// Those of the ioctls.
    pub fn read(control: &Control, listed: &Listed) -> Result<Option<Self>> {
        let id = Id::Uuid(&listed.uuid);
        let fail = |e| Error::io(&node(&listed.name), "look up", e);
        let Some((info, table)) = control.table(id).map_err(fail)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            name: info.name,
            uuid: info.uuid,
            number: info.number,
            opens: info.opens,
            suspended: info.suspended,
            table: table.into_iter().map(Target::from).collect(),
        }))
    }

    /// What its targets say of themselves; nothing if it went away.
    ///
    /// # Errors
    ///
    /// Those of the ioctl.
    pub fn status(&self, control: &Control) -> Result<Vec<Target>> {
        // Nothing is flushed: that would commit the metadata of thin pools and take its time.
        let lines = control.status(self.id());
        let lines = lines.map_err(|e| Error::io(&self.node(), "ask for the status of", e))?;
        Ok(lines
            .unwrap_or_default()
            .into_iter()
            .map(Target::from)
            .collect())
    }

    /// How it is named in ioctls.
    pub fn id(&self) -> Id<'_> {
        Id::Uuid(&self.uuid)
    }

    /// The device node.
    pub fn node(&self) -> PathBuf {
        node(&self.name)
    }

    /// The first line of the table.
    pub fn target(&self) -> Option<&Target> {
        self.table.first()
    }

    /// Sectors of all lines.
    pub fn sectors(&self) -> u64 {
        self.table.iter().map(|target| target.sectors).sum()
    }
}

/// Makes and removes mapped devices, and waits once for what udev does about all of them.
#[derive(Debug)]
pub struct Mapper<'a> {
    control: &'a Control,
    cookie: Cookie,
    /// Name, number, and whether something waits for udev to make the node.
    made: Mutex<Vec<(String, Number, bool)>>,
    removed: Mutex<Vec<String>>,
    log: Mutex<KernelLog>,
}

impl<'a> Mapper<'a> {
    /// For changes that begin now.
    ///
    /// # Errors
    ///
    /// udev cannot be waited for.
    pub fn new(control: &'a Control) -> Result<Self> {
        Ok(Self {
            control,
            cookie: Cookie::new().map_err(|e| control_error("wait for udev after", e))?,
            made: Mutex::default(),
            removed: Mutex::default(),
            log: Mutex::new(KernelLog::now()),
        })
    }

    /// Makes a device; nothing is left of it after an error.
    ///
    /// # Errors
    ///
    /// Those of the ioctls, with the reason that the kernel logs.
    pub fn create(
        &self,
        name: &str,
        uuid: &str,
        table: &[Line],
        read_only: bool,
    ) -> Result<Number> {
        let path = node(name);
        let id = Id::Uuid(uuid);
        let number = self
            .control
            .create(name, uuid)
            .map_err(|e| Error::io(&path, "create", e))?;
        let result = self.control.load(id, table, read_only).and_then(|()| {
            let event = self.event(uuid);
            self.control.resume(id, dm::Suspend::default(), event)
        });
        if let Err(e) = result {
            let error = self.with_reason(Error::io(&path, "map", e), number);
            // It has just been made and nobody uses it.
            let event = self.event(uuid);
            let _ = self.control.remove(id, false, event);
            return Err(error);
        }
        let waits = Role::rules(uuid) != Rules::Unwaited;
        lock(&self.made).push((name.to_owned(), number, waits));
        Ok(number)
    }

    /// What udev is to do about a device.
    fn event(&self, uuid: &str) -> Event<'_> {
        self.cookie.event(Role::rules(uuid))
    }

    /// The same error with the reason that the kernel has logged for the device `number`, if it has any.
    fn with_reason(&self, error: Error, number: Number) -> Error {
        match lock(&self.log).reason(number) {
            Some(reason) => {
                let what = format!("{} ({reason})", error.what());
                Error::new(error.path(), what)
            }
            None => error,
        }
    }

    /// Gives a device that is in use another table. `how` it is suspended for as long as that takes.
    ///
    /// # Errors
    ///
    /// Those of the ioctls. The device goes on with the table that it had then.
    pub fn reload(
        &self,
        name: &str,
        uuid: &str,
        table: &[Line],
        read_only: bool,
        how: dm::Suspend,
    ) -> Result<()> {
        self.load(name, uuid, table, read_only)?;
        self.switch(name, uuid, how)
    }

    /// Loads a table for a device that goes on with the one that it has.
    ///
    /// # Errors
    ///
    /// Those of the ioctl, with the reason that the kernel logs.
    pub fn load(&self, name: &str, uuid: &str, table: &[Line], read_only: bool) -> Result<()> {
        let result = self.control.load(Id::Uuid(uuid), table, read_only);
        result.map_err(|e| self.change_error("load a table for", name, e))
    }

    /// Puts a device on the table that was loaded for it. `how` it is suspended for as long as that takes.
    ///
    /// # Errors
    ///
    /// Those of the ioctl. The device goes on with the table that it had then.
    pub fn switch(&self, name: &str, uuid: &str, how: dm::Suspend) -> Result<()> {
        let path = node(name);
        let id = Id::Uuid(uuid);
        let result = loop {
            match self.control.resume(id, how, self.event(uuid)) {
                // A signal while it waited for I/O that is under way. The table is loaded still.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        result.map_err(|e| {
            let error = self.change_error("replace the table of", name, e);
            // With no table loaded it goes on with its own.
            let _ = self.control.clear(id);
            let event = self.event(uuid);
            match self.control.resume(id, dm::Suspend::default(), event) {
                Ok(()) => error,
                Err(e) => {
                    let what = format!(
                        "{}, and it is suspended: {e} (dmsetup resume {name})",
                        error.what()
                    );
                    Error::new(&path, what)
                }
            }
        })
    }

    fn change_error(&self, action: &str, name: &str, error: io::Error) -> Error {
        // The number is not needed: nothing else is loaded by us now.
        self.with_reason(Error::io(&node(name), action, error), Number(0, 0))
    }

    /// Removes a device; one that is in use is tried for a while.
    ///
    /// # Errors
    ///
    /// The system's. One that is gone already is none.
    pub fn remove(&self, name: &str, uuid: &str) -> io::Result<()> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(2);
        loop {
            let event = self.event(uuid);
            let result = self.control.remove(Id::Uuid(uuid), false, event);
            match result.as_ref().map_err(Errno::from_io_error) {
                Err(Some(Errno::BUSY)) if start.elapsed() < RETRY => {}
                Err(Some(Errno::NXIO)) => return Ok(()),
                Ok(()) => {
                    lock(&self.removed).push(name.to_owned());
                    return Ok(());
                }
                Err(_) => return result,
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    /// Removes devices, one after the other until one stays.
    ///
    /// # Errors
    ///
    /// Those of [`Mapper::remove`], with the node.
    pub fn remove_each<'m>(&self, devices: impl IntoIterator<Item = &'m Mapped>) -> Result<()> {
        devices.into_iter().try_for_each(|device| {
            let removed = self.remove(&device.name, &device.uuid);
            removed.map_err(|e| Error::io(&device.node(), "remove", e))
        })
    }

    /// Waits until the nodes of all devices are there or gone, but for those of layers, which udev makes and removes when it
    /// comes to it. Makes and removes those that udev does not, as libdevmapper's programs do.
    ///
    /// # Errors
    ///
    /// A node cannot be made.
    pub fn finish(&self) -> Result<()> {
        let udev = udev::is_running() && self.cookie.wait();
        let removed = std::mem::take(&mut *lock(&self.removed));
        let made = std::mem::take(&mut *lock(&self.made));
        for name in &removed {
            if !udev {
                // There may be none, and one that stays is not taken for that of another device.
                let _ = fs::remove_file(node(name));
            }
        }
        for (name, number, waits) in made.iter().filter(|(name, ..)| !removed.contains(name)) {
            // A node of ours would be in the way of udev's link.
            if *waits || !udev {
                make_node(&node(name), *number)?;
            }
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes devices that nothing is made of any more, as [`Mapper::remove_each`] does, and waits until their nodes are gone.
///
/// # Errors
///
/// Those of [`Mapper`].
pub fn remove<'m>(control: &Control, devices: impl IntoIterator<Item = &'m Mapped>) -> Result<()> {
    let mapper = Mapper::new(control)?;
    let removed = mapper.remove_each(devices);
    mapper.finish()?;
    removed
}

/// Makes the nodes of devices where they are missing and udev does not make them: who made the devices may have died
/// before that.
///
/// # Errors
///
/// A node cannot be made.
pub fn make_missing_nodes<'a>(devices: impl IntoIterator<Item = &'a Mapped>) -> Result<()> {
    if udev::is_running() {
        return Ok(());
    }
    let mut devices = devices.into_iter();
    devices.try_for_each(|device| make_node(&device.node(), device.number))
}

fn make_node(path: &Path, number: Number) -> Result<()> {
    let device = rustix::fs::makedev(number.0, number.1);
    let mode = Mode::RUSR | Mode::WUSR;
    let make = || rustix::fs::mknodat(CWD, path, FileType::BlockDevice, mode, device);
    let made = match make() {
        // A link whose end is gone, or what a program has left that was killed: by now the number may be another device's.
        Err(Errno::EXIST) if !rustix::fs::stat(path).is_ok_and(|found| found.st_rdev == device) => {
            let _ = fs::remove_file(path);
            make()
        }
        result => result,
    };
    match made {
        // udev was faster.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(Error::io(path, "make the node", e.into())),
    }
}

/// The kernel log from a moment on: an ioctl only gives an errno, the reason is there.
#[derive(Debug)]
struct KernelLog {
    file: Option<File>,
    /// What device-mapper said since.
    reasons: Vec<String>,
}

impl KernelLog {
    /// From now on.
    fn now() -> Self {
        let file = File::options()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open("/dev/kmsg")
            .and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file));
        Self {
            file: file.ok(),
            reasons: Vec::new(),
        }
    }

    /// The first message of device-mapper since then, of one about a device if there is any.
    fn reason(&mut self, number: Number) -> Option<String> {
        let mut record = [0; 8192];
        while let Some(file) = &mut self.file {
            let n = match file.read(&mut record) {
                Ok(n) => n,
                // Some messages were overwritten before they were read.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => continue,
                Err(_) => break,
            };
            let text = String::from_utf8_lossy(&record[..n]);
            let message = text.split_once(';').map_or("", |(_, message)| message);
            let reason = message.strip_prefix("device-mapper: ");
            let reason = reason.and_then(|reason| reason.lines().next());
            self.reasons.extend(reason.map(str::to_owned));
        }
        let about = format!(" {number}: ");
        let mut reasons = self.reasons.iter();
        let own = reasons.find(|reason| format!(" {reason}").contains(&about));
        own.or_else(|| self.reasons.first()).cloned()
    }
}
