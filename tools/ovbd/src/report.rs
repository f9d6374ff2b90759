// SPDX-License-Identifier: GPL-2.0

//! How a verb shows what it does: nothing, lines, a bar on a terminal, or JSON, always on stderr; and its errors.
//!
//! Nothing here fails: where stderr is a closed pipe or a full disk, the verb goes on unseen.

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    process::ExitCode,
    sync::{
        atomic::{AtomicU64, Ordering},
        Mutex, PoisonError,
    },
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ovbd_layers::{error::Place, Error};
use serde_json::json;

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two objects of JSON.
const JSON_INTERVAL: Duration = Duration::from_millis(500);
/// What a shell says of a program that was ended by SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// What is shown.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Show errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Show every step
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// How progress is shown on stderr: auto is a bar on a terminal, else a line every ten seconds
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t = Show::Auto)]
    pub progress: Show,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Show {
    /// A bar on a terminal, else lines
    #[default]
    Auto,
    /// A bar
    Always,
    /// Nothing
    Never,
    /// A JSON object a line
    Json,
}

/// Shows how one verb goes.
pub struct Report {
    kind: Kind,
    quiet: bool,
    /// Errors and warnings are JSON as well.
    json: bool,
    what: Mutex<&'static str>,
    done: AtomicU64,
    total: AtomicU64,
    last: Mutex<Instant>,
}

enum Kind {
    Silent,
    Lines,
    Bar(ProgressBar),
    Json,
}

impl Report {
    /// As the user wants it. `json`: the verb's answer is JSON, and so are errors.
    pub fn new(options: &Options, json: bool) -> Self {
        if options.verbose {
            let level = tracing::Level::DEBUG;
            // A second one is not an error: tests make several reports.
            let _ = tracing_subscriber::fmt()
                .with_max_level(level)
                .without_time()
                .with_target(false)
                .with_ansi(false)
                .with_writer(|| Unfailing)
                .try_init();
        }
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let kind = match options.progress {
            _ if options.quiet => Kind::Silent,
            Show::Never => Kind::Silent,
            Show::Json => Kind::Json,
            Show::Always => Kind::Bar(bar()),
            Show::Auto if io::stderr().is_terminal() && !dumb => Kind::Bar(bar()),
            Show::Auto => Kind::Lines,
        };
        Self {
            json: json || matches!(kind, Kind::Json),
            kind,
            quiet: options.quiet,
            what: Mutex::new(""),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            last: Mutex::new(Instant::now()),
        }
    }

    /// Begins something of `bytes`; `what` is a word like "exporting".
    pub fn begin(&self, what: &'static str, bytes: u64) {
        *self.what.lock().unwrap_or_else(PoisonError::into_inner) = what;
        self.done.store(0, Ordering::Relaxed);
        if let Kind::Bar(bar) = &self.kind {
            bar.set_message(what);
        }
        ovbd_layers::report::Report::expect(self, bytes);
    }

    /// Writes a line to stderr.
    pub fn say(&self, line: impl Display) {
        let line = format!("{line}\n");
        match &self.kind {
            Kind::Bar(bar) => bar.suspend(|| write_all(&line)),
            _ => write_all(&line),
        }
    }

    /// Shows an error that does not end the verb by itself.
    pub fn error(&self, error: &anyhow::Error) {
        match self.json {
            true => self.say(json!({ "error": as_json(error) })),
            false => self.say(format_args!("ovbd: {}", text(error))),
        }
    }

    /// Shows what is unusual.
    pub fn warning(&self, error: &anyhow::Error) {
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => self.say(json!({ "warning": as_json(error) })),
            (_, false) => self.say(format_args!("ovbd: warning: {}", text(error))),
        }
    }

    /// Shows the error that ends the program; returns its exit status.
    pub fn end_with(&self, error: &anyhow::Error) -> ExitCode {
        self.clear();
        let io = error
            .chain()
            .find_map(|cause| match cause.downcast_ref::<Error>() {
                Some(error) => error.io_error(),
                None => cause.downcast_ref::<io::Error>(),
            });
        if io.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::from(BROKEN_PIPE);
        }
        self.error(error);
        ExitCode::FAILURE
    }

    /// Writes `text`, the answer of the verb, to standard output.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn print(&self, text: &str) -> anyhow::Result<ExitCode> {
        self.clear();
        let mut out = io::stdout();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|e| Error::io(std::path::Path::new("standard output"), "write", e))?;
        Ok(ExitCode::SUCCESS)
    }

    fn clear(&self) {
        if let Kind::Bar(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }

    /// Whether so much time has passed that progress is to be shown again.
    fn is_due(&self, interval: Duration) -> bool {
        let Ok(mut last) = self.last.try_lock() else {
            return false;
        };
        let due = last.elapsed() >= interval;
        if due {
            *last = Instant::now();
        }
        due
    }
}

impl ovbd_layers::report::Report for Report {
    fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        if let Kind::Bar(bar) = &self.kind {
            bar.set_length(bytes);
        }
    }

    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let total = self.total.load(Ordering::Relaxed);
        let what = || *self.what.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.kind {
            Kind::Bar(bar) => bar.inc(bytes),
            Kind::Lines if self.is_due(LINE_INTERVAL) => {
                let percent = done as f64 * 100.0 / total.max(1) as f64;
                self.say(format_args!(
                    "ovbd: {}: {percent:.0} % of {total} bytes",
                    what()
                ));
            }
            Kind::Json if self.is_due(JSON_INTERVAL) => {
                self.say(json!({ "progress": { "what": what(), "done": done, "total": total } }));
            }
            _ => {}
        }
    }

    fn warn(&self, error: &Error) {
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => self.say(json!({ "warning": error_json(error) })),
            (_, false) => self.say(format_args!("ovbd: warning: {error}")),
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.clear();
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10));
    let template = "{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Errors print their own cause; those of others print it after a colon.
fn text(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Error>() {
        Some(error) => error.to_string(),
        None => format!("{error:#}"),
    }
}

fn as_json(error: &anyhow::Error) -> serde_json::Value {
    match error.downcast_ref::<Error>() {
        Some(error) => error_json(error),
        None => {
            let causes: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
            json!({ "message": error.to_string(), "causes": causes })
        }
    }
}

fn error_json(error: &Error) -> serde_json::Value {
    let (offset, within) = match error.place() {
        None => (None, None),
        Some(Place::File(byte)) => (Some(byte), Some("file")),
        Some(Place::Content(byte)) => (Some(byte), Some("content")),
    };
    json!({
        "message": error.to_string(),
        "path": error.path().to_string_lossy(),
        "what": error.what(),
        "offset": offset,
        "within": within,
        "errno": error.io_error().and_then(io::Error::raw_os_error),
    })
}

/// Stderr that takes everything, also where it is closed or full.
struct Unfailing;

impl Write for Unfailing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_all(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
