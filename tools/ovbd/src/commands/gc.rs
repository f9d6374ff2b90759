// SPDX-License-Identifier: GPL-2.0

//! `ovbd gc`.

use std::{
    cell::OnceCell, collections::HashSet, fs, path::Path, process::ExitCode, time::Duration,
};

use anyhow::Result;
use clap::Args;
use ovbd_layers::units;
use ovbd_oci::Error;
use serde_json::json;

use crate::{config, names::StoreOption, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd gc --dry-run --older 0
      what would go, also of what came just now";

/// Remove files from the store that no image needs.
///
/// Files under loop devices stay, those of stacks in /etc/ovbd, and those that came less than an hour ago; squashed files as
/// long as an image has the layers. Waits for transfers to end.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Gc {
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Keep what is younger than this: seconds, or with m, h or d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = time)]
    pub older: Duration,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
}

impl Gc {
    /// Removes the files.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let store = self.store.open()?;
        // Asked once, when no transfer runs any more: one of them may end with a device.
        let used = OnceCell::new();
        let in_use = |digest: &ovbd_oci::Digest| -> ovbd_oci::Result<bool> {
            if used.get().is_none() {
                let mut names = under_loop_devices()?;
                names.extend(of_configured_stacks()?);
                used.set(names).ok();
            }
            Ok(used
                .get()
                .is_some_and(|used: &HashSet<String>| used.contains(digest.hex())))
        };
        let waiting = || report.note("waiting for transfers to end");
        let swept = store.sweep(self.older, self.dry_run, in_use, waiting)?;
        if self.json {
            let blobs: Vec<_> = swept
                .blobs
                .iter()
                .map(|(digest, size)| json!({"digest": digest, "bytes": size}))
                .collect();
            let files: Vec<_> = swept
                .files
                .iter()
                .map(|(path, size)| json!({"path": path, "bytes": size}))
                .collect();
            let answer = json!({"removed": !self.dry_run, "blobs": blobs, "parts": files, "in_use": swept.in_use});
            return report.print(&(serde_json::to_string_pretty(&answer)? + "\n"));
        }
        let mut text = String::new();
        for (digest, size) in &swept.blobs {
            text.push_str(&format!("{digest}  {}\n", units::size(*size)));
        }
        for (path, size) in &swept.files {
            text.push_str(&format!("{}  {}\n", path.display(), units::size(*size)));
        }
        for digest in &swept.in_use {
            report.note(format_args!(
                "{digest} stays: it is under a loop device or in a file of /etc/ovbd"
            ));
        }
        let total: u64 = swept
            .blobs
            .iter()
            .map(|(_, size)| size)
            .chain(swept.files.iter().map(|(_, size)| size))
            .sum();
        let verb = if self.dry_run {
            "would be removed"
        } else {
            "removed"
        };
        text.push_str(&format!("{} {verb}\n", units::size(total)));
        report.print(&text)
    }
}

/// The names of the files that stacks of /etc/ovbd have as layers, up or not.
fn of_configured_stacks() -> ovbd_oci::Result<Vec<String>> {
    let names = config::layer_files(Path::new("/")).map_err(|error| {
        let what = format!("{}: what it needs is not known", error.what());
        Error::new(ovbd_oci::Kind::Refused, error.path().display(), what)
    })?;
    let text = |name: &std::ffi::OsString| name.to_string_lossy().into_owned();
    Ok(names.iter().map(text).collect())
}

/// The names of the files under loop devices. A file in a store has its digest as name, in whatever namespace of mounts
/// it was attached.
///
/// # Errors
///
/// The system's.
pub fn under_loop_devices() -> ovbd_oci::Result<HashSet<String>> {
    let folder = Path::new("/sys/block");
    let entries = fs::read_dir(folder)
        .map_err(|error| Error::io(folder, "look for loop devices in", error))?;
    let mut names = HashSet::new();
    for entry in entries.flatten() {
        let path = entry.path().join("loop/backing_file");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let text = text.trim_end();
                let file = Path::new(text.strip_suffix(" (deleted)").unwrap_or(text)).file_name();
                names.extend(file.map(|name| name.to_string_lossy().into_owned()));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            // Of a device that was detached meanwhile.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {}
            Err(error) => return Err(Error::io(&path, "read", error)),
        }
    }
    Ok(names)
}

/// A time: `90`, `30m`, `1h`, `2d`.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; 90, 30m, 1h and 2d are");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number
        .checked_mul(seconds)
        .map(Duration::from_secs)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(time("90"), Ok(Duration::from_secs(90)));
        assert_eq!(time("2d"), Ok(Duration::from_secs(172_800)));
        for bad in ["", "h", "1w", "-1", "1.5h", "99999999999999999999d"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
