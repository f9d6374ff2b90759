// SPDX-License-Identifier: GPL-2.0

//! How verbs reach a registry, and how they show what goes on there.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use clap::{Args, ValueHint};
use ovbd_layers::{report::Report as _, units};
use ovbd_oci::{Digest, Event, Keychain, Limiter, Options, Progress, Retries};

use crate::report::Report;

/// How to reach a registry.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// Take credentials from this file instead of those of skopeo, podman and docker
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub creds_file: Option<PathBuf>,
    /// Trust the certificates in this file too
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub ca: Option<PathBuf>,
    /// Do without encryption. Registries on this machine need no such option
    #[arg(long)]
    pub plain_http: bool,
}

impl Connection {
    /// What the library wants to know.
    pub fn options(&self) -> Options {
        Options {
            keychain: Arc::new(Keychain::from_environment(self.creds_file.as_deref())),
            ca: self.ca.clone(),
            plain_http: self.plain_http,
            ..Options::default()
        }
    }
}

/// How much is transferred at once, how fast, and how often it is tried.
#[derive(Clone, Debug, Args)]
pub struct Transfer {
    /// The connection.
    #[command(flatten)]
    pub connection: Connection,
    /// Transfer N layers at once
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub jobs: u16,
    /// Transfer no more than this in a second
    #[arg(long, value_name = "BYTES", value_parser = units::parse)]
    pub limit: Option<u64>,
    /// Try N times without progress before giving up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub retries: u32,
}

impl Transfer {
    /// What the library wants to know.
    pub fn options(&self) -> Options {
        Options {
            limiter: Arc::new(Limiter::new(self.limit)),
            retries: Retries {
                tries: self.retries,
                ..Retries::default()
            },
            ..self.connection.options()
        }
    }
}

/// Shows the transfer of the blobs of an image: all bytes as one, and a line for each layer.
pub struct Shown<'a> {
    report: &'a Report,
    names: HashMap<Digest, String>,
    /// Most bytes of each blob that were there so far.
    most: Mutex<HashMap<Digest, u64>>,
    counts: Mutex<Counts>,
}

/// What happened to the blobs.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// They were transferred.
    pub done: usize,
    /// They were there before.
    pub present: usize,
    /// They were taken from another repository.
    pub mounted: usize,
}

impl<'a> Shown<'a> {
    /// Shows `blobs` by name, with their sizes in bytes.
    pub fn new(
        report: &'a Report,
        what: &'static str,
        blobs: impl IntoIterator<Item = (Digest, String, u64)>,
    ) -> Self {
        let (mut names, mut total) = (HashMap::new(), 0_u64);
        for (digest, name, size) in blobs {
            if names.insert(digest, name).is_none() {
                total = total.saturating_add(size);
            }
        }
        report.begin(what, total);
        Self {
            report,
            names,
            most: Mutex::default(),
            counts: Mutex::default(),
        }
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Progress for Shown<'_> {
    fn event(&self, blob: &Digest, event: Event<'_>) {
        let name = self.names.get(blob).map_or("blob", String::as_str);
        match event {
            Event::Started { .. } => {}
            Event::At(at) => {
                let mut all = self.most.lock().unwrap_or_else(PoisonError::into_inner);
                let most = all.entry(blob.clone()).or_default();
                // What is done again does not count again.
                let more = at.saturating_sub(*most);
                *most += more;
                drop(all);
                self.report.add(more);
            }
            Event::Waiting { time, why } => {
                self.report.note(format_args!(
                    "{name}: waiting {:.1} s: {why}",
                    time.as_secs_f64()
                ));
            }
            Event::Elsewhere => self
                .report
                .note(format_args!("{name}: another process fetches it, waiting")),
            Event::Done => {
                self.count(|counts| counts.done += 1);
                self.report.note(format_args!("{name}: done"));
            }
            Event::Present => self.count(|counts| counts.present += 1),
            Event::Mounted { from } => {
                self.count(|counts| counts.mounted += 1);
                self.report.note(format_args!("{name}: taken from {from}"));
            }
        }
    }
}
