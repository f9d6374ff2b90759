// SPDX-License-Identifier: GPL-2.0

//! Layers in memory that can be accessed directly, for instance that which a virtual machine shares with others: which
//! devices have some, which of them hold layers, and which layers make a stack.
//!
//! Such devices have no names that last, so layers are found by the UUID in their trailer, which is at the end of the
//! device.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::{UuidText, SECTOR_BYTES};
use ovbd_kernel::Number;
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    file_range::FileRange,
    layer::LayerPath,
    sysfs,
    zeros::is_zero,
};

use crate::layer_place::LayerPlace;

/// How a stack is accessed.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device with memory for what no layer has data for.
    pub zeros: Option<PathBuf>,
}

/// Bytes at either end of a device of zeros that are looked at. More would take the memory of it all.
const LOOKED_AT: u64 = 1 << 16;

/// The block devices, which errors of what is not found are about.
const DEVICES: &str = "/sys/class/block";

/// A device that holds a layer.
#[derive(Clone, Debug)]
struct Found {
    path: PathBuf,
    uuid: Option<UuidText>,
    parent: Option<UuidText>,
}

impl Found {
    fn is(&self, uuid: &str) -> bool {
        self.uuid.as_ref().is_some_and(|own| same(own, uuid))
    }
}

fn same(own: &UuidText, uuid: &str) -> bool {
    own.as_str().eq_ignore_ascii_case(uuid)
}

/// Whether a block device has direct access: a whole one, or a partition.
pub fn has_direct_access(device: Number) -> bool {
    // That of a partition is in the folder of its disk.
    [Path::new("queue/dax"), Path::new("../queue/dax")]
        .iter()
        .any(|file| {
            let found = fs::read_to_string(device.sysfs().join(file));
            found.is_ok_and(|text| text.trim_end() == "1")
        })
}

/// The number of the block device at a path.
fn number(path: &Path) -> Result<Option<Number>> {
    Ok(match FileId::at(path)? {
        Some(FileId::Device(device)) => Some(Number::new(device)),
        _ => None,
    })
}

/// The layers of a stack, bottom first: those of these names, a UUID or a device each, or without names the only stack
/// that the layers of all devices make.
///
/// # Errors
///
/// What is not there, or there twice, and sysfs.
pub fn layers(names: &[OsString]) -> Result<Vec<LayerPath>> {
    let paths = match names {
        [] => only_stack(&found()?)?,
        names => {
            let mut known = None;
            let mut paths = Vec::new();
            for name in names {
                paths.push(match uuid_of(name) {
                    None => PathBuf::from(name),
                    Some(uuid) => {
                        let found = match &mut known {
                            Some(found) => found,
                            none => none.insert(found()?),
                        };
                        with_uuid(found, &uuid)?.path.clone()
                    }
                });
            }
            paths
        }
    };
    Ok(paths.into_iter().map(LayerPath::Sealed).collect())
}

/// The UUID that a name is.
fn uuid_of(name: &OsStr) -> Option<String> {
    let uuid = uuid::Uuid::try_parse(name.to_str()?).ok()?;
    Some(uuid.hyphenated().to_string())
}

/// All devices with direct access that hold a layer and of which nothing else is made.
fn found() -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut folders = sysfs::list(Path::new(DEVICES))?;
    folders.sort();
    for folder in folders {
        let Some(device) = sysfs::read_number(&folder).filter(|one| has_direct_access(*one)) else {
            continue;
        };
        if !sysfs::holders(device)?.is_empty() {
            continue;
        }
        let path = PathBuf::from(sysfs::device_name(device));
        // What cannot be read as a layer is none. Whoever looks for one misses it then.
        if let Ok(layer) = LayerPlace::open(&LayerPath::Sealed(path.clone())) {
            found.push(Found {
                path,
                uuid: layer.trailer.uuid,
                parent: layer.trailer.parent_uuid,
            });
        }
    }
    Ok(found)
}

fn with_uuid<'a>(found: &'a [Found], uuid: &str) -> Result<&'a Found> {
    let mut those = found.iter().filter(|one| one.is(uuid));
    match (those.next(), those.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => {
            let what = "no device with direct access, of which nothing else is made, ends with a layer of this UUID";
            Err(Error::new(Path::new(uuid), what))
        }
        (Some(one), Some(other)) => {
            let what = format!("also on {}: name one of them", other.path.display());
            Err(Error::new(&one.path, what))
        }
    }
}

/// The stack of all layers, bottom first.
fn only_stack(found: &[Found]) -> Result<Vec<PathBuf>> {
    let is_below = |one: &Found| {
        let uuid = one.uuid.as_ref().map(UuidText::as_str);
        uuid.is_some_and(|uuid| {
            let parents = found.iter().filter_map(|other| other.parent.as_ref());
            parents.into_iter().any(|parent| same(parent, uuid))
        })
    };
    let mut tops = found.iter().filter(|one| !is_below(one));
    let mut next = match (tops.next(), tops.next()) {
        (Some(top), None) => top,
        (None, _) => {
            let what = "no device with direct access ends with a layer on which no other one is";
            return Err(Error::new(Path::new(DEVICES), what));
        }
        (Some(top), Some(other)) => {
            let what = format!(
                "the top of a stack, and so is {}: name the layers",
                other.path.display()
            );
            return Err(Error::new(&top.path, what));
        }
    };
    let mut stack = vec![next.path.clone()];
    while let Some(parent) = next.parent.as_ref().filter(|parent| !parent.is_nil()) {
        next = with_uuid(found, parent.as_str())?;
        if stack.contains(&next.path) {
            return Err(Error::new(&next.path, "a layer below itself"));
        }
        stack.push(next.path.clone());
    }
    stack.reverse();
    Ok(stack)
}

/// Refuses a layer whose memory is not that of the layer as it is.
///
/// # Errors
///
/// Why.
pub fn check_layer(layer: &LayerPlace) -> Result<()> {
    let fail = |what: &str| Err(Error::new(&layer.path, what));
    if layer.original_bytes.is_some() {
        return fail("is compressed, so there is no direct access to what it holds");
    }
    if !layer.is_whole_device() {
        return fail("is not a device that begins with a layer, so there is no direct access");
    }
    match number(&layer.path)? {
        Some(device) if has_direct_access(device) => Ok(()),
        _ => fail("is a device without direct access"),
    }
}

/// Refuses a device of zeros for `sectors` that is too small, cannot be accessed directly, or holds something where it is
/// looked at.
///
/// # Errors
///
/// Why, and those of reading.
pub fn check_zeros(path: &Path, sectors: u64) -> Result<()> {
    let fail = |what: &str| Err(Error::new(path, what));
    match number(path)? {
        Some(device) if has_direct_access(device) => (),
        Some(_) => return fail("is a device without direct access"),
        None => return fail("is not a block device"),
    }
    let device = FileRange::open(path)?;
    if device.bytes() / SECTOR_BYTES < sectors {
        return fail("is smaller than the stack");
    }
    let last = device.bytes().saturating_sub(LOOKED_AT);
    for at in [0, last] {
        let mut bytes = vec![0; LOOKED_AT.min(device.bytes() - at) as usize];
        device.read(&mut bytes, at)?;
        if !is_zero(&bytes) {
            return fail("does not hold zeros");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(number: u8) -> UuidText {
        UuidText::new(format!("{number:08x}-0000-4000-8000-000000000000").as_bytes()).unwrap()
    }

    /// Layers by their own number and that of their parent.
    fn layers_of(pairs: &[(u8, u8)]) -> Vec<Found> {
        let layer = |(own, parent): &(u8, u8)| Found {
            path: format!("/dev/pmem{own}").into(),
            uuid: Some(uuid(*own)),
            parent: match parent {
                0 => Some(UuidText::NIL),
                parent => Some(uuid(*parent)),
            },
        };
        pairs.iter().map(layer).collect()
    }

    fn stack(pairs: &[(u8, u8)]) -> std::result::Result<Vec<String>, String> {
        let paths = only_stack(&layers_of(pairs)).map_err(|e| e.to_string())?;
        Ok(paths
            .iter()
            .map(|path| path.display().to_string())
            .collect())
    }

    #[test]
    fn the_only_stack() {
        assert_eq!(
            stack(&[(3, 2), (1, 0), (2, 1)]).unwrap(),
            ["/dev/pmem1", "/dev/pmem2", "/dev/pmem3"]
        );
        assert_eq!(stack(&[(1, 0)]).unwrap(), ["/dev/pmem1"]);
        for (pairs, why) in [
            (&[][..], "no device"),
            (
                &[(1, 0), (2, 0)],
                "the top of a stack, and so is /dev/pmem2",
            ),
            (&[(2, 1)], "no device with direct access, of which"),
            (
                &[(2, 1), (3, 1), (1, 0)],
                "the top of a stack, and so is /dev/pmem3",
            ),
            (&[(1, 0), (1, 0), (2, 1)], "also on /dev/pmem1"),
            (&[(1, 2), (2, 1)], "on which no other one is"),
            (&[(1, 1), (2, 1)], "a layer below itself"),
        ] {
            let error = stack(pairs).unwrap_err();
            assert!(error.contains(why), "{pairs:?}: {error}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(uuid_of(OsStr::new("/dev/pmem0")), None);
        let text = "56FC051E-AAB5-8E92-A45A-C0047CAE4F71";
        assert!(uuid_of(OsStr::new(text))
            .unwrap()
            .eq_ignore_ascii_case(text));
    }
}
