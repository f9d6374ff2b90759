// SPDX-License-Identifier: GPL-2.0

//! Running `dmsetup`, and what it says about the mapped devices that exist.
//!
//! The command and not the ioctls: it waits for udev as every other tool does, and it is what an
//! administrator would type.

use std::{
    ffi::OsStr,
    fmt,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    str::FromStr,
};

use rustix::fs::{Dev, OFlags};

use ovbd_layers::error::{Error, Result};

/// Major and minor number of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Number(pub u32, pub u32);

impl Number {
    /// From the form in which system calls have it.
    pub fn new(device: Dev) -> Self {
        Self(rustix::fs::major(device), rustix::fs::minor(device))
    }

    /// The device's folder in sysfs.
    pub fn sysfs(self) -> PathBuf {
        format!("/sys/dev/block/{self}").into()
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0, self.1)
    }
}

impl FromStr for Number {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        Ok(Self(
            major.parse().map_err(|_| ())?,
            minor.parse().map_err(|_| ())?,
        ))
    }
}

/// Runs `dmsetup` and returns what it prints.
///
/// # Errors
///
/// It is not installed, or it failed: with what it said.
pub fn dmsetup<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<String> {
    run("dmsetup", arguments)
}

/// Runs a program of the system and returns what it prints.
///
/// # Errors
///
/// It is not installed, or it failed: with what it said.
pub fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<String> {
    let path = Path::new(program);
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        // A Ctrl-C is for us alone: what was begun is completed, then undone.
        .process_group(0)
        .output()
        .map_err(|e| Error::io(path, "run", e))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let mut said: Vec<&str> = errors
        .lines()
        .map(|line| line.trim_start_matches("device-mapper: ").trim())
        .filter(|line| !line.is_empty() && *line != "Command failed.")
        .collect();
    // What is tried again says the same again.
    said.dedup();
    Err(Error::new(path, said.join("; ")))
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

/// A mapped device.
#[derive(Clone, Debug)]
pub struct Mapped {
    /// Name.
    pub name: String,
    /// UUID, may be empty.
    pub uuid: String,
    /// Number.
    pub number: Number,
    /// Whether it is suspended.
    pub suspended: bool,
    /// The lines of its table, if they were asked for.
    pub table: Vec<Target>,
}

impl Mapped {
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

/// The device node of a mapped device.
pub fn node(name: &str) -> PathBuf {
    Path::new("/dev/mapper").join(name)
}

/// All mapped devices, without their tables.
pub fn all() -> Vec<Mapped> {
    let Ok(folder) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    folder
        .filter_map(|entry| device(&entry.ok()?.path()))
        .collect()
}

/// All mapped devices.
///
/// # Errors
///
/// Those of [`dmsetup`].
pub fn all_with_tables() -> Result<Vec<Mapped>> {
    let mut devices = all();
    // Without a device the program would complain about the missing module.
    if devices.is_empty() {
        return Ok(devices);
    }
    for (name, target) in targets(&dmsetup(["table"])?) {
        if let Some(device) = devices.iter_mut().find(|device| device.name == name) {
            device.table.push(target);
        }
    }
    Ok(devices)
}

/// The status of every line of every mapped device, with the device's name.
///
/// # Errors
///
/// Those of [`dmsetup`].
pub fn all_status() -> Result<Vec<(String, Target)>> {
    // Flushing would commit the metadata of thin pools and take its time.
    Ok(targets(&dmsetup(["status", "--noflush"])?))
}

fn device(folder: &Path) -> Option<Mapped> {
    let read = |file: &str| {
        let text = fs::read_to_string(folder.join(file)).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    };
    Some(Mapped {
        name: read("dm/name")?,
        uuid: read("dm/uuid")?,
        number: read("dev")?.parse().ok()?,
        suspended: read("dm/suspended")? == "1",
        table: Vec::new(),
    })
}

/// Takes lines of the form `NAME: START SECTORS KIND WORD…`.
fn targets(text: &str) -> Vec<(String, Target)> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(": ")?;
            let mut words = rest.split_whitespace().map(str::to_owned);
            let target = Target {
                sectors: words.nth(1)?.parse().ok()?,
                kind: words.next()?,
                words: words.collect(),
            };
            Some((name.to_owned(), target))
        })
        .collect()
}

/// The kernel log from a moment on: `dmsetup` only passes an errno on, the reason is there.
pub struct KernelLog(Option<File>);

impl KernelLog {
    /// From now on.
    pub fn now() -> Self {
        let file = File::options()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open("/dev/kmsg")
            .and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file));
        Self(file.ok())
    }

    /// The first message of device-mapper since then.
    pub fn reason(self) -> Option<String> {
        let mut file = self.0?;
        let mut record = [0; 8192];
        loop {
            // An error is the end, or a gap in a log that is written faster than this reads it.
            let n = file.read(&mut record).ok()?;
            let text = String::from_utf8_lossy(&record[..n]).into_owned();
            let message = text.split_once(';').map_or("", |(_, message)| message);
            if let Some(reason) = message.strip_prefix("device-mapper: ") {
                return reason.lines().next().map(str::to_owned);
            }
        }
    }
}
