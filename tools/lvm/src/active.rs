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
use ovbd_kernel::dm::{self, Info};
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
    volume: Volume,
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
        for volume in volumes {
            let file = Shared::wait(Path::new(FOLDER), &volume.uuid, |file, path| {
                lock::wait_for_shared(file, path, interrupt, report, || {
                    let what = "waiting for another process, which makes it inactive";
                    volume.name.error(what)
                })
            })?;
            active.used.push(Used {
                volume: (*volume).clone(),
                file,
                noted: None,
            });
        }
        // What was known of them may have changed before they were locked. Whether they are active device-mapper says; all
        // else LVM looks at itself, as they are named by their UUIDs, and is seen in the devices afterwards.
        let mut inactive = Vec::new();
        for used in &mut active.used {
            let volume = &used.volume;
            let is_active = volume.mapped()?.is_some();
            if is_active && !used.file.is_ours()? {
                continue;
            }
            used.noted = Some(undo.note(Action::Activated {
                name: volume.name.to_string(),
                uuid: volume.uuid.clone(),
            })?);
            used.file.set_ours(true)?;
            if !is_active {
                inactive.push(volume);
            }
        }
        if !inactive.is_empty() {
            change(&inactive, &["--activate", "y", "--ignoreactivationskip"])?;
        }
        for volume in volumes {
            let is_it = |found: &Info| volume.device() == dm::node(&found.name);
            let Some(found) = volume.mapped()?.filter(is_it) else {
                let what = "is not the volume any more that it was";
                return Err(volume.name.error(what));
            };
            if !found.read_only && !volume.writable {
                let what = "its device can be written to, and LVM said that it is read-only";
                return Err(volume.name.error(what));
            }
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
                    ours.push((used.volume, last));
                }
            }
        }
        if !ours.is_empty() {
            let volumes: Vec<&Volume> = ours.iter().map(|(volume, _)| volume).collect();
            change(&volumes, &["--activate", "n"])?;
        }
        ours.into_iter().for_each(|(_, last)| last.remove());
        over.into_iter().for_each(|number| self.undo.forget(number));
        Ok(())
    }
}

/// Changes volumes of one group, at least one, which LVM finds by their UUIDs: a name may be another's by now. Those that are gone
/// are left out.
fn change(volumes: &[&Volume], how: &[&str]) -> Result<()> {
    let first = &volumes[0].name;
    let which: Vec<String> = volumes
        .iter()
        .map(|volume| format!("lv_uuid=\"{}\"", volume.uuid))
        .collect();
    let which = which.join(" || ");
    let words = how.iter().copied().chain(["--select", &which, &first.vg]);
    program::run(&first.path(), "lvchange", words).map(drop)
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
    change(&[volume], &["--activate", "n"])?;
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
