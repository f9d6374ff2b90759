// SPDX-License-Identifier: GPL-2.0

//! Volumes that are not complete, and whose they are.
//!
//! LVM itself chooses the UUID of a volume, so the program that makes one cannot know it beforehand. It gives the volume a
//! tag instead, in the same transaction, with a mark of its own that is never used again: nothing else is ever taken for
//! that volume, whatever its name. The mark also has the boot it was made in, as notes do not outlive that
//! ([`crate::undo`]) and volumes do.

use std::{fs, path::Path};

use ovbd_layers::error::{Error, Result};

use crate::{
    program,
    tags::PARTIAL,
    undo::{self, Living},
    volume::{Name, Volume, Volumes},
};

/// Where the kernel has the number of this boot.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Where it has a number that nobody had before.
const UNIQUE: &str = "/proc/sys/kernel/random/uuid";

/// What is unique to a volume that is being made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark(String);

impl Mark {
    /// A new one.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> Result<Self> {
        Ok(Self(format!("{}.{}", number(BOOT)?, number(UNIQUE)?)))
    }

    /// That of a volume that is not complete, if it has exactly one.
    pub fn of(volume: &Volume) -> Option<Self> {
        let value = volume.tags.get(PARTIAL).filter(|value| !value.is_empty());
        value.map(|value| Self(value.to_owned()))
    }

    /// One that was noted.
    pub(crate) fn noted(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// As it is noted.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The tag.
    pub fn tag(&self) -> String {
        format!("{PARTIAL}={}", self.0)
    }

    fn boot(&self) -> Option<&str> {
        let (boot, unique) = self.0.split_once('.')?;
        (!boot.is_empty() && !unique.is_empty()).then_some(boot)
    }
}

fn number(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).map_err(|e| Error::io(Path::new(path), "read", e))?;
    Ok(text.trim().to_owned())
}

/// Whose a volume is that is not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A process that is gone.
    Dead,
    /// One that lives.
    Living,
    /// It cannot be told, and why not.
    Unknown(&'static str),
}

impl Owner {
    /// Of a volume with the tag, once what dead processes noted was taken back ([`undo::recover`]).
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn of(volume: &Volume, living: &Living) -> Result<Self> {
        let boot = number(BOOT)?;
        Ok(Self::at(&boot, Mark::of(volume), living))
    }

    fn at(now: &str, mark: Option<Mark>, living: &Living) -> Self {
        let Some(boot) = mark.as_ref().and_then(Mark::boot) else {
            return Self::Unknown("its tag ovbd.partial does not say what made it");
        };
        match mark.as_ref() {
            // Nothing lives that was begun before.
            _ if boot != now => Self::Dead,
            Some(mark) if living.makes(mark) => Self::Living,
            _ if living.unknown() => Self::Unknown("what a living process notes cannot be read"),
            _ => Self::Unknown(
                "it was made since the last boot, and nothing in /run/ovbd says by what process",
            ),
        }
    }
}

/// Removes a volume that has the tag of one that is not complete, if it is that volume still.
///
/// # Errors
///
/// LVM's: it is in use.
pub fn remove(volume: &Volume) -> Result<()> {
    // LVM itself looks that it is the volume that was meant.
    let tag = match Mark::of(volume) {
        Some(mark) => mark.tag(),
        None => PARTIAL.to_owned(),
    };
    let select = format!("lv_uuid=\"{}\" && lv_tags={{\"{tag}\"}}", volume.uuid);
    let words = ["--yes", "--quiet", "--select", &select, &volume.name.vg];
    program::run(&volume.name.path(), "lvremove", words).map(drop)
}

/// Removes the volume of a mark, in whatever group and under whatever name it is; says which that was, if there was one.
///
/// # Errors
///
/// LVM's. Then it may be there still.
pub fn remove_marked(mark: &Mark) -> Result<Option<Name>> {
    let volumes = Volumes::all()?;
    let Some(volume) = volumes.iter().find(|v| Mark::of(v).as_ref() == Some(mark)) else {
        return Ok(None);
    };
    remove(volume)?;
    Ok(Some(volume.name.clone()))
}

/// What became of a volume that is not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It was removed, or would be.
    Removed(Name),
    /// It was left, and why.
    Left(Name, String),
}

/// Removes the volumes of `volumes` that no living process makes; nothing if it is `dry`. Of the one that is `forced` it
/// need not be known. What dead processes noted was taken back before.
///
/// # Errors
///
/// The system's.
pub fn remove_left(volumes: &Volumes, forced: Option<&Name>, dry: bool) -> Result<Vec<Found>> {
    let living = undo::living()?;
    let mut found = Vec::new();
    for volume in volumes.iter().filter(|volume| volume.tags.is_partial()) {
        let name = volume.name.clone();
        match Owner::of(volume, &living)? {
            Owner::Living if forced == Some(&name) => {
                let what =
                    "is not complete, and stays: a process makes it, or has noted it and is gone";
                found.push(Found::Left(name, what.to_owned()));
            }
            Owner::Living => {}
            Owner::Unknown(why) if forced != Some(&name) => {
                let what = format!(
                    "is not complete, and stays: {why} (\"ovbd lvm recover --force {name}\" removes it)"
                );
                found.push(Found::Left(name, what));
            }
            Owner::Dead | Owner::Unknown(_) => match dry {
                true => found.push(Found::Removed(name)),
                false => match remove(volume) {
                    Ok(()) => found.push(Found::Removed(name)),
                    Err(e) => found.push(Found::Left(
                        name,
                        format!("is not complete, and stays: {e}"),
                    )),
                },
            },
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_allowed_and_never_the_same() {
        let (one, other) = (Mark::new().unwrap(), Mark::new().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.boot(), other.boot());
        assert!(crate::tags::is_allowed(&one.tag()), "{}", one.tag());
        assert_eq!(one.boot(), Some(&*number(BOOT).unwrap()));
    }

    #[test]
    fn whose_a_volume_is() {
        let mark = |text: &str| Some(Mark(text.to_owned()));
        let living = Living::of(vec!["now.b".to_owned()], false);
        let owner = |text, living: &Living| Owner::at("now", mark(text), living);
        assert_eq!(owner("before.a", &living), Owner::Dead);
        assert_eq!(owner("now.b", &living), Owner::Living);
        assert!(matches!(owner("now.c", &living), Owner::Unknown(_)));
        // A tag without a mark, or with something else in it.
        assert!(matches!(Owner::at("now", None, &living), Owner::Unknown(_)));
        for text in ["now", ".", "before.", ".a"] {
            assert!(matches!(owner(text, &living), Owner::Unknown(_)), "{text}");
        }
        // Notes of a living process that cannot be read: it may make any of this boot, and none of another.
        let living = Living::of(Vec::new(), true);
        assert_eq!(
            owner("now.b", &living),
            Owner::Unknown("what a living process notes cannot be read")
        );
        assert_eq!(owner("before.a", &living), Owner::Dead);
    }
}
