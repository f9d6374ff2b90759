// SPDX-License-Identifier: GPL-2.0

//! Volumes that are active for as long as they are read.
//!
//! Two processes may read one volume, a base that both have. Each holds a shared lock on a file of the volume meanwhile. Who
//! activates it writes so into that file; then it is noted by all that use it, and the last of them deactivates it.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use ovbd_devices::{
    lock::{self, FOLDER},
    Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    report::Report,
};
use rustix::{fs::FlockOperation, io::Errno};

use crate::{
    program,
    undo::{Action, Undo},
    Name, Volume, Volumes,
};

/// What is in the file of a volume that is to be deactivated by the last that uses it.
const OURS: u8 = b'1';

/// Volumes of a group that are active. One that was not before is not afterwards either.
#[derive(Debug)]
pub struct Active {
    undo: Undo,
    used: Vec<Used>,
}

/// One of them.
#[derive(Debug)]
struct Used {
    name: Name,
    /// Held as long as the volume is used.
    file: Shared,
    /// Its note, if one of us activated it.
    noted: Option<u64>,
}

impl Active {
    /// Activates volumes of one group, also those that are skipped otherwise, as thin snapshots are.
    ///
    /// # Errors
    ///
    /// LVM's, and an interrupt while another process makes one inactive.
    pub fn new(
        volumes: &[&Volume],
        undo: &Undo,
        interrupt: &Interrupt,
        report: &dyn Report,
    ) -> Result<Self> {
        let mut active = Self {
            undo: undo.clone(),
            used: Vec::new(),
        };
        let Some(first) = volumes.first() else {
            return Ok(active);
        };
        for volume in volumes {
            let file = Shared::wait(Path::new(FOLDER), &volume.uuid, |file, path| {
                lock::wait_for_shared(file, path, interrupt, report, || {
                    let what = "waiting for another process, which makes it inactive";
                    volume.name.error(what)
                })
            })?;
            active.used.push(Used {
                name: volume.name.clone(),
                file,
                noted: None,
            });
        }
        // What was known of them may have changed before they were locked.
        let now = Volumes::of_group(&first.name.vg)?;
        let mut inactive = Vec::new();
        for (volume, used) in volumes.iter().zip(&mut active.used) {
            let found = now.by_uuid(&volume.uuid);
            let found = found.filter(|found| found.name == volume.name);
            let is_active = found
                .ok_or_else(|| volume.name.error("is not the volume any more that it was"))?
                .active;
            if is_active && !used.file.is_ours()? {
                continue;
            }
            used.noted = Some(undo.note(Action::Activated {
                name: volume.name.to_string(),
                uuid: volume.uuid.clone(),
            })?);
            used.file.set_ours(true)?;
            if !is_active {
                inactive.push(volume.name.to_string());
            }
        }
        if !inactive.is_empty() {
            let words = ["--activate", "y", "--ignoreactivationskip"];
            let words = words.into_iter().chain(inactive.iter().map(String::as_str));
            program::run(&first.name.path(), "lvchange", words)?;
        }
        Ok(active)
    }

    /// Makes them as they were before, unless another of us uses them.
    ///
    /// # Errors
    ///
    /// LVM's: somebody uses one meanwhile. They are noted still, and it is tried again later.
    pub fn end(mut self) -> Result<()> {
        self.deactivate()
    }

    fn deactivate(&mut self) -> Result<()> {
        let (mut over, mut ours) = (Vec::new(), Vec::new());
        for used in self.used.drain(..) {
            let last = used.file.last()?;
            match (used.noted, last) {
                (None, Some(last)) => last.remove(),
                (None, None) => {}
                // Another one uses it, and has noted it.
                (Some(number), None) => over.push(number),
                (Some(number), Some(last)) => {
                    over.push(number);
                    ours.push((used.name, last));
                }
            }
        }
        if let Some((first, _)) = ours.first() {
            let words = ["--activate".to_owned(), "n".to_owned()].into_iter();
            let words = words.chain(ours.iter().map(|(name, _)| name.to_string()));
            program::run(&first.path(), "lvchange", words)?;
        }
        ours.into_iter().for_each(|(_, last)| last.remove());
        over.into_iter().for_each(|number| self.undo.forget(number));
        Ok(())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        // There is another error to report, and the note stays.
        let _ = self.deactivate();
    }
}

/// Deactivates a volume that a process has left active which is dead, unless another of us uses it; says its name then.
///
/// # Errors
///
/// LVM's, and that somebody else has it open.
pub(crate) fn deactivate_left(name: &str, uuid: &str) -> Result<Option<Name>> {
    let subject = Path::new(name);
    // Of a group that is gone there is nothing to undo; where LVM does not say it is not known.
    let volumes = Volumes::all()?;
    let Some(volume) = volumes.by_uuid(uuid).filter(|volume| volume.active) else {
        return Ok(None);
    };
    let file = Shared::wait(
        Path::new(FOLDER),
        uuid,
        |file, path| match rustix::fs::flock(file, FlockOperation::NonBlockingLockShared) {
            Ok(()) | Err(Errno::WOULDBLOCK) => Ok(()),
            Err(e) => Err(Error::io(path, "lock", e.into())),
        },
    )?;
    // Whoever uses it has noted it too. And of what nobody of us activated, somebody else is the user.
    if !file.is_ours()? {
        return Ok(None);
    }
    let Some(last) = file.last()? else {
        return Ok(None);
    };
    if volume.open {
        let what = format!(
            "{}: activated by a program that was killed, and in use now",
            volume.name
        );
        return Err(Error::new(subject, what));
    }
    let words = ["--activate", "n", &volume.name.to_string()];
    program::run(&volume.name.path(), "lvchange", words)?;
    last.remove();
    Ok(Some(volume.name.clone()))
}

/// The file of a volume, locked.
#[derive(Debug)]
struct Shared {
    file: File,
    path: PathBuf,
}

impl Shared {
    /// Opens the file and locks it with `lock`.
    fn wait(folder: &Path, uuid: &str, lock: impl Fn(&File, &Path) -> Result<()>) -> Result<Self> {
        lock::make_folder(folder)?;
        let path = folder.join(format!("active-{uuid}.lock"));
        loop {
            let file = lock::open_file(&path)?;
            lock(&file, &path)?;
            let found = file
                .metadata()
                .map_err(|e| Error::io(&path, "look at", e))?;
            // The last user removes it.
            if found.nlink() > 0 {
                return Ok(Self { file, path });
            }
        }
    }

    fn is_ours(&self) -> Result<bool> {
        let mut first = [0];
        let read = self.file.read_at(&mut first, 0);
        let count = read.map_err(|e| Error::io(&self.path, "read", e))?;
        Ok(count == 1 && first[0] == OURS)
    }

    fn set_ours(&self, ours: bool) -> Result<()> {
        let written = match ours {
            true => self.file.write_all_at(&[OURS], 0),
            false => self.file.set_len(0),
        };
        written.map_err(|e| Error::io(&self.path, "write", e))
    }

    /// The lock for itself, if nobody else has it; otherwise it is let go. Of several that try, the last one gets it.
    fn last(self) -> Result<Option<Self>> {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(self)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(Error::io(&self.path, "lock", e.into())),
        }
    }

    /// Nobody uses the volume any more.
    fn remove(self) {
        // What stays says that it is not ours.
        let _ = self.set_ours(false);
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(folder: &Path) -> Shared {
        Shared::wait(folder, "uuid", |file, path| {
            rustix::fs::flock(file, FlockOperation::LockShared)
                .map_err(|e| Error::io(path, "lock", e.into()))
        })
        .unwrap()
    }

    #[test]
    fn the_last_one_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = take(folder.path());
        assert!(!first.is_ours().unwrap());
        first.set_ours(true).unwrap();
        let second = take(folder.path());
        assert!(second.is_ours().unwrap(), "the second knows");
        assert!(first.last().unwrap().is_none(), "another one is there");
        let last = second.last().unwrap().expect("nobody else is");
        // Who comes meanwhile waits, and has a new file then.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| take(folder.path()));
            std::thread::sleep(std::time::Duration::from_millis(50));
            last.remove();
            let third = waiting.join().unwrap();
            assert!(!third.is_ours().unwrap());
            assert!(third.path.exists());
        });
    }
}
