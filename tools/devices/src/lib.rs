// SPDX-License-Identifier: GPL-2.0

//! Running stacks: loop devices, mapped devices, and what is written over them.
//!
//! [`up`] turns layers into a [`plan`]: a list of steps that is either run or printed as shell commands.
//! The steps are those an administrator would take, and nothing but the devices themselves records them:
//! [`running`] finds a stack and its parts again by their device-mapper UUIDs and tables.

mod block_writer;
pub mod commit;
pub mod cow;
pub mod dax;
pub mod direct_io;
mod discards;
pub mod down;
pub mod exceptions;
pub mod fetched;
pub mod fold;
mod freeze;
mod frozen_stores;
pub mod generations;
mod hold_still;
mod layer_place;
pub mod list;
pub mod lock;
pub mod loops;
pub mod mapped;
pub mod plan;
pub mod programs;
mod rebase;
pub mod record;
mod recovery;
pub mod running;
mod script;
pub mod storage;
mod store_files;
#[cfg(test)]
#[path = "../../layers/tests/common/programs.rs"]
mod test_programs;
pub mod up;
pub mod users;
pub mod verity;

use std::{
    path::Path,
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc, Mutex, PoisonError,
    },
    thread,
};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use ovbd_layers::error::{Error, Result};
pub use ovbd_layers::mounts;

/// Refuses a user who may not change devices.
///
/// # Errors
///
/// That one.
pub fn check_root() -> Result<()> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err(Error::new(
            Path::new("/dev/mapper/control"),
            "only root can use it; run ovbd as root",
        )),
    }
}

/// Threads that wait for the kernel, not for a processor: making and removing a device takes several grace periods.
const WAITERS: usize = 16;

/// Calls `work` for every item, many at a time; the results are in the order of the items.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<R>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let run = || {
        while let Some((item, result)) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            items.get(at).zip(results.get(at))
        } {
            let done = work(item);
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        }
    };
    thread::scope(|scope| {
        // The caller is one of them, so it does not matter whether others can be started.
        for _ in 1..items.len().min(WAITERS) {
            let _ = thread::Builder::new().spawn_scoped(scope, run);
        }
        run();
    });
    let results = results
        .into_iter()
        .filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner));
    results.collect()
}

/// Notices the signals that ask the program to end, so that it can undo what it began.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<std::sync::atomic::AtomicBool>);

impl Interrupt {
    /// From now on the signals are only noticed.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn install() -> std::io::Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, interrupt.0.clone())?;
        }
        Ok(interrupt)
    }

    /// Refuses to go on once a signal came; the error is about `path`.
    ///
    /// # Errors
    ///
    /// That one.
    pub fn check(&self, path: &Path) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(Error::new(path, "interrupted")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order() {
        for count in [0, 1, 2, 31, 32, 33, 1000] {
            let items: Vec<usize> = (0..count).collect();
            let wanted: Vec<usize> = items.iter().map(|i| i * 2).collect();
            assert_eq!(in_parallel(&items, |i| i * 2), wanted);
        }
    }
}
