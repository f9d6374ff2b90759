// SPDX-License-Identifier: GPL-2.0

//! What must be undone, whatever becomes of the program that did it.
//!
//! Every process that changes something for a while notes it first, in a file of its own in `/run/ovbd`, and holds a lock
//! on that file as long as it lives. A file whose lock is free is of a dead process: [`recover`], which every verb that
//! works with LVM begins with, takes back what is in it. What cannot be taken back, or not be told, stays noted. What
//! outlives a reboot besides, a volume that was not completed, has a tag ([`crate::partial`]).

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

use crate::{
    active,
    partial::{self, Mark},
    pool, program,
};

/// How long programs are waited for that a dead process has started.
const CHILDREN: Duration = Duration::from_secs(60);

/// How often notes are read again that are being written.
const RETRIES: u32 = 20;

/// How temporary folders are called.
pub const FOLDER_PREFIX: &str = ".ovbd-push-";

const SUFFIX: &str = ".undo";

/// Something that was done for a while. Volumes are known by their UUID or mark: a name may be another's by now.
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
        /// UUID of the pool.
        pool: String,
        /// Its name for device-mapper, of the device that takes messages.
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
        /// Its [`Mark`].
        mark: String,
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
            let path = folder.join(format!("lvm-{}-{number}{SUFFIX}", program::this_process()));
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
        let actions = self.actions.iter().map(|(_, action)| action);
        write_actions(&self.file, &self.path, actions)
    }
}

fn write_actions<'a>(
    mut file: &File,
    path: &Path,
    actions: impl Iterator<Item = &'a Action>,
) -> Result<()> {
    let actions: Vec<&Action> = actions.collect();
    let mut text = serde_json::to_vec(&actions).unwrap_or_default();
    text.push(b'\n');
    let mut write = || {
        // One write of everything, then the end: a reader that finds more than one line takes the first.
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&text)?;
        file.set_len(text.len() as u64)
    };
    write().map_err(|e| Error::io(path, "write", e))
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.actions.is_empty() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What became of an action that a dead process noted.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// It was taken back, and what to say of it.
    Done(String),
    /// Nothing was to be done.
    Nothing,
    /// A living process does it, or is in the way: it stays noted.
    Later,
}

/// What was found of dead processes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// What was taken back, a line each.
    pub done: Vec<String>,
    /// How much could not be, of which the report has heard.
    pub kept: usize,
}

/// Takes back what dead processes left. What cannot be is kept, and `report` hears of it.
///
/// # Errors
///
/// The notes cannot be listed.
pub fn recover(report: &dyn Report) -> Result<Recovered> {
    recover_in(Path::new(FOLDER), report, &|_| true, &|action| {
        take_back(action, false)
    })
}

/// As [`recover`], of one pool only, by its UUID: metadata snapshots of dead processes. The caller has the pool's lock.
pub(crate) fn recover_pool(uuid: &str, report: &dyn Report) -> Result<Recovered> {
    let of_pool = |action: &Action| matches!(action, Action::Reserved { pool, .. } if pool == uuid);
    recover_in(Path::new(FOLDER), report, &of_pool, &|action| {
        take_back(action, true)
    })
}

/// The files with notes. One that cannot be opened is in the list as an error.
fn files(folder: &Path) -> Result<Vec<Result<(PathBuf, File)>>> {
    let fail = |e| Error::io(folder, "list", e);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        if !entry.file_name().to_string_lossy().ends_with(SUFFIX) {
            continue;
        }
        let path = entry.path();
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => found.push(Ok((path, file))),
            // Its process has ended meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => found.push(Err(Error::io(&path, "open", e))),
        }
    }
    Ok(found)
}

fn is_free(file: &File, operation: FlockOperation, path: &Path) -> Result<bool> {
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(Error::io(path, "lock", e.into())),
    }
}

fn read_actions(file: &mut File, path: &Path) -> Result<Vec<Action>> {
    let mut text = Vec::new();
    let read = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut text));
    read.map_err(|e| Error::io(path, "read", e))?;
    // A file without a line was never written to.
    let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if text.is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(first).map_err(|_| {
        let what = "not notes of ours, or damaged: what a process that was killed has left is not known, and stays \
                    (look at \"ovbd lvm status\", then remove the file)";
        Error::new(path, what)
    })
}

fn recover_in(
    folder: &Path,
    report: &dyn Report,
    which: &dyn Fn(&Action) -> bool,
    take_back: &dyn Fn(&Action) -> Result<Outcome>,
) -> Result<Recovered> {
    let mut found = Recovered::default();
    for entry in files(folder)? {
        let one =
            entry.and_then(|(path, file)| recover_file(&path, file, report, which, take_back));
        match one {
            Ok(one) => {
                found.done.extend(one.done);
                found.kept += one.kept;
            }
            Err(e) => {
                found.kept += 1;
                report.warn(&e);
            }
        }
    }
    Ok(found)
}

/// The process whose notes they are, as programs have it that it starts.
fn process_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_prefix("lvm-")?;
    Some(name.rsplit_once('-')?.0.to_owned())
}

fn recover_file(
    path: &Path,
    mut file: File,
    report: &dyn Report,
    which: &dyn Fn(&Action) -> bool,
    take_back: &dyn Fn(&Action) -> Result<Outcome>,
) -> Result<Recovered> {
    let mut found = Recovered::default();
    if !is_free(&file, FlockOperation::NonBlockingLockExclusive, path)? {
        return Ok(found);
    }
    let actions = read_actions(&mut file, path)?;
    if !actions.is_empty() && !actions.iter().any(which) {
        return Ok(found);
    }
    // A program that it started may be about to do what is noted.
    let process = process_of(path);
    let start = Instant::now();
    while process.as_deref().is_some_and(program::runs_for) {
        if start.elapsed() >= CHILDREN {
            let what = "a program runs still that was started by the process that is gone: what is noted stays";
            return Err(Error::new(path, what));
        }
        thread::sleep(Duration::from_millis(50));
    }
    let mut rest = Vec::new();
    // The last thing first.
    for action in actions.into_iter().rev() {
        if !which(&action) {
            rest.push(action);
            continue;
        }
        match take_back(&action) {
            Ok(Outcome::Done(said)) => found.done.push(said),
            Ok(Outcome::Nothing) => {}
            Ok(Outcome::Later) => rest.push(action),
            Err(e) => {
                found.kept += 1;
                report.warn(&e);
                rest.push(action);
            }
        }
    }
    rest.reverse();
    match rest.is_empty() {
        true => {
            let _ = fs::remove_file(path);
        }
        false => write_actions(&file, path, rest.iter())?,
    }
    Ok(found)
}

/// Takes one action back; says what was done, if anything had to be. The caller has the lock of the action's pool, or not.
fn take_back(action: &Action, has_lock: bool) -> Result<Outcome> {
    match action {
        Action::Activated { name, uuid } => {
            active::deactivate_left(name, uuid).map(|ended| match ended {
                Some(name) => Outcome::Done(format!("{name}: deactivated")),
                None => Outcome::Nothing,
            })
        }
        Action::Reserved { pool, device, root } => {
            let lock = match has_lock {
                true => None,
                // Whoever has it looks for what the dead have left.
                false => match pool::Lock::try_take(pool)? {
                    None => return Ok(Outcome::Later),
                    lock => lock,
                },
            };
            let released = pool::release_left(device, *root);
            drop(lock);
            Ok(match released? {
                true => Outcome::Done(format!("{device}: metadata snapshot released")),
                false => Outcome::Nothing,
            })
        }
        Action::Folder { path } => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(FOLDER_PREFIX) && path.exists() {
                fs::remove_dir_all(path).map_err(|e| Error::io(path, "remove", e))?;
            }
            Ok(Outcome::Nothing)
        }
        Action::Made { mark } => Ok(match partial::remove_marked(&Mark::noted(mark))? {
            Some(name) => Outcome::Done(format!("{name}: removed, it was not complete")),
            None => Outcome::Nothing,
        }),
    }
}

/// The marks of volumes that living processes make.
#[derive(Debug, Default)]
pub struct Living {
    marks: Vec<String>,
    unknown: bool,
}

impl Living {
    #[cfg(test)]
    pub(crate) fn of(marks: Vec<String>, unknown: bool) -> Self {
        Self { marks, unknown }
    }

    /// Whether one of them makes the volume of this mark.
    pub fn makes(&self, mark: &Mark) -> bool {
        self.marks.iter().any(|noted| noted == mark.as_str())
    }

    /// Whether there is one of which it cannot be told.
    pub fn unknown(&self) -> bool {
        self.unknown
    }
}

/// What living processes make, and those whose notes are kept though they are gone.
///
/// # Errors
///
/// The notes cannot be listed.
pub fn living() -> Result<Living> {
    living_in(Path::new(FOLDER))
}

fn living_in(folder: &Path) -> Result<Living> {
    let mut living = Living::default();
    for entry in files(folder)? {
        let known = entry.and_then(|(path, mut file)| {
            let mut actions = read_actions(&mut file, &path);
            // It is being written perhaps.
            for _ in 0..RETRIES {
                if actions.is_ok() {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
                actions = read_actions(&mut file, &path);
            }
            actions
        });
        let Ok(actions) = known else {
            living.unknown = true;
            continue;
        };
        living
            .marks
            .extend(actions.into_iter().filter_map(|action| match action {
                Action::Made { mark } => Some(mark),
                _ => None,
            }));
    }
    Ok(living)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn reserved(pool: &str, root: Option<u64>) -> Action {
        Action::Reserved {
            pool: pool.to_owned(),
            device: "vg-pool-tpool".to_owned(),
            root,
        }
    }

    fn made(mark: &str) -> Action {
        Action::Made {
            mark: mark.to_owned(),
        }
    }

    fn recover_all(folder: &Path, take_back: &dyn Fn(&Action) -> Result<Outcome>) -> Recovered {
        recover_in(folder, &(), &|_| true, take_back).unwrap()
    }

    #[test]
    fn only_what_the_dead_left_is_taken_back_last_first() {
        let folder = tempfile::tempdir().unwrap();
        let taken = Mutex::new(Vec::new());
        let take = |action: &Action| {
            taken.lock().unwrap().push(action.clone());
            Ok(Outcome::Done("done".to_owned()))
        };
        let living = Undo::begin_in(folder.path()).unwrap();
        living.note(made("x")).unwrap();
        assert_eq!(recover_all(folder.path(), &take), Recovered::default());

        // Another process that dies: its lock goes, its file stays.
        let dead = Undo::begin_in(folder.path()).unwrap();
        dead.note(made("y")).unwrap();
        let number = dead.note(reserved("p", None)).unwrap();
        dead.change(number, reserved("p", Some(7))).unwrap();
        drop(dead);
        assert_eq!(recover_all(folder.path(), &take).done.len(), 2);
        assert_eq!(*taken.lock().unwrap(), [reserved("p", Some(7)), made("y")]);
        assert_eq!(recover_all(folder.path(), &take), Recovered::default());
        let count = || fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(count(), 1, "that of the living");

        assert!(living_in(folder.path()).unwrap().makes(&Mark::noted("x")));
        living.forget(0);
        assert!(!living_in(folder.path()).unwrap().makes(&Mark::noted("x")));
        drop(living);
        assert_eq!(count(), 0);
    }

    #[test]
    fn what_cannot_be_taken_back_stays_noted_and_only_that() {
        let folder = tempfile::tempdir().unwrap();
        let dead = Undo::begin_in(folder.path()).unwrap();
        for action in [made("x"), reserved("p", None), made("y")] {
            dead.note(action).unwrap();
        }
        drop(dead);
        let fail = |action: &Action| match action {
            Action::Made { mark } if mark == "x" => Err(Error::new(Path::new("vg/x"), "in use")),
            Action::Reserved { .. } => Ok(Outcome::Later),
            _ => Ok(Outcome::Nothing),
        };
        let found = recover_all(folder.path(), &fail);
        assert_eq!((found.done.len(), found.kept), (0, 1));
        // What is noted of a dead process is nobody's to remove.
        let living = living_in(folder.path()).unwrap();
        assert!(living.makes(&Mark::noted("x")) && !living.makes(&Mark::noted("y")));
        let seen = Mutex::new(Vec::new());
        recover_all(folder.path(), &|action| {
            seen.lock().unwrap().push(action.clone());
            Ok(Outcome::Nothing)
        });
        assert_eq!(*seen.lock().unwrap(), [reserved("p", None), made("x")]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn of_one_pool_only() {
        let folder = tempfile::tempdir().unwrap();
        let dead = Undo::begin_in(folder.path()).unwrap();
        for action in [reserved("p", None), reserved("q", Some(1)), made("x")] {
            dead.note(action).unwrap();
        }
        drop(dead);
        let of_pool =
            |action: &Action| matches!(action, Action::Reserved { pool, .. } if pool == "q");
        let found = recover_in(folder.path(), &(), &of_pool, &|action| {
            assert_eq!(*action, reserved("q", Some(1)));
            Ok(Outcome::Done(String::new()))
        });
        assert_eq!(found.unwrap().done.len(), 1);
        let found = recover_in(folder.path(), &(), &of_pool, &|_| panic!("none is left"));
        assert_eq!(found.unwrap(), Recovered::default());
        let rest = recover_all(folder.path(), &|_| Ok(Outcome::Done(String::new())));
        assert_eq!(rest.done.len(), 2);
    }

    /// What is in such a file is not "nothing": it is said, it stays, and volumes are not taken for nobody's because of it.
    #[test]
    fn what_cannot_be_read_is_not_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("lvm-1-0{SUFFIX}"));
        for text in [
            "rm -rf\n",
            "[{\"Made\":{\"name\":\"vg/x\"}}]\n",
            "[",
            "\n[]\n",
        ] {
            fs::write(&path, text).unwrap();
            let found = recover_all(folder.path(), &|_| panic!("nothing to do"));
            assert_eq!(found.kept, 1, "{text}");
            assert_eq!(fs::read(&path).unwrap(), text.as_bytes());
            assert!(living_in(folder.path()).unwrap().unknown(), "{text}");
        }
        // Of a process that was killed before it noted anything.
        fs::write(&path, "").unwrap();
        assert!(!living_in(folder.path()).unwrap().unknown());
        assert_eq!(
            recover_all(folder.path(), &|_| panic!()),
            Recovered::default()
        );
        assert!(!path.exists());
    }
}
