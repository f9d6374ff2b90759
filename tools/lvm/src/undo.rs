// SPDX-License-Identifier: GPL-2.0

//! What must be undone, whatever becomes of the program that did it.
//!
//! Every process that changes something for a while notes it first, in a file of its own in `/run/ovbd`, and holds a lock
//! on that file as long as it lives. A file whose lock is free is of a dead process: [`recover`], which every verb that
//! works with LVM begins with, takes back what is in it. What outlives a reboot besides, a volume that was not completed,
//! has the tag [`tags::PARTIAL`] and is removed only while it has that tag.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use ovbd_devices::lock::{make_folder, FOLDER};
use ovbd_layers::{
    error::{Error, Result},
    report::Report,
};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::{pool, program, tags, volume::Name, Volumes};

/// How long a metadata snapshot must stay of which is not known whose it is.
const UNKNOWN_OWNER: Duration = Duration::from_secs(15);

/// How long programs are waited for that a dead process has started.
const CHILDREN: Duration = Duration::from_secs(60);

/// How temporary folders are called.
pub const FOLDER_PREFIX: &str = ".ovbd-push-";

const SUFFIX: &str = ".undo";

/// Something that was done for a while. Volumes are known by their UUID: a name may be another's by now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// A volume was activated that was not active.
    Activated {
        /// Name when it was.
        name: String,
        /// UUID.
        uuid: String,
    },
    /// A pool has a metadata snapshot.
    Reserved {
        /// Name of the pool for device-mapper, of the device that takes messages.
        device: String,
        /// Where the metadata snapshot is, `None` as long as that is not known.
        root: Option<u64>,
    },
    /// A folder has files that only its process needs.
    Folder {
        /// Its path, whose last part begins with [`FOLDER_PREFIX`].
        path: PathBuf,
    },
    /// A volume is being made.
    Made {
        /// Name when it was.
        name: String,
        /// UUID.
        uuid: String,
    },
}

/// The notes of this process.
#[derive(Clone, Debug)]
pub struct Undo(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    file: File,
    path: PathBuf,
    actions: Vec<(u64, Action)>,
    next: u64,
}

impl Undo {
    /// Begins notes, which are empty.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn begin() -> Result<Self> {
        Self::begin_in(Path::new(FOLDER))
    }

    fn begin_in(folder: &Path) -> Result<Self> {
        make_folder(folder)?;
        let mut number = 0;
        loop {
            let path = folder.join(format!("lvm-{}-{number}{SUFFIX}", std::process::id()));
            number += 1;
            let opened = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path);
            let file = match opened {
                Ok(file) => file,
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(Error::io(&path, "create", e)),
            };
            let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            // Whoever recovers may have found it before it was locked, and removed it.
            let ours = file.metadata().is_ok_and(|found| found.nlink() == 1);
            if locked.is_ok() && ours {
                let inner = Inner {
                    file,
                    path,
                    actions: Vec::new(),
                    next: 0,
                };
                return Ok(Self(Arc::new(Mutex::new(inner))));
            }
        }
    }

    /// Notes an action that is about to be done; returns its number.
    ///
    /// # Errors
    ///
    /// The system's: then it must not be done.
    pub fn note(&self, action: Action) -> Result<u64> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = inner.next;
        inner.next += 1;
        inner.actions.push((number, action));
        inner.write()?;
        Ok(number)
    }

    /// What is noted under a number is now known better.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn change(&self, number: u64, action: Action) -> Result<()> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, noted)) = inner.actions.iter_mut().find(|(n, _)| *n == number) {
            *noted = action;
        }
        inner.write()
    }

    /// An action was undone, or is to stay.
    pub fn forget(&self, number: u64) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.actions.retain(|(n, _)| *n != number);
        // What is undone twice is refused harmlessly.
        let _ = inner.write();
    }
}

impl Inner {
    fn write(&mut self) -> Result<()> {
        let actions: Vec<&Action> = self.actions.iter().map(|(_, action)| action).collect();
        let mut text = serde_json::to_vec(&actions).unwrap_or_default();
        text.push(b'\n');
        let mut write = || {
            // One write of everything, then the end: a reader that finds more than one line takes the first.
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&text)?;
            self.file.set_len(text.len() as u64)
        };
        write().map_err(|e| Error::io(&self.path, "write", e))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.actions.is_empty() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Takes back what dead processes left. What cannot be is kept, and `report` hears of it.
///
/// # Errors
///
/// The notes cannot be listed.
pub fn recover(report: &dyn Report) -> Result<Vec<String>> {
    recover_in(Path::new(FOLDER), report, &take_back)
}

fn recover_in(
    folder: &Path,
    report: &dyn Report,
    take_back: &dyn Fn(&Action, &Path) -> Result<Option<String>>,
) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(folder, "list", e)),
    };
    let mut done = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if !name.to_string_lossy().ends_with(SUFFIX) {
            continue;
        }
        let Ok(mut file) = File::options().read(true).write(true).open(&path) else {
            continue;
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let mut text = String::new();
        if let Err(e) = file.read_to_string(&mut text) {
            report.warn(&Error::io(&path, "read", e));
            continue;
        }
        // A file without a line was never written to.
        let first = text.lines().next().unwrap_or("[]");
        let actions: Vec<Action> = match serde_json::from_str(first) {
            Ok(actions) => actions,
            Err(_) => {
                report.warn(&Error::new(&path, "not notes of ours; left as it is"));
                continue;
            }
        };
        // A program that it started may be about to do what is noted.
        let id = name.to_string_lossy();
        let id = id.split('-').nth(1).and_then(|id| id.parse().ok());
        let start = Instant::now();
        while id.is_some_and(program::runs_for) && start.elapsed() < CHILDREN {
            thread::sleep(Duration::from_millis(50));
        }
        let mut kept = 0;
        // The last thing first.
        for action in actions.iter().rev() {
            match take_back(action, &path) {
                Ok(said) => done.extend(said),
                Err(e) => {
                    kept += 1;
                    report.warn(&e);
                }
            }
        }
        if kept == 0 {
            let _ = fs::remove_file(&path);
        }
    }
    Ok(done)
}

/// Takes one action back that is noted in `notes`; says what was done, if anything had to be.
fn take_back(action: &Action, notes: &Path) -> Result<Option<String>> {
    match action {
        Action::Activated { name, uuid } => {
            let Some(volume) = find(name, uuid)? else {
                return Ok(None);
            };
            if !volume.active {
                return Ok(None);
            }
            if volume.open {
                return Err(volume
                    .name
                    .error("activated by a program that was killed, and in use now"));
            }
            let path = volume.name.path();
            program::run(
                &path,
                "lvchange",
                ["--activate", "n", &volume.name.to_string()],
            )?;
            Ok(Some(format!("{}: deactivated", volume.name)))
        }
        Action::Reserved { device, root } => {
            let Some(status) = pool::status(device)? else {
                return Ok(None);
            };
            match (status.held_root, root) {
                (None, _) => Ok(None),
                // Somebody else's by now.
                (Some(held), Some(ours)) if held != *ours => Ok(None),
                // Killed before it was noted. Nobody had one when we began, so it is ours, unless somebody else took one
                // since: whoever lives releases it soon.
                (Some(held), None) if !pool::stays(device, held, UNKNOWN_OWNER)? => Ok(None),
                (Some(_), _) => {
                    pool::message(device, "release_metadata_snap")?;
                    Ok(Some(format!("{device}: metadata snapshot released")))
                }
            }
        }
        Action::Folder { path } => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(FOLDER_PREFIX) && path.exists() {
                fs::remove_dir_all(path).map_err(|e| Error::io(path, "remove", e))?;
            }
            Ok(None)
        }
        Action::Made { name, uuid } => {
            let Some(volume) = find(name, uuid)? else {
                return Ok(None);
            };
            if !volume.tags.is_partial()
                || being_made_in(Path::new(FOLDER), Some(notes)).contains(name)
            {
                return Ok(None);
            }
            remove(&volume.name)?;
            Ok(Some(format!(
                "{}: removed, it was not complete",
                volume.name
            )))
        }
    }
}

/// The names of volumes that living processes are making.
pub fn being_made() -> Vec<String> {
    being_made_in(Path::new(FOLDER), None)
}

/// `recovered` is a file whose lock is ours: its process is dead.
fn being_made_in(folder: &Path, recovered: Option<&Path>) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_note = entry.file_name().to_string_lossy().ends_with(SUFFIX);
        if !is_note || Some(&*entry.path()) == recovered {
            continue;
        }
        let Ok(mut file) = File::open(entry.path()) else {
            continue;
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            continue;
        }
        let mut text = String::new();
        let read = file.read_to_string(&mut text);
        let first = text.lines().next().filter(|_| read.is_ok());
        let actions = first.and_then(|line| serde_json::from_str::<Vec<Action>>(line).ok());
        names.extend(
            actions
                .unwrap_or_default()
                .into_iter()
                .filter_map(|action| match action {
                    Action::Made { name, .. } => Some(name),
                    _ => None,
                }),
        );
    }
    names
}

fn find(name: &str, uuid: &str) -> Result<Option<crate::Volume>> {
    let Ok(name) = name.parse::<Name>() else {
        return Ok(None);
    };
    // The group may be gone, exported or not visible: there is nothing of it to undo then.
    let Ok(volumes) = Volumes::of_group(&name.vg) else {
        return Ok(None);
    };
    Ok(match uuid {
        // Noted before it was made: it has our tag, or it is not ours.
        "" => volumes
            .find(&name)
            .filter(|volume| volume.tags.is_partial()),
        uuid => volumes.by_uuid(uuid),
    }
    .cloned())
}

/// Removes a volume that has the tag of one that is not complete.
///
/// # Errors
///
/// LVM's: it is in use.
pub fn remove(name: &Name) -> Result<()> {
    let path = name.path();
    let full = name.to_string();
    // By name and tag: LVM itself looks that both fit.
    let select = format!(
        "lv_tags={{\"{}\"}} && lv_full_name=\"{full}\"",
        tags::PARTIAL
    );
    let words = ["--yes", "--quiet", "--select", &select, &name.vg];
    program::run(&path, "lvremove", words).map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn reserved(root: Option<u64>) -> Action {
        Action::Reserved {
            device: "vg-pool-tpool".to_owned(),
            root,
        }
    }

    fn made_by_dead() -> Action {
        Action::Made {
            name: "vg/y".to_owned(),
            uuid: String::new(),
        }
    }

    fn made() -> Action {
        Action::Made {
            name: "vg/x".to_owned(),
            uuid: "u".to_owned(),
        }
    }

    #[test]
    fn only_what_the_dead_left_is_taken_back_last_first() {
        let folder = tempfile::tempdir().unwrap();
        let taken = Mutex::new(Vec::new());
        let take = |action: &Action, notes: &Path| {
            // What is taken back is not of the living, though its file is locked now.
            assert_eq!(being_made_in(folder.path(), Some(notes)), ["vg/x"]);
            taken.lock().unwrap().push(action.clone());
            Ok(Some("done".to_owned()))
        };
        let living = Undo::begin_in(folder.path()).unwrap();
        living.note(made()).unwrap();
        assert_eq!(recover_in(folder.path(), &(), &take).unwrap().len(), 0);

        // Another process that dies: its lock goes, its file stays.
        let dead = Undo::begin_in(folder.path()).unwrap();
        dead.note(made_by_dead()).unwrap();
        let number = dead.note(reserved(None)).unwrap();
        dead.change(number, reserved(Some(7))).unwrap();
        drop(dead);
        assert_eq!(recover_in(folder.path(), &(), &take).unwrap().len(), 2);
        assert_eq!(*taken.lock().unwrap(), [reserved(Some(7)), made_by_dead()]);
        assert_eq!(recover_in(folder.path(), &(), &take).unwrap().len(), 0);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "that of the living"
        );

        assert_eq!(
            being_made_in(folder.path(), None),
            ["vg/x"],
            "of the living"
        );
        living.forget(0);
        assert!(being_made_in(folder.path(), None).is_empty());
        drop(living);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_be_taken_back_stays_noted() {
        let folder = tempfile::tempdir().unwrap();
        Undo::begin_in(folder.path()).unwrap().note(made()).unwrap();
        let fail = |_: &Action, _: &Path| Err(Error::new(Path::new("vg/x"), "in use"));
        assert_eq!(recover_in(folder.path(), &(), &fail).unwrap().len(), 0);
        assert_eq!(
            recover_in(folder.path(), &(), &|_, _| Ok(None))
                .unwrap()
                .len(),
            0
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_is_not_ours_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("lvm-1-0{SUFFIX}"));
        fs::write(&path, "rm -rf\n").unwrap();
        recover_in(folder.path(), &(), &|_, _| panic!("nothing to do")).unwrap();
        assert!(path.exists());
    }
}
