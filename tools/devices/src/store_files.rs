// SPDX-License-Identifier: GPL-2.0

//! The files that stores are in: the next generation's, beside that of the one before, and whose go.
//!
//! The store of a stack is in FILE, as after `--cow`. The next generation's is in FILE.gen<n>, and gets the name FILE when
//! nothing needs the old one any more. A store of which nobody gave the name has none, and so has the next one.

use std::{
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use ovbd_kernel::Number;

use crate::{
    cow::beginning,
    loops::Loop,
    record::{Below, Record},
    storage::Storage,
};
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    output::{directory, Output, Rules},
    sysfs::device_name,
};

/// Between the name of the first store and the number of a generation.
const SUFFIX: &str = ".gen";

/// What a store is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file that had no name or lost it: it goes with the device.
    Unnamed,
    /// A file.
    File(PathBuf),
    /// A block device.
    Device(PathBuf),
}

impl Place {
    /// That of a store in use.
    ///
    /// # Errors
    ///
    /// The file has another name here than where it was attached, so that it cannot be told.
    pub fn of(store: Number, storage: &Storage) -> Result<Self> {
        let Some(user) = storage.loops().iter().find(|user| user.number == store) else {
            return Ok(Place::Device(device_name(store).into()));
        };
        // Ours goes with the device. One that somebody else attached is a device like any other.
        if user.status.block_device.is_some() || !user.status.autoclear {
            return Ok(Place::Device(user.node.clone()));
        }
        if is_at(user, &user.backing)? {
            return Ok(Place::File(user.backing.clone()));
        }
        // The kernel says so of a file without a name.
        if user.backing.as_os_str().as_bytes().ends_with(b" (deleted)") {
            return Ok(Place::Unnamed);
        }
        let what = format!(
            "its file {} has another name here (--cow FILE says where the next store is to be)",
            user.backing.display()
        );
        Err(Error::new(&user.node, what))
    }
}

impl Place {
    /// Its name, unless it goes with the device or with the machine's memory.
    pub fn on_disk(self, storage: &Storage) -> Option<PathBuf> {
        match self {
            Place::Unnamed => None,
            Place::File(path) => (!storage.is_in_memory(&path)).then_some(path),
            Place::Device(path) => {
                let mut loops = storage.loops().iter();
                let user = loops.find(|user| user.node == path);
                let in_memory = user.is_some_and(|user| storage.is_in_memory(&user.backing));
                (!in_memory).then_some(path)
            }
        }
    }
}

fn is_at(user: &Loop, path: &Path) -> Result<bool> {
    Ok(FileId::at(path)?.is_some_and(|found| user.is_on(found)))
}

/// Name of the store that a stack began with, from that of any of its generations.
fn base(path: &Path) -> PathBuf {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return path.to_owned();
    };
    match name.rsplit_once(SUFFIX) {
        Some((base, number)) if !base.is_empty() && number.parse::<u32>().is_ok() => {
            path.with_file_name(base)
        }
        _ => path.to_owned(),
    }
}

/// Name of the store of a generation.
pub fn name_of(path: &Path, generation: u32) -> PathBuf {
    let mut name = base(path).into_os_string();
    name.push(format!("{SUFFIX}{generation}"));
    name.into()
}

/// The files of generations after the one in `path`, by their names.
///
/// # Errors
///
/// The folder cannot be read.
pub fn later(path: &Path) -> Result<Vec<PathBuf>> {
    let folder = directory(path);
    let Some(first) = path.file_name().map(OsStrExt::as_bytes) else {
        return Ok(Vec::new());
    };
    let fail = |e| Error::io(folder, "list", e);
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(fail)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(fail)?.file_name();
        let number = name
            .as_bytes()
            .strip_prefix(first)
            .and_then(|rest| rest.strip_prefix(SUFFIX.as_bytes()));
        if number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
        {
            found.push(path.with_file_name(name));
        }
    }
    found.sort();
    Ok(found)
}

/// Makes the file of a new store, of `bytes`. It has its name only when it is complete, and nobody may read it who may not
/// read `old`, the file of the store before it.
///
/// # Errors
///
/// There is a file of that name, and the system's.
pub fn create(
    path: &Path,
    old: Option<PathBuf>,
    bytes: u64,
    chunk_sectors: u32,
    record: &Record,
) -> Result<()> {
    let rules = Rules {
        inputs: old.as_slice(),
        ..Rules::default()
    };
    let output = Output::create_file(path, rules)?;
    if output.is_stream() {
        return Err(Error::new(path, "not a regular file"));
    }
    output.set_size(bytes)?;
    output.write_at(&beginning(chunk_sectors, record), 0)?;
    output.finish()
}

/// Removes the file of a new store that a killed commit left behind: nobody uses it and it is as it was made.
///
/// # Errors
///
/// It is something else, which stays.
pub fn remove_unused(path: &Path, below: &Record, storage: &Storage) -> Result<()> {
    let Some(found) = FileId::at(path)? else {
        return Ok(());
    };
    let used = storage.loops().iter().any(|user| user.is_on(found));
    let record = Record::read(path)?;
    let is_ours = record.is_some_and(|record| record.below == Below::Store(below.own));
    if used || !is_ours || !is_untouched(path)? {
        let what =
            "exists, and is not what an interrupted commit would have left (move it elsewhere)";
        return Err(Error::new(path, what));
    }
    remove(path)
}

/// Whether a store has no exception: the first area of a new one is a hole.
fn is_untouched(path: &Path) -> Result<bool> {
    use std::os::unix::fs::FileExt;
    let fail = |e| Error::io(path, "read", e);
    let file = File::open(path).map_err(fail)?;
    let mut header = [0; 16];
    file.read_exact_at(&mut header, 0).map_err(fail)?;
    let mut field = [0; 4];
    field.copy_from_slice(&header[12..]);
    let chunk_bytes = u64::from(u32::from_le_bytes(field)) * 512;
    let mut first = [0; 16];
    file.read_exact_at(&mut first, chunk_bytes).map_err(fail)?;
    Ok(first == [0; 16])
}

/// The stores that the one at `path` was written over and that nobody uses, newest first, among those beside it: `record`
/// is its own. Where a layer was made of them, they are there still because that was interrupted.
///
/// # Errors
///
/// The system's.
pub fn below(path: &Path, record: &Record, storage: &Storage) -> Result<Vec<(Place, FileId)>> {
    let mut old = Vec::new();
    let first = base(path);
    let mut rest: Vec<PathBuf> = later(&first)?;
    rest.push(first);
    rest.retain(|other| other != path);
    let mut record = *record;
    while let Below::Store(below) = record.below {
        // What is there may be anything.
        let found = rest.iter().enumerate().find_map(|(at, path)| {
            let found = Record::read(path).ok()??;
            (found.own == below).then_some((at, found))
        });
        let Some((at, found)) = found else {
            break;
        };
        record = found;
        let path = rest.swap_remove(at);
        let Some(id) = FileId::at(&path)? else {
            break;
        };
        if storage.loops().iter().any(|user| user.is_on(id)) {
            break;
        }
        old.push((Place::File(path), id));
    }
    Ok(old)
}

/// Removes the files of stores that a layer made unneeded, newest first in `old`, if they are still the ones that they
/// were; the newest store gets the name that the first one had. What is left after an interruption [`below`] finds.
///
/// # Errors
///
/// The system's. What could not be removed is there still.
pub fn settle(old: &[(Place, FileId)], newest: &Place) -> Result<()> {
    let newest = match newest {
        Place::File(path) => Some(path.as_path()),
        _ => None,
    };
    let first = newest.map(base);
    let mut folders = Vec::new();
    let mut is_renamed = false;
    let rename = |newest: &Path, first: &Path| {
        fs::rename(newest, first).map_err(|e| Error::io(newest, "rename", e))
    };
    // The oldest goes first: each that is left is named by one that is left.
    for (place, id) in old.iter().rev() {
        let Place::File(path) = place else {
            continue;
        };
        // Under that name may be another file by now.
        if FileId::at(path)? != Some(*id) {
            continue;
        }
        match newest {
            // It goes when the newest one takes its name.
            Some(newest) if Some(path) == first.as_ref() && newest != path => {
                rename(newest, path)?;
                is_renamed = true;
            }
            _ => remove(path)?,
        }
        folders.push(directory(path).to_owned());
    }
    if let (Some(newest), Some(first), false) = (newest, &first, is_renamed) {
        if newest != first && FileId::at(first)?.is_none() {
            rename(newest, first)?;
            folders.push(directory(first).to_owned());
        }
    }
    folders.dedup();
    folders.iter().try_for_each(|folder| sync_folder(folder))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(path, "remove", e)),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|e| Error::io(folder, "sync", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (path, wanted) in [
            ("/x/cow", "/x/cow.gen3"),
            ("/x/cow.gen2", "/x/cow.gen3"),
            ("/x/.gen2", "/x/.gen2.gen3"),
            ("/x/cow.gene", "/x/cow.gene.gen3"),
            ("cow.gen1.gen2", "cow.gen1.gen3"),
        ] {
            assert_eq!(name_of(Path::new(path), 3), Path::new(wanted));
        }
    }

    #[test]
    fn only_what_is_still_the_same_file_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let make = |name: &str| {
            fs::write(path(name), name).unwrap();
            (
                Place::File(path(name)),
                FileId::at(&path(name)).unwrap().unwrap(),
            )
        };
        let old = [make("cow.gen1"), make("cow")];
        let (newest, _) = make("cow.gen2");
        // Somebody put another file there.
        fs::write(path("other"), "other").unwrap();
        fs::rename(path("other"), path("cow.gen1")).unwrap();
        settle(&old, &newest).unwrap();
        assert_eq!(fs::read(path("cow")).unwrap(), b"cow.gen2");
        assert_eq!(fs::read(path("cow.gen1")).unwrap(), b"other");
        assert!(!path("cow.gen2").exists());
        // The name of the first is taken by another file: the newest keeps its own.
        let old = [make("cow")];
        let (newest, _) = make("cow.gen3");
        fs::write(path("other"), "other").unwrap();
        fs::rename(path("other"), path("cow")).unwrap();
        settle(&old, &newest).unwrap();
        assert_eq!(fs::read(path("cow")).unwrap(), b"other");
        assert!(path("cow.gen3").exists());
    }

    #[test]
    fn stores_that_an_interruption_left_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let storage = Storage::default();
        let mut below = Below::Unknown;
        let mut records = Vec::new();
        for (number, name) in ["cow", "cow.gen1", "cow.gen2", "cow.gen3"]
            .iter()
            .enumerate()
        {
            let record = Record::new(number as u32, 8, below).unwrap();
            create(&path(name), None, 1 << 20, 8, &record).unwrap();
            below = Below::Store(record.own);
            records.push(record);
        }
        let newest = path("cow.gen3");
        let names = |record: &Record| -> Vec<PathBuf> {
            let found = super::below(&newest, record, &storage).unwrap();
            let path = |(place, _): (Place, _)| match place {
                Place::File(path) => path,
                _ => panic!("a file"),
            };
            found.into_iter().map(path).collect()
        };
        let record = records[3];
        let all = ["cow.gen2", "cow.gen1", "cow"].map(path);
        assert_eq!(names(&record), all);
        // One that is gone: those below it were removed before.
        fs::remove_file(path("cow")).unwrap();
        assert_eq!(names(&record), all[..2]);
        let old = super::below(&newest, &record, &storage).unwrap();
        settle(&old, &Place::File(newest.clone())).unwrap();
        assert_eq!(Record::read(&path("cow")).unwrap().unwrap().own, record.own);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_store_that_was_used_is_not_taken_for_a_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cow.gen1");
        let storage = Storage::default();
        let below = Record::new(0, 8, Below::Unknown).unwrap();
        let own = Record::new(1, 8, Below::Store(below.own)).unwrap();
        create(&path, None, 1 << 20, 8, &own).unwrap();
        assert!(
            create(&path, None, 1 << 20, 8, &own).is_err(),
            "nothing is replaced"
        );
        let other = Record::new(0, 8, Below::Unknown).unwrap();
        assert!(remove_unused(&path, &other, &storage).is_err());
        let file = File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1], 4096 + 8).unwrap();
        assert!(remove_unused(&path, &below, &storage).is_err());
        std::os::unix::fs::FileExt::write_all_at(&file, &[0], 4096 + 8).unwrap();
        remove_unused(&path, &below, &storage).unwrap();
        assert!(!path.exists());
    }
}
