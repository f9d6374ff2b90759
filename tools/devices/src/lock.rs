// SPDX-License-Identifier: GPL-2.0

//! One command at a time changes a stack.
//!
//! The lock is on a file in /run that stays; the kernel lets it go with the program, however that ends. What other
//! locks need as well, [`make_folder`], [`open_file`] and [`wait_for`] do.

use std::{
    fs::{self, File},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::Path,
    thread,
    time::Duration,
};

use rustix::{fs::FlockOperation, io::Errno};

use crate::Interrupt;
use ovbd_layers::{
    error::{Error, Result},
    report::Report,
};

/// Where the files of locks are.
pub const FOLDER: &str = "/run/ovbd";

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// The right to change a stack, until this is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until no other command changes the stack `name`, which is one for a device. Says so where it has to wait.
    ///
    /// # Errors
    ///
    /// An interrupt, and the system's.
    pub fn take(name: &str, interrupt: &Interrupt, report: &dyn Report) -> Result<Self> {
        Self::take_in(Path::new(FOLDER), name, interrupt, report)
    }

    /// Waits until no other command looks for a COW store that nobody uses. No stack has such a name.
    ///
    /// # Errors
    ///
    /// As [`Lock::take`].
    pub fn take_stores(interrupt: &Interrupt, report: &dyn Report) -> Result<Self> {
        Self::take_in(Path::new(FOLDER), ".stores", interrupt, report)
    }

    fn take_in(
        folder: &Path,
        name: &str,
        interrupt: &Interrupt,
        report: &dyn Report,
    ) -> Result<Self> {
        let path = folder.join(format!("{name}.lock"));
        make_folder(folder)?;
        let file = open_file(&path)?;
        wait_for(&file, &path, interrupt, report, || {
            let what = format!("waiting for {}, which changes the stack", holder(&file));
            Error::new(&path, what)
        })?;
        // For whoever waits; the lock holds without it.
        let text = format!("{:<20}\n", std::process::id());
        let _ = file.write_all_at(text.as_bytes(), 0);
        Ok(Self { _file: file })
    }
}

/// Makes a folder for the files of locks where it is missing.
///
/// # Errors
///
/// The system's.
pub fn make_folder(folder: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(0o755)
        .recursive(true)
        .create(folder)
        .map_err(|e| Error::io(folder, "create", e))
}

/// Opens the file of a lock, and makes it where it is missing.
///
/// # Errors
///
/// The system's.
pub fn open_file(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| Error::io(path, "open", e))
}

/// Locks a file once nobody else has, and says `why` it waits if it has to. The lock is held while the file is open.
///
/// # Errors
///
/// An interrupt, and the system's.
pub fn wait_for(
    file: &File,
    path: &Path,
    interrupt: &Interrupt,
    report: &dyn Report,
    why: impl Fn() -> Error,
) -> Result<()> {
    let operation = FlockOperation::NonBlockingLockExclusive;
    wait(file, path, operation, interrupt, report, why)
}

/// As [`wait_for`], for a lock that several may have, and that keeps others from having it alone.
///
/// # Errors
///
/// As [`wait_for`].
pub fn wait_for_shared(
    file: &File,
    path: &Path,
    interrupt: &Interrupt,
    report: &dyn Report,
    why: impl Fn() -> Error,
) -> Result<()> {
    let operation = FlockOperation::NonBlockingLockShared;
    wait(file, path, operation, interrupt, report, why)
}

fn wait(
    file: &File,
    path: &Path,
    operation: FlockOperation,
    interrupt: &Interrupt,
    report: &dyn Report,
    why: impl Fn() -> Error,
) -> Result<()> {
    let mut said = false;
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => {}
            Err(e) => return Err(Error::io(path, "lock", e.into())),
        }
        if !said {
            said = true;
            report.warn(&why());
        }
        interrupt.check(path)?;
        thread::sleep(PAUSE);
    }
}

/// Who has the lock.
fn holder(file: &File) -> String {
    let mut text = [0; 20];
    let n = file.read_at(&mut text, 0).unwrap_or(0);
    match String::from_utf8_lossy(&text[..n]).trim() {
        "" => "another program".to_owned(),
        id => format!("process {id}"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        thread,
    };

    use super::*;

    /// Counts warnings.
    #[derive(Default)]
    struct Warnings(AtomicU32);

    impl Report for Warnings {
        fn expect(&self, _bytes: u64) {}
        fn add(&self, _bytes: u64) {}
        fn warn(&self, error: &Error) {
            assert!(error.to_string().contains("waiting for process"), "{error}");
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("new");
        let interrupt = Interrupt::default();
        let take = |name: &str, report: &dyn Report| {
            Lock::take_in(&folder, name, &interrupt, report).unwrap()
        };
        let inside = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        let lock = take("stack", &());
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        let first = take("stack", &());
        // Another stack is another lock.
        drop(take("other", &()));
        let warnings = Warnings::default();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| take("stack", &warnings));
            while warnings.0.load(Ordering::Relaxed) == 0 {
                thread::sleep(Duration::from_millis(5));
            }
            drop(first);
            waiting.join().unwrap();
        });
        assert_eq!(warnings.0.load(Ordering::Relaxed), 1, "said once");
    }

    #[test]
    fn an_interrupt_ends_the_wait() {
        let folder = tempfile::tempdir().unwrap();
        let interrupt = Interrupt::default();
        let _first = Lock::take_in(folder.path(), "stack", &interrupt, &()).unwrap();
        interrupt.0.store(true, Ordering::Relaxed);
        let error = Lock::take_in(folder.path(), "stack", &interrupt, &()).unwrap_err();
        assert!(error.to_string().ends_with("interrupted"), "{error}");
    }
}
