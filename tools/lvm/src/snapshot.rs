// SPDX-License-Identifier: GPL-2.0

//! Making, tagging and naming volumes. Every volume that we make has the tag [`tags::PARTIAL`] until it is complete, and is
//! removed where it does not become so.

use ovbd_layers::error::Result;

use crate::{
    partial::{self, Mark},
    program,
    tags::{self, Tags},
    undo::{Action, Undo},
    volume::{Name, Volume},
};

/// A volume that is not complete. It is removed when this is dropped.
#[derive(Debug)]
pub struct Made {
    name: Name,
    mark: Mark,
    noted: Option<(Undo, u64)>,
}

impl Made {
    /// Makes a read-only thin snapshot, which is not active. A mounted file system on `origin` is frozen meanwhile.
    ///
    /// # Errors
    ///
    /// LVM's: the name is taken, the pool is full or read-only.
    pub fn snapshot(origin: &Name, name: &Name, undo: &Undo) -> Result<Self> {
        let origin = origin.to_string();
        Self::make(
            name,
            undo,
            &[
                "--snapshot",
                "--permission",
                "r",
                "--name",
                &name.lv,
                &origin,
            ],
        )
    }

    /// Makes a writable thin snapshot that is to be filled, active and skipped by automatic activation.
    ///
    /// # Errors
    ///
    /// As [`Made::snapshot`].
    pub fn copy(origin: &Name, name: &Name, undo: &Undo) -> Result<Self> {
        let origin = origin.to_string();
        Self::make(
            name,
            undo,
            &[
                "--snapshot",
                "--activate",
                "y",
                "--ignoreactivationskip",
                "--name",
                &name.lv,
                &origin,
            ],
        )
    }

    /// Makes an empty thin volume of `bytes` that is to be filled, active and skipped by automatic activation.
    ///
    /// # Errors
    ///
    /// As [`Made::snapshot`].
    pub fn empty(pool: &Name, name: &Name, bytes: u64, undo: &Undo) -> Result<Self> {
        let (pool, size) = (pool.to_string(), format!("{bytes}b"));
        let words = [
            "--thin",
            "--virtualsize",
            &size,
            "--name",
            &name.lv,
            "--setactivationskip",
            "y",
            "--ignoreactivationskip",
            "--activate",
            "y",
            // What the pool's chunks held before is nobody's file system: the volume reads as zeros.
            "--wipesignatures",
            "n",
            &pool,
        ];
        Self::make(name, undo, &words)
    }

    /// Makes a volume of `bytes` at least that is to be filled, active now and not with its group.
    ///
    /// # Errors
    ///
    /// LVM's: the name is taken, the group has no room.
    pub fn linear(name: &Name, bytes: u64, undo: &Undo) -> Result<Self> {
        let size = format!("{bytes}b");
        let words = [
            "--size",
            &size,
            "--name",
            &name.lv,
            "--activate",
            "y",
            "--setautoactivation",
            "n",
            // What its extents held before is nobody's.
            "--wipesignatures",
            "y",
            &name.vg,
        ];
        Self::make(name, undo, &words)
    }

    fn make(name: &Name, undo: &Undo, words: &[&str]) -> Result<Self> {
        let mark = Mark::new()?;
        let number = undo.note(Action::Made {
            mark: mark.as_str().to_owned(),
        })?;
        let made = Self {
            name: name.clone(),
            mark,
            noted: Some((undo.clone(), number)),
        };
        let tag = made.mark.tag();
        let tag = ["--yes", "--addtag", &tag];
        // Where it fails there may be a volume all the same: it could not be activated. What is dropped looks for it.
        program::run(&name.path(), "lvcreate", tag.iter().chain(words))?;
        Ok(made)
    }

    /// Its name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// What it is known by, whatever its name.
    pub fn mark(&self) -> &Mark {
        &self.mark
    }

    /// It is complete, and stays.
    pub fn keep(mut self) {
        if let Some((undo, number)) = self.noted.take() {
            undo.forget(number);
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let Some((undo, number)) = self.noted.take() else {
            return;
        };
        // Where it cannot be removed the note stays.
        if partial::remove_marked(&self.mark).is_ok() {
            undo.forget(number);
        }
    }
}

/// Replaces our tags of a volume by `new`, all at once.
///
/// # Errors
///
/// LVM's.
pub fn tag(volume: &Name, old: &Tags, new: &[(&str, String)]) -> Result<()> {
    change(volume, old, new, &[])
}

/// As [`tag`], and makes the volume read-only.
///
/// # Errors
///
/// LVM's.
pub fn tag_read_only(volume: &Name, old: &Tags, new: &[(&str, String)]) -> Result<()> {
    change(volume, old, new, &["--permission", "r"])
}

fn change(volume: &Name, old: &Tags, new: &[(&str, String)], more: &[&str]) -> Result<()> {
    let mut words: Vec<String> = more.iter().map(|word| (*word).to_owned()).collect();
    let new: Vec<String> = new
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    for tag in old.all().filter(|tag| !new.contains(tag)) {
        words.extend(["--deltag".to_owned(), tag]);
    }
    for tag in new {
        words.extend(["--addtag".to_owned(), tag]);
    }
    words.push(volume.to_string());
    program::run(&volume.path(), "lvchange", words).map(drop)
}

/// Gives a volume another name in its group.
///
/// # Errors
///
/// LVM's: the name is taken.
pub fn rename(from: &Name, to: &Name) -> Result<()> {
    let words = [&from.vg, &from.lv, &to.lv];
    program::run(&from.path(), "lvrename", words).map(drop)
}

/// Makes a thin volume larger.
///
/// # Errors
///
/// LVM's.
pub fn extend(volume: &Name, bytes: u64) -> Result<()> {
    let words = ["--size", &format!("{bytes}b"), &volume.to_string()];
    program::run(&volume.path(), "lvextend", words).map(drop)
}

/// Makes an active thin volume smaller, whatever is on it.
///
/// # Errors
///
/// LVM's.
pub fn reduce(volume: &Name, bytes: u64) -> Result<()> {
    let (size, name) = (format!("{bytes}b"), volume.to_string());
    let words = ["--yes", "--force", "--size", &size, &name];
    // What is on it is about to be replaced. Before 2.03.17 LVM did not look, and did not know the option.
    let ignoring = ["--fs", "ignore"].iter().chain(&words);
    let known = program::run_if_known(&volume.path(), "lvreduce", ignoring)?;
    if !known {
        program::run(&volume.path(), "lvreduce", words)?;
    }
    Ok(())
}

/// Makes a writable thin snapshot that is activated with its group as any volume.
///
/// # Errors
///
/// LVM's.
pub fn writable(origin: &Name, name: &Name) -> Result<()> {
    let words = [
        "--snapshot",
        "--setactivationskip",
        "n",
        "--activate",
        "y",
        "--name",
        &name.lv,
        &origin.to_string(),
    ];
    program::run(&name.path(), "lvcreate", words).map(drop)
}

/// Whether a volume is a thin snapshot or volume that nobody can have changed since it was tagged.
pub fn is_unchanged(volume: &Volume) -> bool {
    !volume.writable && volume.tags.is_image()
}

/// Removes a volume that nobody uses.
///
/// # Errors
///
/// LVM's: it is in use.
pub fn remove_unused(volume: &Volume) -> Result<()> {
    let select = format!("lv_uuid=\"{}\"", volume.uuid);
    let words = ["--yes", "--quiet", "--select", &select, &volume.name.vg];
    program::run(&volume.name.path(), "lvremove", words).map(drop)
}

/// Removes a read-only snapshot of ours that is an image, if it is so still.
///
/// # Errors
///
/// LVM's: it is in use.
pub fn remove(volume: &Volume) -> Result<()> {
    let path = volume.name.path();
    let tag = volume.tags.get(tags::MANIFEST).unwrap_or_default();
    // LVM itself looks that it is the volume that was meant.
    let select = format!(
        "lv_uuid=\"{}\" && lv_permissions=\"read-only\" && lv_tags={{\"{}={tag}\"}}",
        volume.uuid,
        tags::MANIFEST
    );
    let words = ["--yes", "--quiet", "--select", &select, &volume.name.vg];
    program::run(&path, "lvremove", words).map(drop)
}
