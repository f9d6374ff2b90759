// SPDX-License-Identifier: GPL-2.0

//! The steps that make a stack, and running them. [`crate::script`] prints them.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, MemfdFlags},
    io::Errno,
};

use ovbd_kernel::{
    dm::{Control, Line as TableLine, Suspend, CONTROL},
    loops::{Attached, Part},
    Number,
};

use crate::{
    in_parallel,
    loops::attach,
    mapped::{node, Mapper},
    programs::run as run_program,
    users::block_number,
    verity, Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    file_range::FileRange,
    report::Report,
};

/// A device in a table.
#[derive(Clone, Debug)]
pub enum Device {
    /// One that exists.
    Path(PathBuf),
    /// The mapped device that an earlier step makes under this name.
    Mapped(String),
    /// The loop device that an earlier step attached, by its variable.
    Loop(String),
    /// One that exists.
    Number(Number),
}

/// One step. Loop devices are known by variables, as in a shell script.
#[derive(Debug)]
pub enum Step {
    /// Give the kernel a signature that a table names. Before all others.
    Key {
        /// By what the table names it.
        description: String,
        /// Its bytes.
        signature: Vec<u8>,
    },
    /// Attach a loop device to a layer's file, read-only.
    Layer {
        /// Its variable.
        variable: String,
        /// The file.
        path: PathBuf,
        /// What of it.
        part: Part,
    },
    /// Attach a read-only loop device to a block for each file, with the bytes after the file's last whole
    /// block and zeros. A loop device of the file itself does not have them.
    Tails {
        /// Its variable.
        variable: String,
        /// The files, in order.
        tails: Vec<Tail>,
    },
    /// Attach a read-only loop device to bytes in memory, whole sectors.
    Memory {
        /// Its variable.
        variable: String,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Attach a loop device to a file for writing.
    Cow {
        /// Its variable.
        variable: String,
        /// The file, or nothing for one without a name that goes with the device.
        path: Option<PathBuf>,
        /// Bytes of a new file; an existing one is used as it is.
        create: Option<u64>,
        /// The first bytes of a new store. Without them dm-snapshot makes one of zeros, which has no record.
        beginning: Option<Vec<u8>>,
    },
    /// Write the first bytes of a new store to a block device.
    Begin {
        /// The device.
        path: PathBuf,
        /// As in [`Step::Cow`].
        beginning: Vec<u8>,
    },
    /// Make a device or file one that holds nothing, so that dm-snapshot takes it as new and nobody takes it for what
    /// it was.
    Wipe {
        /// The device or file.
        path: PathBuf,
        /// Bytes at its start that become zero.
        bytes: u64,
    },
    /// Create a mapped device.
    Map {
        /// Its name.
        name: String,
        /// Its UUID.
        uuid: String,
        /// Whether it refuses writes.
        read_only: bool,
        /// Its table.
        table: Vec<Line>,
    },
    /// Give a read-only device below others another table, which reads the same. Nothing is frozen for it. It is the
    /// last step: it is not undone.
    Reload {
        /// Its name.
        name: String,
        /// Its UUID.
        uuid: String,
        /// Its table.
        table: Vec<Line>,
    },
}

/// The end of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The file.
    pub path: PathBuf,
    /// Bytes of its blocks.
    pub block_bytes: u32,
}

/// A line of a table.
#[derive(Debug)]
pub struct Line {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub sectors: u64,
    /// Target and parameters.
    pub words: Vec<Word>,
}

/// A word of a table.
#[derive(Debug)]
pub enum Word {
    /// As it is.
    Text(String),
    /// A device.
    Device(Device),
}

impl From<&str> for Word {
    fn from(text: &str) -> Self {
        Word::Text(text.to_owned())
    }
}

impl From<u64> for Word {
    fn from(number: u64) -> Self {
        Word::Text(number.to_string())
    }
}

impl From<Device> for Word {
    fn from(device: Device) -> Self {
        Word::Device(device)
    }
}

/// Bytes that [`Step::Wipe`] makes zero where there are as many.
pub const WIPE_BYTES: u64 = 1 << 20;

/// Folder for a [`Step::Cow`] without a name: it may become large, which the one for temporary files may not.
pub const UNNAMED_FOLDER: &str = "/var/tmp";

impl Device {
    /// Its number, if it exists before any step.
    pub fn number(&self) -> Option<Number> {
        match self {
            Self::Path(path) => block_number(path),
            Self::Number(number) => Some(*number),
            Self::Mapped(_) | Self::Loop(_) => None,
        }
    }
}

impl Line {
    /// The line for the kernel, with the `number` of each device.
    ///
    /// # Errors
    ///
    /// One has none.
    pub fn resolve(&self, number: impl Fn(&Device) -> Option<Number>) -> Result<TableLine> {
        for word in &self.words {
            if let Word::Device(device) = word {
                if number(device).is_none() {
                    let what = format!("{device:?} is not a block device");
                    return Err(Error::new(Path::new(CONTROL), what));
                }
            }
        }
        let show = |device: &Device| number(device).map_or_else(String::new, |n| n.to_string());
        let text = self.words(show);
        let (kind, text) = text.split_once(' ').unwrap_or((&text, ""));
        Ok(TableLine {
            start: self.start,
            sectors: self.sectors,
            kind: kind.to_owned(),
            text: text.to_owned(),
        })
    }

    /// Target and parameters, with devices as `show` has them.
    pub fn words(&self, show: impl Fn(&Device) -> String) -> String {
        let words: Vec<String> = self
            .words
            .iter()
            .map(|word| match word {
                Word::Text(word) => word.clone(),
                Word::Device(device) => show(device),
            })
            .collect();
        words.join(" ")
    }
}

/// Runs the steps, those that do not need each other at the same time, and `announce` when all is there; after a failure
/// nothing is left of them.
///
/// # Errors
///
/// That of the first step that fails, that of `announce`, and an interrupt.
pub fn run(
    control: &Control,
    steps: &[Step],
    interrupt: &Interrupt,
    report: &dyn Report,
    announce: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut done = Done {
        mapper: Mapper::new(control)?,
        loops: HashMap::new(),
        maps: Vec::new(),
        files: Vec::new(),
    };
    // Threads that are started from now on have them too.
    for step in steps {
        if let Step::Key {
            description,
            signature,
        } = step
        {
            verity::add_key(description, signature)?;
        }
    }
    let result: Result<()> = waves(steps).iter().try_for_each(|wave| {
        let results = in_parallel(wave, |step| {
            interrupt.check(step.path())?;
            done.step(step)
        });
        // All that was made is kept in mind before the first error counts.
        let kept: Vec<Result<()>> = results
            .into_iter()
            .map(|result| result.map(|made| done.keep(made)))
            .collect();
        kept.into_iter().collect()
    });
    // The loop devices are held until the end; then the mapped devices do.
    let result = result
        .and_then(|()| done.mapper.finish())
        .and_then(|()| announce());
    if result.is_err() {
        done.undo(report);
    }
    result
}

/// The steps in groups, each of which only needs the groups before it.
fn waves(steps: &[Step]) -> Vec<Vec<&Step>> {
    let mut waves: Vec<Vec<&Step>> = Vec::new();
    // The wave of each loop device and of each mapped device.
    let mut loops: HashMap<&str, usize> = HashMap::new();
    let mut maps: HashMap<&str, usize> = HashMap::new();
    for step in steps {
        let at = match step {
            Step::Key { .. } => continue,
            Step::Layer { .. } | Step::Tails { .. } | Step::Memory { .. } => 0,
            // Nothing is written before all that may fail earlier.
            Step::Wipe { .. } | Step::Begin { .. } | Step::Cow { .. } => waves.len(),
            Step::Reload { .. } => waves.len(),
            Step::Map { table, .. } => {
                let words = table.iter().flat_map(|line| &line.words);
                let below = words.filter_map(|word| match word {
                    Word::Device(Device::Loop(variable)) => loops.get(variable.as_str()).copied(),
                    Word::Device(Device::Mapped(name)) => maps.get(name.as_str()).copied(),
                    // A step before may have written to it.
                    Word::Device(Device::Path(path)) => waves.iter().rposition(|wave| {
                        let mut wave = wave.iter();
                        wave.any(|step| match step {
                            Step::Wipe { path: written, .. }
                            | Step::Begin { path: written, .. } => written == path,
                            _ => false,
                        })
                    }),
                    Word::Text(_) | Word::Device(Device::Number(_)) => None,
                });
                below.max().map_or(0, |below| below + 1)
            }
        };
        match step {
            Step::Layer { variable, .. }
            | Step::Tails { variable, .. }
            | Step::Memory { variable, .. }
            | Step::Cow { variable, .. } => {
                loops.insert(variable, at);
            }
            Step::Map { name, .. } => {
                maps.insert(name, at);
            }
            Step::Key { .. } | Step::Wipe { .. } | Step::Begin { .. } | Step::Reload { .. } => {}
        }
        if waves.len() <= at {
            waves.resize_with(at + 1, Vec::new);
        }
        waves[at].push(step);
    }
    waves
}

impl Step {
    /// What an error about the step is about.
    fn path(&self) -> &Path {
        match self {
            Step::Layer { path, .. } | Step::Wipe { path, .. } | Step::Begin { path, .. } => path,
            Step::Cow { path, .. } => path.as_deref().unwrap_or(Path::new(UNNAMED_FOLDER)),
            Step::Tails { .. } | Step::Memory { .. } => Path::new("/dev/loop-control"),
            Step::Key { description, .. } => Path::new(description),
            Step::Map { name, .. } | Step::Reload { name, .. } => Path::new(name),
        }
    }
}

/// What was made so far.
struct Done<'a> {
    mapper: Mapper<'a>,
    loops: HashMap<String, Attached>,
    maps: Vec<Mapped>,
    files: Vec<PathBuf>,
}

/// A mapped device that was made.
struct Mapped {
    name: String,
    uuid: String,
    number: Number,
}

/// What a step made.
enum Made {
    Nothing,
    Loop(String, Attached, Option<PathBuf>),
    Map(Mapped),
}

impl Done<'_> {
    fn step(&self, step: &Step) -> Result<Made> {
        Ok(match step {
            Step::Key { .. } => Made::Nothing,
            Step::Layer {
                variable,
                path,
                part,
            } => {
                let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
                let attached = attach(&file, path, false, *part)?;
                Made::Loop(variable.clone(), attached, None)
            }
            Step::Tails { variable, tails } => {
                let file = tails_file(tails)?;
                let attached = attach(&file, Path::new("memfd"), false, Part::ALL)?;
                Made::Loop(variable.clone(), attached, None)
            }
            Step::Memory { variable, bytes } => {
                let file = memory_file(|memory| memory.write_all(bytes))?;
                let attached = attach(&file, Path::new("memfd"), false, Part::ALL)?;
                Made::Loop(variable.clone(), attached, None)
            }
            Step::Cow {
                variable,
                path,
                create,
                beginning,
            } => {
                let (attached, new) = cow(path.as_deref(), *create, beginning.as_deref())?;
                Made::Loop(variable.clone(), attached, new)
            }
            Step::Begin { path, beginning } => {
                let fail = |e| Error::io(path, "write", e);
                let file = File::options().write(true).open(path).map_err(fail)?;
                file.write_all_at(beginning, 0).map_err(fail)?;
                file.sync_all().map_err(fail)?;
                Made::Nothing
            }
            Step::Wipe { path, bytes } => {
                // Signatures further on: it knows where, and refuses what is in use.
                let arguments = [OsStr::new("--all"), OsStr::new("--quiet"), path.as_os_str()];
                run_program("wipefs", arguments)?;
                let fail = |e| Error::io(path, "write", e);
                let mut file = File::options().write(true).open(path).map_err(fail)?;
                file.write_all(&vec![0; *bytes as usize]).map_err(fail)?;
                file.sync_all().map_err(fail)?;
                Made::Nothing
            }
            Step::Reload { name, uuid, table } => {
                let table = self.resolve(table)?;
                tracing::debug!(name, ?table, "reload");
                let how = Suspend {
                    skip_freeze: true,
                    ..Suspend::default()
                };
                self.mapper.reload(name, uuid, &table, true, how)?;
                Made::Nothing
            }
            Step::Map {
                name,
                uuid,
                read_only,
                table,
            } => {
                let table = self.resolve(table)?;
                tracing::debug!(name, ?table, "create");
                let number = self.mapper.create(name, uuid, &table, *read_only);
                let number = number.map_err(|e| verity::explain(&table, e))?;
                Made::Map(Mapped {
                    name: name.clone(),
                    uuid: uuid.clone(),
                    number,
                })
            }
        })
    }

    fn keep(&mut self, made: Made) {
        match made {
            Made::Nothing => {}
            Made::Loop(variable, attached, file) => {
                self.loops.insert(variable, attached);
                self.files.extend(file);
            }
            Made::Map(mapped) => self.maps.push(mapped),
        }
    }

    /// The table with the numbers of its devices: their nodes may not be there yet.
    fn resolve(&self, table: &[Line]) -> Result<Vec<TableLine>> {
        let number = |device: &Device| match device {
            Device::Mapped(name) => {
                let made = self.maps.iter().rev().find(|made| made.name == *name);
                made.map(|made| made.number)
            }
            Device::Loop(variable) => self.loops.get(variable).map(|attached| attached.number),
            Device::Path(_) | Device::Number(_) => device.number(),
        };
        table.iter().map(|line| line.resolve(number)).collect()
    }

    fn undo(self, report: &dyn Report) {
        for Mapped { name, uuid, .. } in self.maps.iter().rev() {
            if let Err(e) = self.mapper.remove(name, uuid) {
                report.warn(&Error::io(&node(name), "remove", e));
            }
        }
        if let Err(e) = self.mapper.finish() {
            report.warn(&e);
        }
        for path in &self.files {
            if let Err(e) = fs::remove_file(path) {
                report.warn(&Error::io(path, "remove", e));
            }
        }
    }
}

/// Attaches the COW store, a file that is made if it is to have a size; returns its name if it is new and has one.
fn cow(
    path: Option<&Path>,
    create: Option<u64>,
    beginning: Option<&[u8]>,
) -> Result<(Attached, Option<PathBuf>)> {
    let name = path.unwrap_or(Path::new(UNNAMED_FOLDER));
    let file = match path {
        None => tempfile::tempfile_in(name).map_err(|e| Error::io(name, "create a file in", e))?,
        Some(path) => File::options()
            .read(true)
            .write(true)
            .create_new(create.is_some())
            .open(path)
            .map_err(|e| Error::io(path, "open", e))?,
    };
    let new = path.filter(|_| create.is_some());
    // The loop device has this file open as long as it exists, and with it the lock.
    // Where there are no locks /sys still tells.
    let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    if locked == Err(Errno::WOULDBLOCK) {
        return Err(Error::new(name, "locked: in use by another program"));
    }
    let sized = match create {
        Some(bytes) => file
            .set_len(bytes)
            .map_err(|e| Error::io(name, "set the size of", e)),
        None => Ok(()),
    };
    let begun = sized.and_then(|()| match beginning {
        Some(beginning) => file
            .write_all_at(beginning, 0)
            .and_then(|()| file.sync_all())
            .map_err(|e| Error::io(name, "write", e)),
        None => Ok(()),
    });
    match begun.and_then(|()| attach(&file, name, true, Part::ALL)) {
        Ok(attached) => Ok((attached, new.map(Path::to_owned))),
        Err(e) => {
            if let Some(path) = new {
                // What went wrong first is what counts.
                let _ = fs::remove_file(path);
            }
            Err(e)
        }
    }
}

/// A file in memory with the last partial block of each file, filled up with zeros.
fn tails_file(tails: &[Tail]) -> Result<File> {
    let mut blocks = Vec::new();
    for tail in tails {
        let input = FileRange::open(&tail.path)?;
        let mut block = vec![0; tail.block_bytes as usize];
        let bytes = input.bytes() % u64::from(tail.block_bytes);
        input.read(&mut block[..bytes as usize], input.bytes() - bytes)?;
        blocks.extend_from_slice(&block);
    }
    memory_file(|memory| memory.write_all(&blocks))
}

/// A file in memory with what `fill` writes, open for reading: a loop device is read-only if its file was opened so.
fn memory_file(fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<File> {
    let fail = |e| Error::io(Path::new("memfd"), "write", e);
    let memory = rustix::fs::memfd_create("ovbd-tails", MemfdFlags::CLOEXEC)
        .map_err(|e| Error::io(Path::new("memfd"), "create", e.into()))?;
    let mut memory = File::from(memory);
    fill(&mut memory).map_err(fail)?;
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
    File::open(name).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: &str, below: &[Device]) -> Step {
        let words = below.iter().cloned().map(Word::Device);
        Step::Map {
            name: name.to_owned(),
            uuid: format!("UUID-{name}"),
            read_only: true,
            table: vec![Line {
                start: 0,
                sectors: 8,
                words: std::iter::once(Word::from("target")).chain(words).collect(),
            }],
        }
    }

    fn layer(variable: &str) -> Step {
        Step::Layer {
            variable: variable.to_owned(),
            path: "file".into(),
            part: Part::ALL,
        }
    }

    #[test]
    fn what_does_not_need_each_other_is_made_at_once() {
        let loop_of = |variable: &str| Device::Loop(variable.to_owned());
        let mapped = |name: &str| Device::Mapped(name.to_owned());
        let disk = PathBuf::from("/dev/disk");
        let steps = [
            layer("a"),
            map("blob", &[loop_of("a")]),
            map("zfile", &[mapped("blob")]),
            layer("b"),
            map("lower", &[mapped("zfile"), loop_of("b")]),
            Step::Wipe {
                path: disk.clone(),
                bytes: 512,
            },
            map("top", &[mapped("lower"), Device::Path(disk)]),
        ];
        let waves = waves(&steps);
        let sizes: Vec<usize> = waves.iter().map(Vec::len).collect();
        assert_eq!(sizes, [2, 1, 1, 1, 1, 1]);
        // Nothing is wiped before the rest is known to work.
        assert!(matches!(waves[4][0], Step::Wipe { .. }));
    }
}
