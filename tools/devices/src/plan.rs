// SPDX-License-Identifier: GPL-2.0

//! The steps that make a stack, either run or printed as the shell commands that do the same.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::SECTOR_BYTES;
use rustix::fs::MemfdFlags;

use crate::{
    dmsetup::{dmsetup, node, KernelLog},
    loops::{attach, Attached},
    Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    file_range::FileRange,
    report::Report,
};

/// A device in a table.
#[derive(Clone, Debug)]
pub enum Device {
    /// One that exists, or that an earlier step makes under this name.
    Path(PathBuf),
    /// The loop device that an earlier step attached, by its variable.
    Loop(String),
}

/// One step. Loop devices are known by variables, as in a shell script.
#[derive(Debug)]
pub enum Step {
    /// Attach a loop device to a layer's file, read-only.
    Layer {
        /// Its variable.
        variable: String,
        /// The file.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// Bytes, whole sectors.
        bytes: u64,
    },
    /// Attach a read-only loop device to a sector for each file, with the bytes after the file's last whole
    /// sector and zeros. A loop device of the file itself does not have them.
    Tails {
        /// Its variable.
        variable: String,
        /// The files.
        paths: Vec<PathBuf>,
    },
    /// Attach a loop device to a file for writing.
    Cow {
        /// Its variable.
        variable: String,
        /// The file, or nothing for one without a name that goes with the device.
        path: Option<PathBuf>,
        /// Bytes of a new file; an existing one is used as it is.
        create: Option<u64>,
    },
    /// Make the first sectors of a device or file zero, so that dm-snapshot takes it as new.
    Wipe(PathBuf),
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

/// Bytes that [`Step::Wipe`] makes zero.
pub const WIPE_BYTES: usize = 4096;

/// Folder for a [`Step::Cow`] without a name: it may become large, which the one for temporary files may not.
const UNNAMED_FOLDER: &str = "/var/tmp";

/// The steps as shell commands.
pub fn print(steps: &[Step]) -> String {
    let mut text = String::new();
    let mut loops = Vec::new();
    for step in steps {
        print_step(step, &mut loops, &mut text);
    }
    if !loops.is_empty() {
        // In use, they are only marked to go with the mapped devices.
        text += "losetup --detach";
        for variable in loops {
            let _ = write!(text, " ${variable}");
        }
        text.push('\n');
    }
    text
}

fn print_step(step: &Step, loops: &mut Vec<String>, text: &mut String) {
    let result = match step {
        Step::Layer {
            variable,
            path,
            offset,
            bytes,
        } => {
            loops.push(variable.clone());
            let path = quote(path);
            writeln!(
                text,
                "{variable}=$(losetup --find --show --read-only --direct-io=on --offset {offset} \
                 --sizelimit {bytes} {path})"
            )
        }
        Step::Tails { variable, paths } => {
            loops.push(variable.clone());
            text.push_str("file=$(mktemp)\n");
            for path in paths {
                let bytes = fs::metadata(path).map_or(0, |found| found.len()) % SECTOR_BYTES;
                let path = quote(path);
                let _ = writeln!(
                    text,
                    "tail -c {bytes} {path} >>$file; truncate -s %512 $file"
                );
            }
            writeln!(
                text,
                "{variable}=$(losetup --find --show --read-only $file); rm $file"
            )
        }
        Step::Cow {
            variable,
            path,
            create,
        } => {
            loops.push(variable.clone());
            let name = match path {
                Some(path) => quote(path),
                None => {
                    let _ = writeln!(text, "file=$(mktemp --tmpdir={UNNAMED_FOLDER})");
                    "$file".to_owned()
                }
            };
            if let Some(bytes) = create {
                let _ = writeln!(text, "truncate -s {bytes} {name}");
            }
            let _ = write!(
                text,
                "{variable}=$(losetup --find --show --direct-io=on {name})"
            );
            text.write_str(if path.is_none() { "; rm $file\n" } else { "\n" })
        }
        Step::Wipe(path) => {
            let path = quote(path);
            writeln!(
                text,
                "dd if=/dev/zero of={path} bs={WIPE_BYTES} count=1 conv=notrunc status=none"
            )
        }
        Step::Map {
            name,
            uuid,
            read_only,
            table,
        } => {
            let option = if *read_only { "--readonly " } else { "" };
            let table = render(table, |variable| format!("${variable}"));
            writeln!(
                text,
                "dmsetup create {name} {option}--uuid {uuid} --table \"{table}\""
            )
        }
    };
    // Writing to a string does not fail.
    result.unwrap_or_default();
}

fn quote(path: &Path) -> String {
    // A path with a NUL byte could not be opened either.
    shlex::try_quote(&path.to_string_lossy()).map_or_else(|_| String::new(), Into::into)
}

fn render(table: &[Line], find: impl Fn(&str) -> String) -> String {
    let lines: Vec<String> = table
        .iter()
        .map(|line| {
            let mut text = format!("{} {}", line.start, line.sectors);
            for word in &line.words {
                text.push(' ');
                match word {
                    Word::Text(word) => text += word,
                    Word::Device(Device::Path(path)) => text += &path.to_string_lossy(),
                    Word::Device(Device::Loop(variable)) => text += &find(variable),
                }
            }
            text
        })
        .collect();
    lines.join("\n")
}

/// Runs the steps; after a failure nothing is left of them.
///
/// # Errors
///
/// That of the first step that fails, and an interrupt.
pub fn run(steps: &[Step], interrupt: &Interrupt, report: &dyn Report) -> Result<()> {
    let mut done = Done::default();
    let result = steps.iter().try_for_each(|step| {
        interrupt.check(step.path())?;
        done.step(step)
    });
    if result.is_err() {
        done.undo(report);
    }
    result
}

impl Step {
    /// What an error about the step is about.
    fn path(&self) -> &Path {
        match self {
            Step::Layer { path, .. } | Step::Wipe(path) => path,
            Step::Cow { path, .. } => path.as_deref().unwrap_or(Path::new(UNNAMED_FOLDER)),
            Step::Tails { .. } => Path::new("/dev/loop-control"),
            Step::Map { name, .. } => Path::new(name),
        }
    }
}

/// What was made so far.
#[derive(Default)]
struct Done {
    loops: HashMap<String, Attached>,
    maps: Vec<String>,
    files: Vec<PathBuf>,
}

impl Done {
    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Layer {
                variable,
                path,
                offset,
                bytes,
            } => {
                let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
                let attached = attach(&file, path, *offset, *bytes)?;
                self.loops.insert(variable.clone(), attached);
            }
            Step::Tails { variable, paths } => {
                let attached = attach(&tails(paths)?, Path::new("memfd"), 0, 0)?;
                self.loops.insert(variable.clone(), attached);
            }
            Step::Cow {
                variable,
                path,
                create,
            } => {
                let file = self.cow(path.as_deref(), *create)?;
                let attached = attach(&file, step.path(), 0, 0)?;
                self.loops.insert(variable.clone(), attached);
            }
            Step::Wipe(path) => {
                let fail = |e| Error::io(path, "write", e);
                let mut file = File::options().write(true).open(path).map_err(fail)?;
                file.write_all(&[0; WIPE_BYTES]).map_err(fail)?;
                file.sync_all().map_err(fail)?;
            }
            Step::Map {
                name,
                uuid,
                read_only,
                table,
            } => self.map(name, uuid, *read_only, table)?,
        }
        Ok(())
    }

    fn cow(&mut self, path: Option<&Path>, create: Option<u64>) -> Result<File> {
        let file = match path {
            None => tempfile::tempfile_in(UNNAMED_FOLDER)
                .map_err(|e| Error::io(Path::new(UNNAMED_FOLDER), "create a file in", e))?,
            Some(path) => {
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(create.is_some())
                    .open(path)
                    .map_err(|e| Error::io(path, "open", e))?;
                if create.is_some() {
                    self.files.push(path.to_owned());
                }
                file
            }
        };
        if let Some(bytes) = create {
            let path = path.unwrap_or(Path::new(UNNAMED_FOLDER));
            file.set_len(bytes)
                .map_err(|e| Error::io(path, "set the size of", e))?;
        }
        Ok(file)
    }

    fn map(&mut self, name: &str, uuid: &str, read_only: bool, table: &[Line]) -> Result<()> {
        let table = render(table, |variable| match self.loops.get(variable) {
            Some(attached) => attached.node.to_string_lossy().into_owned(),
            None => String::new(),
        });
        tracing::debug!(name, table, "create");
        let mut arguments = vec!["create", name, "--uuid", uuid, "--table", &table];
        if read_only {
            arguments.push("--readonly");
        }
        let log = KernelLog::now();
        dmsetup(arguments).map_err(|e| match log.reason() {
            Some(reason) => Error::new(&node(name), format!("{} ({reason})", e.what())),
            None => Error::new(&node(name), e.what()),
        })?;
        self.maps.push(name.to_owned());
        Ok(())
    }

    fn undo(self, report: &dyn Report) {
        for name in self.maps.iter().rev() {
            if let Err(e) = dmsetup(["remove", "--retry", name]) {
                report.warn(&e);
            }
        }
        for path in &self.files {
            if let Err(e) = fs::remove_file(path) {
                report.warn(&Error::io(path, "remove", e));
            }
        }
    }
}

/// A file in memory with the last partial sector of each file, filled up with zeros.
fn tails(paths: &[PathBuf]) -> Result<File> {
    let fail = |e| Error::io(Path::new("memfd"), "write", e);
    let memory = rustix::fs::memfd_create("ovbd-tails", MemfdFlags::CLOEXEC)
        .map_err(|e| Error::io(Path::new("memfd"), "create", e.into()))?;
    let mut memory = File::from(memory);
    for path in paths {
        let input = FileRange::open(path)?;
        let mut sector = [0; SECTOR_BYTES as usize];
        let bytes = input.bytes() % SECTOR_BYTES;
        input.read(&mut sector[..bytes as usize], input.bytes() - bytes)?;
        memory.write_all(&sector).map_err(fail)?;
    }
    // A loop device is read-only if its file was opened so.
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
    File::open(name).map_err(fail)
}
