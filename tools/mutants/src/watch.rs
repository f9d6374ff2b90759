// SPDX-License-Identifier: GPL-2.0

//! A thread that looks at time and memory while the others work: a mutant that takes too long is named before
//! the guest is given up, and the most memory that was in use is remembered.

use std::{
    fs,
    process::exit,
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        Arc, Mutex, PoisonError,
    },
    thread,
    time::{Duration, Instant},
};

/// Time that one mutant may take; most take less than a tenth of a second even under emulation.
const LIMIT: Duration = Duration::from_secs(60);

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(50);

/// The mutant that is being read, and since when.
type Current = Arc<Mutex<Option<(Instant, String)>>>;

/// A running watch.
pub struct Watch {
    current: Current,
    before: u64,
    lowest: Arc<AtomicU64>,
}

impl Watch {
    /// Starts watching.
    pub fn start() -> Self {
        let current = Current::default();
        let before = available_kib();
        let lowest = Arc::new(AtomicU64::new(before));
        let (watched, low) = (current.clone(), lowest.clone());
        thread::spawn(move || loop {
            thread::sleep(INTERVAL);
            low.fetch_min(available_kib(), Relaxed);
            let now = watched.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((since, name)) = now.as_ref().filter(|(since, _)| since.elapsed() > LIMIT) {
                println!(
                    "not ok 999 - {name}: still not done after {} s",
                    since.elapsed().as_secs()
                );
                exit(1);
            }
        });
        Self {
            current,
            before,
            lowest,
        }
    }

    /// From now on it is `name`.
    pub fn begin(&self, name: String) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), name));
    }

    /// Nothing is being read.
    pub fn end(&self) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How much more memory was in use than at the start.
    pub fn most_memory_mib(&self) -> u64 {
        self.before.saturating_sub(self.lowest.load(Relaxed)) >> 10
    }
}

fn available_kib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}
