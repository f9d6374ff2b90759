// SPDX-License-Identifier: GPL-2.0

//! How a verb shows what it does: nothing, lines, a bar on a terminal, or JSON, always on stderr; and its errors.
//!
//! Nothing here fails: where stderr is a closed pipe or a full disk, the verb goes on unseen.

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
    sync::{
        atomic::{AtomicU64, Ordering},
        Mutex, PoisonError,
    },
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use ovbd_layers::{
    error::{escaped, Place},
    units, Error,
};
use serde_json::json;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

use crate::cli::status;

/// What standard output is called in errors.
pub const STDOUT: &str = "standard output";

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two objects of JSON.
const JSON_INTERVAL: Duration = Duration::from_millis(500);
/// How often a bar is drawn in a second.
const BARS_PER_SECOND: u8 = 10;

/// What is shown.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Show errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Show every step
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// How progress is shown on stderr
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t = Show::Auto)]
    pub progress: Show,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Show {
    /// A bar on a terminal, unless TERM is dumb, else a line every ten seconds
    #[default]
    Auto,
    /// A bar, whatever stderr is
    Always,
    /// Nothing
    Never,
    /// A JSON object a line, errors and warnings too
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
        let terminal = io::stderr().is_terminal() && !term_is_dumb();
        let kind = match options.progress {
            _ if options.quiet => Kind::Silent,
            Show::Never => Kind::Silent,
            Show::Json => Kind::Json,
            Show::Always => Kind::Bar(bar(terminal)),
            Show::Auto if terminal => Kind::Bar(bar(true)),
            Show::Auto => Kind::Lines,
        };
        if options.verbose {
            let bar = match &kind {
                Kind::Bar(bar) => Some(bar.clone()),
                _ => None,
            };
            // A second one is not an error: tests make several reports.
            let _ = tracing_subscriber::fmt()
                .with_max_level(LevelFilter::DEBUG)
                .without_time()
                .with_target(false)
                .with_ansi(false)
                .with_writer(move || Unfailing(bar.clone()))
                .finish()
                .with(Targets::new().with_target("ovbd", LevelFilter::DEBUG))
                .try_init();
        }
        Self {
            json: json || options.progress == Show::Json,
            kind,
            quiet: options.quiet,
            what: Mutex::new(""),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            last: Mutex::new(Instant::now()),
        }
    }

    /// Begins something of `bytes`, 0 where that is not known yet; `what` is a word like "exporting".
    pub fn begin(&self, what: &'static str, bytes: u64) {
        *self.what.lock().unwrap_or_else(PoisonError::into_inner) = what;
        self.done.store(0, Ordering::Relaxed);
        if let Kind::Bar(bar) = &self.kind {
            bar.reset();
            bar.set_message(what);
        }
        ovbd_layers::report::Report::expect(self, bytes);
    }

    /// Whether only errors are to be shown.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Writes a line to stderr.
    pub fn say(&self, line: impl Display) {
        Unfailing(self.bar().cloned()).put(&format!("{line}\n"));
    }

    /// Shows a step of the verb, unless the user wants errors only.
    pub fn note(&self, line: impl Display) {
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => self.say(json!({ "note": line.to_string() })),
            (_, false) => self.say(format_args!("ovbd: {}", escaped(&line.to_string()))),
        }
    }

    /// Shows an error that does not end the verb by itself.
    pub fn error(&self, error: &anyhow::Error) {
        match self.json {
            true => self.say(json!({ "error": as_json(error) })),
            false => self.say(format_args!("ovbd: {}", escaped(&text(error)))),
        }
    }

    /// Shows what is unusual.
    pub fn warning(&self, error: &anyhow::Error) {
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => self.say(json!({ "warning": as_json(error) })),
            (_, false) => self.say(format_args!("ovbd: warning: {}", escaped(&text(error)))),
        }
    }

    /// Shows the error that ends the program; returns its exit status.
    pub fn end_with(&self, error: &anyhow::Error) -> ExitCode {
        self.clear();
        // Whoever reads has enough: no reason for a message.
        if of_files(error).is_some_and(|error| {
            error.path() == Path::new(STDOUT)
                && error
                    .io_error()
                    .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
        }) {
            return ExitCode::from(status::CLOSED_PIPE);
        }
        self.error(error);
        ExitCode::from(status::FAILURE)
    }

    /// Writes `text`, the answer of the verb, to standard output.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn print(&self, text: &str) -> anyhow::Result<ExitCode> {
        self.answer(text)?;
        Ok(ExitCode::SUCCESS)
    }

    /// As [`Report::print`], where more follows.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn answer(&self, text: &str) -> ovbd_layers::Result<()> {
        self.clear();
        let mut out = io::stdout();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|e| Error::io(Path::new(STDOUT), "write", e))
    }

    fn bar(&self) -> Option<&ProgressBar> {
        match &self.kind {
            Kind::Bar(bar) => Some(bar),
            _ => None,
        }
    }

    fn clear(&self) {
        if let Some(bar) = self.bar() {
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

    /// Shows how far it is, where that is not a bar.
    fn show(&self) {
        let what = *self.what.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        match &self.kind {
            Kind::Lines if total == 0 => {
                self.say(format_args!("ovbd: {what}: {}", units::size(done)));
            }
            Kind::Lines => {
                let percent = done as f64 * 100.0 / total as f64;
                let total = units::size(total);
                self.say(format_args!("ovbd: {what}: {percent:.0} % of {total}"));
            }
            Kind::Json => {
                self.say(json!({ "progress": { "what": what, "done": done, "total": total } }));
            }
            Kind::Silent | Kind::Bar(_) => {}
        }
    }
}

impl ovbd_layers::report::Report for Report {
    fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        match &self.kind {
            Kind::Bar(bar) => bar.set_length(bytes),
            // Also what is done at once has been seen.
            Kind::Json => self.show(),
            Kind::Silent | Kind::Lines => {}
        }
    }

    fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        match &self.kind {
            Kind::Bar(bar) => bar.inc(bytes),
            Kind::Lines if self.is_due(LINE_INTERVAL) => self.show(),
            Kind::Json if self.is_due(JSON_INTERVAL) => self.show(),
            _ => {}
        }
    }

    fn warn(&self, error: &Error) {
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => self.say(json!({ "warning": error_json(error) })),
            (_, false) => {
                self.say(format_args!("ovbd: warning: {error}"));
            }
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Whether what is written to standard output may be coloured.
pub fn colours_stdout() -> bool {
    io::stdout().is_terminal() && !colours_are_unwanted()
}

/// Whether the environment asks for no colours, whatever is written to.
pub fn colours_are_unwanted() -> bool {
    // https://no-color.org: set and not empty.
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) || term_is_dumb()
}

/// Whether the terminal, if there is one, can only write one character after the other.
fn term_is_dumb() -> bool {
    std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb")
}

fn bar(terminal: bool) -> ProgressBar {
    let target = match terminal {
        true => ProgressDrawTarget::stderr_with_hz(BARS_PER_SECOND),
        // The above shows nothing where stderr is no terminal.
        false => ProgressDrawTarget::term_like_with_hz(Box::new(AnyStderr), BARS_PER_SECOND),
    };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    let template = "{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Stderr as a terminal, whatever it is.
#[derive(Debug)]
struct AnyStderr;

impl AnyStderr {
    /// Moves the cursor `n` times in the direction of the control sequence `letter`.
    fn move_cursor(n: usize, letter: char) -> io::Result<()> {
        match n {
            0 => Ok(()),
            _ => write!(io::stderr(), "\x1b[{n}{letter}"),
        }
    }
}

impl TermLike for AnyStderr {
    fn width(&self) -> u16 {
        80
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        Self::move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        Self::move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        Self::move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        Self::move_cursor(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        writeln!(io::stderr(), "{text}")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        write!(io::stderr(), "{text}")
    }

    fn clear_line(&self) -> io::Result<()> {
        write!(io::stderr(), "\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// The error about a file among the causes, if there is one.
fn of_files(error: &anyhow::Error) -> Option<&Error> {
    error.chain().find_map(|cause| cause.downcast_ref())
}

/// The messages of an error and its causes. An error about a file tells its own.
fn messages(error: &anyhow::Error) -> Vec<String> {
    let mut found = Vec::new();
    for cause in error.chain() {
        found.push(cause.to_string());
        if cause.is::<Error>() {
            break;
        }
    }
    found
}

fn text(error: &anyhow::Error) -> String {
    messages(error).join(": ")
}

fn as_json(error: &anyhow::Error) -> serde_json::Value {
    let mut value = of_files(error).map_or_else(|| json!({}), error_json);
    let messages = messages(error);
    value["message"] = messages.join(": ").into();
    value["causes"] = messages[1..].into();
    value
}

fn error_json(error: &Error) -> serde_json::Value {
    let (offset, within) = match error.place() {
        None => (None, None),
        Some(Place::File(byte)) => (Some(byte), Some("file")),
        Some(Place::Content(byte)) => (Some(byte), Some("content")),
    };
    json!({
        "message": error.to_string(),
        "causes": [],
        "path": error.path().to_string_lossy(),
        "what": error.what(),
        "offset": offset,
        "within": within,
        "errno": error.io_error().and_then(io::Error::raw_os_error),
    })
}

/// Stderr that takes everything, also where it is closed or full, beside a bar.
struct Unfailing(Option<ProgressBar>);

impl Unfailing {
    fn put(&self, text: &str) {
        let write = || {
            let _ = io::stderr().write_all(text.as_bytes());
        };
        match &self.0 {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

impl Write for Unfailing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.put(&one_line_each(data));
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A line that was formatted elsewhere, with its end.
fn one_line_each(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    format!("{}\n", escaped(text.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(one_line_each(b"a\x1b[2J\t\n"), "a\\u{1b}[2J\\t\n");
        assert_eq!(
            one_line_each("\u{202e}gpj\u{9b}".as_bytes()),
            "\\u{202e}gpj\\u{9b}\n"
        );
        assert_eq!(one_line_each(b"two\nlines\n"), "two\\nlines\n");
    }

    #[test]
    fn a_cause_is_told_once() {
        let failure = || io::Error::from_raw_os_error(28);
        let file = Error::io(Path::new("/a"), "write", failure());
        let error = anyhow::Error::from(file).context("cannot commit");
        assert_eq!(
            text(&error),
            "cannot commit: /a: cannot write: No space left on device"
        );
        let value = as_json(&error);
        assert_eq!(value["message"], text(&error));
        assert_eq!(
            value["causes"],
            json!(["/a: cannot write: No space left on device"])
        );
        assert_eq!(
            (&value["path"], &value["errno"]),
            (&json!("/a"), &json!(28))
        );

        let error = Err::<(), _>(failure())
            .context("cannot start threads")
            .unwrap_err();
        assert_eq!(
            text(&error),
            "cannot start threads: No space left on device (os error 28)"
        );
        assert_eq!(
            as_json(&error)["causes"],
            json!(["No space left on device (os error 28)"])
        );
    }

    #[test]
    fn only_a_pipe_at_standard_output_ends_quietly() {
        let report = Report::new(
            &Options {
                quiet: true,
                ..Options::default()
            },
            false,
        );
        let status = |path: &str, kind: io::ErrorKind| {
            report.end_with(&Error::io(Path::new(path), "write", kind.into()).into())
        };
        let closed = ExitCode::from(status::CLOSED_PIPE);
        assert_eq!(status(STDOUT, io::ErrorKind::BrokenPipe), closed);
        for (path, kind) in [
            (STDOUT, io::ErrorKind::StorageFull),
            ("/run/socket", io::ErrorKind::BrokenPipe),
        ] {
            assert_eq!(
                status(path, kind),
                ExitCode::from(status::FAILURE),
                "{path}"
            );
        }
    }
}
