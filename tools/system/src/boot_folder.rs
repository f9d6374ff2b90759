// SPDX-License-Identifier: GPL-2.0

//! The boot partition: its entries, and the kernels and initrds that they name.
//!
//! ```text
//! loader/entries/ovbd-ORDER-NUMBER+3.conf   generations, see [`crate::entry`]
//! ovbd/linux-<digest>, ovbd/initrd-<digest> named by their content: generations with the same kernel share it
//! */.ovbd-new                               what is not complete
//! ```
//!
//! Every file is complete and on the disk before it has its name, and what an entry names is there before the entry and
//! goes after it. So whenever the power goes, each entry that there is can be booted. The partition is FAT in most cases,
//! where a rename can leave two names of one entry, which are told apart by their numbers, or a name with nothing in it, which
//! is no entry.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use ovbd_layers::error::{Error, Result};
use sha2::{Digest, Sha256};

use crate::entry::{Name, State, Text, Tries};

/// Where loaders look for entries.
pub const ENTRIES: &str = "loader/entries";
/// Where the settings of systemd-boot are.
const SETTINGS: &str = "loader/loader.conf";
/// Where kernels and initrds are.
const KERNELS: &str = "ovbd";
/// What is not complete.
const NEW: &str = ".ovbd-new";
/// Most bytes of an entry.
const MAX_ENTRY_BYTES: u64 = 64 << 10;
/// Digits of a digest in a name: 128 bits.
const DIGITS: usize = 32;

/// A generation: an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// What the name says.
    pub name: Name,
    /// What the file says.
    pub text: Text,
}

impl Generation {
    /// What is known of it.
    pub fn state(&self) -> State {
        match self.name.tries {
            None => State::Good,
            Some(tries) if tries.left == 0 => State::Bad(tries),
            Some(tries) => State::Trying(tries),
        }
    }
}

/// A new generation.
#[derive(Clone, Debug)]
pub struct New<'a> {
    /// What a menu shows of it, after its number.
    pub title: &'a str,
    /// Release of the kernel, where it is known.
    pub version: Option<String>,
    /// Words of the command line.
    pub options: &'a str,
    /// Device and name of the image.
    pub stack: (&'a str, &'a str),
    /// How often the loader may try it before it takes another; 0 if nobody counts.
    pub tries: u32,
}

/// The folder on which the boot partition is mounted.
#[derive(Debug)]
pub struct BootFolder {
    path: PathBuf,
    files: Files,
}

impl BootFolder {
    /// A folder with entries.
    ///
    /// # Errors
    ///
    /// It has no folder for entries.
    pub fn open(path: &Path) -> Result<Self> {
        let entries = path.join(ENTRIES);
        fs::metadata(&entries).map_err(|e| Error::io(&entries, "open", e))?;
        Ok(Self {
            path: path.to_owned(),
            files: Files::default(),
        })
    }

    /// A folder that is to have entries.
    ///
    /// # Errors
    ///
    /// There is no such folder, and the system's.
    pub fn create(path: &Path) -> Result<Self> {
        fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        let entries = path.join(ENTRIES);
        fs::create_dir_all(&entries).map_err(|e| Error::io(&entries, "make", e))?;
        sync_folder(&path.join("loader"))?;
        sync_folder(path)?;
        Self::open(path)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file of a generation.
    pub fn entry_path(&self, generation: &Generation) -> PathBuf {
        self.entries().join(generation.name.to_string())
    }

    fn entries(&self) -> PathBuf {
        self.path.join(ENTRIES)
    }

    /// The folder of entries, for a lock on it: FAT has no room for a file of its own, and keeps none.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn lock_file(&self) -> Result<(File, PathBuf)> {
        let path = self.entries();
        let file = File::open(&path).map_err(|e| Error::io(&path, "open", e))?;
        Ok((file, path))
    }

    /// All generations, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn generations(&self) -> Result<Vec<Generation>> {
        let folder = self.entries();
        let mut found: BTreeMap<u64, Name> = BTreeMap::new();
        for name in self.names()? {
            if self.is_empty(name)? {
                continue;
            }
            let known = found.entry(name.number).or_insert(name);
            if is_later(name, *known) {
                *known = name;
            }
        }
        let read = |name: Name| {
            let path = folder.join(name.to_string());
            let fail = |e| Error::io(&path, "read", e);
            let mut text = Vec::new();
            let file = File::open(&path).map_err(fail)?;
            file.take(MAX_ENTRY_BYTES)
                .read_to_end(&mut text)
                .map_err(fail)?;
            let text = Text::parse(&String::from_utf8_lossy(&text));
            Ok(Generation { name, text })
        };
        found.into_values().map(read).collect()
    }

    /// Whether an entry has nothing in it, as what a rename leaves whose power went too early.
    fn is_empty(&self, name: Name) -> Result<bool> {
        let path = self.entries().join(name.to_string());
        let about = fs::metadata(&path).map_err(|e| Error::io(&path, "look at", e))?;
        Ok(about.len() == 0)
    }

    /// The names of all entries that are ours.
    fn names(&self) -> Result<Vec<Name>> {
        let names = list(&self.entries())?;
        Ok(names.iter().filter_map(|name| Name::parse(name)).collect())
    }

    /// The generation of a number.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn find(&self, number: u64) -> Result<Generation> {
        let mut all = self.generations()?.into_iter();
        all.find(|generation| generation.name.number == number)
            .ok_or_else(|| Error::new(&self.entries(), format!("no generation {number}")))
    }

    /// Removes what a program has left here that was killed: files that are not complete, second names, and kernels that no
    /// entry has. Shows by the way whether anything can be written, before anything else is done.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn tidy(&self) -> Result<()> {
        let folder = self.entries();
        let written = self.files.write(&folder, &mut io::empty());
        let removed = self.files.remove(&folder.join(NEW));
        written.and(removed)?;
        let kept: HashSet<Name> = self.generations()?.iter().map(|one| one.name).collect();
        for name in self.names()? {
            if !kept.contains(&name) {
                self.files.remove(&folder.join(name.to_string()))?;
            }
        }
        self.remove_unused()
    }

    /// Removes kernels and initrds that no entry names. Entries of others count.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn remove_unused(&self) -> Result<()> {
        let folder = self.path.join(KERNELS);
        if !folder.exists() {
            return Ok(());
        }
        let mut used = HashSet::new();
        for name in list(&self.entries())? {
            let path = self.entries().join(&name);
            let text = fs::read(&path).map_err(|e| Error::io(&path, "read", e))?;
            for line in String::from_utf8_lossy(&text).lines() {
                used.extend(line.split_whitespace().skip(1).map(str::to_owned));
            }
        }
        for name in list(&folder)? {
            let ours = ["linux-", "initrd-", NEW];
            let named = used.contains(&format!("/{KERNELS}/{name}"));
            if ours.iter().any(|prefix| name.starts_with(prefix)) && !named {
                self.files.remove(&folder.join(&name))?;
            }
        }
        Ok(())
    }

    /// Writes the settings of systemd-boot where there are none: these entries before all others, and a menu.
    ///
    /// # Errors
    ///
    /// The system's. False if there are some.
    pub fn write_settings(&self) -> Result<bool> {
        let path = self.path.join(SETTINGS);
        if path.exists() {
            return Ok(false);
        }
        let mut text = b"default ovbd-*\ntimeout 3\n".as_slice();
        let folder = self.path.join("loader");
        self.files.put(&folder, &path, &mut text).map(|()| true)
    }

    /// Whether the settings of systemd-boot, if it is that, prefer these entries.
    pub fn is_preferred(&self) -> bool {
        let text = fs::read_to_string(self.path.join(SETTINGS)).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.trim().split_once(char::is_whitespace))
            .any(|(key, value)| key == "default" && value.trim() == "ovbd-*")
    }

    /// Puts a kernel or an initrd there, unless it is: `kind` is "linux" or "initrd". Returns what an entry calls it.
    ///
    /// # Errors
    ///
    /// `source` cannot be read, and the system's. Nothing is left then.
    pub fn put_kernel<R: Read + Seek>(
        &self,
        kind: &str,
        source: &mut R,
        subject: &Path,
    ) -> Result<String> {
        let folder = self.path.join(KERNELS);
        if !folder.exists() {
            self.files.make_folder(&folder)?;
        }
        let digest = digest(source).map_err(|e| Error::io(subject, "read", e))?;
        let name = format!("{kind}-{}", &digest[..DIGITS]);
        let path = folder.join(&name);
        let same = match File::open(&path) {
            Ok(mut file) => digest_of(&mut file).is_ok_and(|found| found == digest),
            Err(_) => false,
        };
        if !same {
            source
                .seek(SeekFrom::Start(0))
                .map_err(|e| Error::io(subject, "read", e))?;
            self.files.put(&folder, &path, source)?;
        }
        Ok(format!("/{KERNELS}/{name}"))
    }

    /// Adds a generation, which is the default from now on.
    ///
    /// # Errors
    ///
    /// The system's. Nothing has changed then.
    pub fn add(&self, new: &New<'_>, linux: String, initrd: String) -> Result<Generation> {
        let (order, number) = self.next()?;
        let tries = Tries {
            left: new.tries,
            done: 0,
        };
        let (device, image) = new.stack;
        let generation = Generation {
            name: Name {
                order,
                number,
                tries: (new.tries > 0).then_some(tries),
            },
            text: Text {
                title: format!("Generation {number}: {}", new.title),
                version: new.version.clone(),
                linux,
                initrd,
                options: crate::entry::command_line(new.options, device, image, number),
            },
        };
        let text = generation.text.to_string();
        let path = self.entry_path(&generation);
        let put = self.files.put(&self.entries(), &path, &mut text.as_bytes());
        if put.is_err() {
            // It has its name already where only that may not be on the disk.
            let _ = self.files.remove(&path);
        }
        put.map(|()| generation)
    }

    /// The next place, and the next number.
    fn next(&self) -> Result<(u64, u64)> {
        let names = self.names()?;
        let order = names.iter().map(|name| name.order).max().unwrap_or(0);
        let number = names.iter().map(|name| name.number).max().unwrap_or(0);
        match (order.checked_add(1), number.checked_add(1)) {
            (Some(order), Some(number)) => Ok((order, number)),
            _ => Err(Error::new(&self.entries(), "no number is left")),
        }
    }

    /// Makes a generation the default, by a rename. One that is bad may be tried `tries` times again.
    ///
    /// # Errors
    ///
    /// The system's. Nothing has changed then.
    pub fn make_default(&self, generation: &Generation, tries: u32) -> Result<Generation> {
        let mut moved = generation.clone();
        moved.name.order = self.next()?.0;
        if let State::Bad(_) = generation.state() {
            moved.name.tries = (tries > 0).then_some(Tries {
                left: tries,
                done: 0,
            });
        }
        let (from, to) = (self.entry_path(generation), self.entry_path(&moved));
        self.files.rename(&from, &to, &self.entries())?;
        Ok(moved)
    }

    /// Removes a generation, and what it alone needs of this partition.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn remove(&self, generation: &Generation) -> Result<()> {
        let folder = self.entries();
        self.files.remove(&self.entry_path(generation))?;
        sync_folder(&folder)?;
        self.remove_unused()
    }

    /// What is missing on this partition of what a generation needs.
    pub fn missing(&self, generation: &Generation) -> Vec<PathBuf> {
        [&generation.text.linux, &generation.text.initrd]
            .into_iter()
            .map(|name| self.path.join(name.trim_start_matches('/')))
            .filter(|path| !path.is_file())
            .collect()
    }
}

/// Of two names of one generation, that which was given last.
fn is_later(one: Name, other: Name) -> bool {
    let left = |name: Name| name.tries.map_or(0, |tries| tries.left);
    one.order > other.order || one.order == other.order && left(one) < left(other)
}

/// The names in a folder that are text; no other is ours.
fn list(folder: &Path) -> Result<Vec<String>> {
    let fail = |e| Error::io(folder, "list", e);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        names.extend(entry.map_err(fail)?.file_name().into_string());
    }
    Ok(names)
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|e| Error::io(folder, "write", e))
}

fn digest<R: Read + Seek>(source: &mut R) -> io::Result<String> {
    source.seek(SeekFrom::Start(0))?;
    digest_of(source)
}

fn digest_of(source: &mut impl Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(source, &mut hasher)?;
    Ok(format!("{:x}", hasher.finalize()))
}

/// What changes the partition, step by step.
#[derive(Debug, Default)]
struct Files {
    #[cfg(test)]
    fault: tests::Fault,
}

impl Files {
    /// Whether a step is done; tests see to it that some are not.
    fn step(&self, _path: &Path) -> Result<()> {
        #[cfg(test)]
        self.fault.step(_path)?;
        Ok(())
    }

    /// Puts a file in its place: complete and on the disk before it has its name, and its name too then.
    fn put(&self, folder: &Path, path: &Path, source: &mut impl Read) -> Result<()> {
        let new = folder.join(NEW);
        let done = self
            .write(folder, source)
            .and_then(|()| self.rename(&new, path, folder));
        if done.is_err() {
            // The first error is what matters.
            let _ = self.remove(&new);
        }
        done
    }

    /// Writes the file that is not complete in a folder.
    fn write(&self, folder: &Path, source: &mut impl Read) -> Result<()> {
        let new = folder.join(NEW);
        let fail = |e| Error::io(&new, "write", e);
        self.step(&new)?;
        let mut file = File::create(&new).map_err(fail)?;
        self.step(&new)?;
        io::copy(source, &mut file).map_err(fail)?;
        file.flush().map_err(fail)?;
        self.step(&new)?;
        file.sync_all().map_err(fail)
    }

    /// Gives a file another name, for good. FAT keeps with the name where the content is and how long, and writes a new
    /// name without: that comes with the file, and so the file is synced before its folder.
    fn rename(&self, from: &Path, to: &Path, folder: &Path) -> Result<()> {
        self.step(to)?;
        fs::rename(from, to).map_err(|e| Error::io(to, "rename", e))?;
        self.step(to)?;
        File::open(to)
            .and_then(|file| file.sync_all())
            .map_err(|e| Error::io(to, "write", e))?;
        sync_folder(folder)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.step(path)?;
        match fs::remove_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(|e| Error::io(path, "remove", e)),
        }
    }

    fn make_folder(&self, folder: &Path) -> Result<()> {
        self.step(folder)?;
        fs::create_dir(folder).map_err(|e| Error::io(folder, "make", e))?;
        folder.parent().map_or(Ok(()), sync_folder)
    }
}

#[cfg(test)]
mod tests;
