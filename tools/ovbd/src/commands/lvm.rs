// SPDX-License-Identifier: GPL-2.0

//! `ovbd lvm`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use ovbd_devices::{check_root, Interrupt};
use ovbd_layers::units;
use ovbd_lvm::{
    difference::{self, Context},
    partial::{self, Found},
    pool::{self, Held},
    snapshot, tags,
    undo::{self, Undo},
    Name, Volume, Volumes,
};
use serde_json::json;

use crate::{base::candidates, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd lvm status --changes vg
      which volumes of vg are images, and how much a push of the others would read

  ovbd lvm recover
      takes back what a push or pull left that was killed, and says what stays

  ovbd lvm recover --force vg/pool
      releases the metadata snapshot of a pool, whichever program asked for it

  ovbd lvm prune --dry-run --keep 3 vg/web
      which snapshots of vg/web would go if the newest three that were pushed are kept";

/// Show which logical volume is which image, and tidy up.
///
/// "status" lists the volumes that are images. "recover" takes back what programs left that were killed: volumes that they
/// activated, their metadata snapshots of pools, volumes that are not complete. Every push and pull does that as well, but
/// for volumes from before a reboot. What "recover" cannot tell the owner of stays, and is said with the option that removes
/// it. "prune" removes old snapshots.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Lvm {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum Command {
    Status(Status),
    Recover(Recover),
    Prune(Prune),
}

/// List the volumes that are images
#[derive(Debug, Args)]
pub struct Status {
    /// Of thin volumes that can be written to, ask thin_delta how much may have changed since the newest snapshot that is an
    /// image: a push reads that much, and sends what differs in blocks of 4 KiB
    #[arg(long)]
    pub changes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Only those of this volume group
    #[arg(value_name = "VG")]
    pub vg: Option<String>,
}

/// Take back what programs left that were killed; exit status 1 if something stays
#[derive(Debug, Args)]
pub struct Recover {
    /// Release the metadata snapshot of the pool, whoever holds it; remove the volume that is not complete, unless a
    /// process that lives makes it
    #[arg(long, requires = "name")]
    pub force: bool,
    /// The pool, or the volume that is not complete
    #[arg(value_name = "VG/LV")]
    pub name: Option<Name>,
}

/// Remove snapshots of a volume that were pushed, but the newest
#[derive(Debug, Args)]
pub struct Prune {
    /// Keep the newest N of each repository
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub keep: usize,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The volume whose snapshots they are
    #[arg(value_name = "VG/LV")]
    pub volume: Name,
}

impl Lvm {
    /// Whether the answer is to be JSON.
    pub fn wants_json(&self) -> bool {
        matches!(&self.command, Command::Status(status) if status.json)
    }

    /// Does it.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        check_root()?;
        match self.command {
            Command::Status(status) => status.run(report),
            Command::Recover(recover) => recover.run(report),
            Command::Prune(prune) => prune.run(report),
        }
    }
}

impl Status {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let volumes = match &self.vg {
            Some(vg) => Volumes::of_group(vg)?,
            None => Volumes::all()?,
        };
        let known = |volume: &&Volume| volume.tags.is_image() || volume.tags.is_partial();
        let mut text = String::new();
        let mut list = Vec::new();
        for volume in volumes.iter().filter(known) {
            let tag = |name| volume.tags.get(name);
            let state = match volume.tags.is_partial() {
                true => "not complete",
                false if volume.writable => "changed perhaps, it can be written to",
                false => "unchanged",
            };
            let image = match (tag(tags::REPO), tag(tags::TAG)) {
                (Some(repo), Some(tag)) => format!("{repo}:{tag}"),
                (Some(repo), None) => repo.to_owned(),
                _ => "no image".to_owned(),
            };
            let digest = tag(tags::MANIFEST).unwrap_or("-");
            let size = units::size(volume.bytes);
            text += &format!("{}: {size}, {image}  {digest}, {state}\n", volume.name);
            list.push(json!({
                "name": volume.name.to_string(), "bytes": volume.bytes, "manifest": tag(tags::MANIFEST),
                "repo": tag(tags::REPO), "tag": tag(tags::TAG), "chain": tag(tags::CHAIN),
                "origin": volume.origin.as_ref().map(ToString::to_string), "writable": volume.writable,
                "partial": volume.tags.is_partial(), "active": volume.active,
            }));
        }
        if self.changes {
            for change in changes(&volumes, report)? {
                let (changed, discarded) =
                    (units::size(change.changed), units::size(change.discarded));
                let (name, base) = (&change.name, &change.base);
                text += &format!(
                    "{name}: {changed} may have changed since {base}, {discarded} discarded\n"
                );
                list.push(json!({
                    "name": name.to_string(), "base": base.to_string(), "changed": change.changed,
                    "discarded": change.discarded,
                }));
            }
        }
        report.print(&match self.json {
            true => format!("{}\n", serde_json::Value::from(list)),
            false => text,
        })
    }
}

/// How much of a volume may have changed since it was pushed, in bytes.
struct Change {
    name: Name,
    base: Name,
    changed: u64,
    discarded: u64,
}

/// Of all thin volumes that can be written to and of which a snapshot is an image.
fn changes(volumes: &Volumes, report: &Report) -> Result<Vec<Change>> {
    let interrupt = Interrupt::install()?;
    let undo = Undo::begin()?;
    let context = Context {
        undo: &undo,
        interrupt: &interrupt,
        report,
    };
    let mut found = Vec::new();
    let is_live = |v: &&Volume| v.is_thin() && v.writable && !v.tags.is_partial();
    for volume in volumes.iter().filter(is_live) {
        let bases = candidates(volumes, &volume.name, volume, snapshot::is_unchanged);
        let Some(base) = bases.first() else {
            continue;
        };
        let pool = volumes.pool_of(volume)?;
        let (changed, discarded) = difference::amount(pool, base, volume, context)?;
        found.push(Change {
            name: volume.name.clone(),
            base: base.name.clone(),
            changed,
            discarded,
        });
    }
    Ok(found)
}

impl Recover {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let interrupt = Interrupt::install()?;
        let found = undo::recover(report)?;
        let (mut done, mut kept) = (found.done, found.kept);
        let forced = self.name.as_ref().filter(|_| self.force);
        let volumes = match &self.name {
            Some(name) => Volumes::of_group(&name.vg)?,
            None => Volumes::all()?,
        };
        let mut left = |name: &Name, what: String| {
            kept += 1;
            report.warning(&name.error(what).into());
        };
        for found in partial::remove_left(&volumes, forced, false)? {
            match found {
                Found::Removed(name) => done.push(format!("{name}: removed, it was not complete")),
                Found::Left(name, what) => left(&name, what),
            }
        }
        if let Some(name) = &self.name {
            let volume = match volumes.find(name) {
                Some(volume) => volume,
                // It was noted, and is gone by now.
                None if !done.is_empty() => return said(&done, kept, report),
                None => volumes.get(name)?,
            };
            if volume.is_pool() {
                match pool::release(volume, self.force, &interrupt, report)? {
                    Held::Nothing => {}
                    Held::Released => done.push(format!("{name}: metadata snapshot released")),
                    Held::Left(what) => left(name, what),
                }
            } else if !volume.tags.is_partial() {
                let what = "neither a thin pool nor a volume that is not complete";
                return Err(name.error(what).into());
            }
        }
        said(&done, kept, report)
    }
}

fn said(done: &[String], kept: usize, report: &Report) -> Result<ExitCode> {
    let text: String = done.iter().map(|line| line.clone() + "\n").collect();
    report.print(&text)?;
    Ok(match kept {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

impl Prune {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let _interrupt = Interrupt::install()?;
        if !self.dry_run {
            undo::recover(report)?;
        }
        let volumes = Volumes::of_group(&self.volume.vg)?;
        volumes.get(&self.volume)?;
        let mut text = String::new();
        for found in partial::remove_left(&volumes, None, self.dry_run)? {
            match found {
                Found::Removed(name) => text += &format!("{name}\n"),
                Found::Left(name, what) => report.warning(&name.error(what).into()),
            }
        }
        let mut snapshots: Vec<&Volume> = volumes
            .iter()
            .filter(|volume| volume.origin.as_ref() == Some(&self.volume))
            .filter(|volume| volume.tags.is_image())
            .collect();
        snapshots.sort_by_key(|volume| std::cmp::Reverse((volume.time, volume.thin_id)));
        let mut kept: Vec<&str> = Vec::new();
        for volume in snapshots {
            let repo = volume.tags.get(tags::REPO).unwrap_or_default();
            let count = kept.iter().filter(|other| **other == repo).count();
            if count < self.keep {
                kept.push(repo);
                continue;
            }
            // What it holds may be nowhere else.
            if volume.writable {
                let what = "can be written to, so it may hold more than its image: not removed";
                report.warning(&volume.name.error(what).into());
                continue;
            }
            if volume.open {
                report.warning(&volume.name.error("is in use: not removed").into());
                continue;
            }
            if let Some(other) = volumes.dependent(volume) {
                let what = format!("{} is made of it: not removed", other.name);
                report.warning(&volume.name.error(what).into());
                continue;
            }
            if !self.dry_run {
                snapshot::remove(volume)?;
            }
            text += &format!("{}\n", volume.name);
        }
        report.print(&text)
    }
}
