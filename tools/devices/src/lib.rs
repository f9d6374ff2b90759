// SPDX-License-Identifier: GPL-2.0

//! Running stacks: loop devices, mapped devices, and what is written over them.
//!
//! [`up`] turns layers into a [`plan`]: a list of steps that is either run or printed as shell commands.
//! The steps are those an administrator would take, and nothing but the devices themselves records them:
//! [`running`] finds a stack and its parts again by their device-mapper UUIDs and tables.

pub mod commit;
pub mod cow;
pub mod dmsetup;
pub mod down;
pub mod exceptions;
pub mod list;
pub mod loops;
pub mod plan;
pub mod running;
pub mod up;
pub mod users;

use std::{path::Path, sync::Arc};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use ovbd_layers::error::{Error, Result};

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
        match self.0.load(std::sync::atomic::Ordering::Relaxed) {
            true => Err(Error::new(path, "interrupted")),
            false => Ok(()),
        }
    }
}
