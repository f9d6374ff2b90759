// SPDX-License-Identifier: GPL-2.0

//! Progress of a long operation: a bar on a terminal, else a line every now and then.

use std::{
    io::IsTerminal,
    sync::{
        atomic::{AtomicU64, Ordering},
        Mutex,
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Counts bytes and shows them on stderr.
pub struct Progress {
    bar: ProgressBar,
    lines: Option<Lines>,
}

struct Lines {
    what: &'static str,
    total: u64,
    done: AtomicU64,
    last: Mutex<Instant>,
}

impl Progress {
    /// Shows nothing.
    pub fn hidden() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            lines: None,
        }
    }

    /// Shows how many of `total` bytes are done; `what` is a word like "compressing".
    pub fn new(what: &'static str, total: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            let lines = Lines {
                what,
                total,
                done: AtomicU64::new(0),
                last: Mutex::new(Instant::now()),
            };
            return Self {
                bar: ProgressBar::hidden(),
                lines: Some(lines),
            };
        }
        let bar =
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
        let template = "{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what);
        Self { bar, lines: None }
    }

    /// Counts `bytes` more.
    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
        let Some(lines) = &self.lines else {
            return;
        };
        let done = lines.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let Ok(mut last) = lines.last.try_lock() else {
            return;
        };
        if last.elapsed() >= LINE_INTERVAL {
            *last = Instant::now();
            let percent = done as f64 * 100.0 / lines.total.max(1) as f64;
            eprintln!(
                "ovbd: {}: {percent:.0} % of {} bytes",
                lines.what, lines.total
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
