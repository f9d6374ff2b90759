// SPDX-License-Identifier: GPL-2.0

//! Signals while something is sent or fetched, which takes long and asks nobody whether to go on.

use std::{
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    time::Duration,
};

use ovbd_devices::Interrupt;

/// What a shell says of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// While something is sent or fetched nothing has to be put back in order first: a signal ends the program, after `clean`.
pub struct Watch(Arc<AtomicBool>);

impl Watch {
    /// From now on, until this is dropped.
    pub fn begin(interrupt: &Interrupt, clean: impl FnOnce() + Send + 'static) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (interrupt, watched) = (interrupt.clone(), over.clone());
        std::thread::spawn(move || {
            while !watched.load(Ordering::Relaxed) {
                if interrupt.check(Path::new("")).is_err() {
                    clean();
                    std::process::exit(INTERRUPTED);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Self(over)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
