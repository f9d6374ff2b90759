// SPDX-License-Identifier: GPL-2.0

//! A volume that a pull makes: it has another name until it is complete.

use ovbd_lvm::{partial, snapshot, Name, Volume, Volumes};

/// The name of a volume until it is complete.
pub fn part_of(name: &Name) -> Name {
    name.sibling(format!("{}.part", name.lv))
}

/// Whether a volume is there under its name, and is what `is_it` says; `what` that is, is for the message about another one.
/// What an earlier pull has left of it is put in order.
///
/// # Errors
///
/// Something else has one of the names, and LVM's.
pub fn find(
    volumes: &Volumes,
    name: &Name,
    what: &str,
    is_it: impl Fn(&Volume) -> bool,
) -> ovbd_layers::Result<bool> {
    let part = part_of(name);
    if let Some(volume) = volumes.find(name) {
        if is_it(volume) {
            return Ok(true);
        }
        let what = format!("exists and is not {what}, or can be written to: rename or remove it");
        return Err(name.error(what));
    }
    match volumes.find(&part) {
        // It was complete, and killed before it got its name.
        Some(volume) if is_it(volume) => {
            snapshot::rename(&part, name)?;
            Ok(true)
        }
        Some(volume) if volume.tags.is_partial() => {
            // Who makes it has the right to the name, which is ours now.
            partial::remove(volume)?;
            Ok(false)
        }
        Some(_) => Err(part.error("is in the way and not of a pull: rename or remove it")),
        None => Ok(false),
    }
}
