// SPDX-License-Identifier: GPL-2.0

//! What may be overwritten: never an input, never a device that something uses, and what a device holds only if the
//! user says so.

use std::{
    collections::HashSet,
    fs::File,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::{fs::OFlags, io::Errno};

use ovbd_kernel::Number;

use crate::{
    block_device::{above, below, block_number},
    error::{name, Error, Result},
    file_id::FileId,
    mounts::{mounts, swaps},
    signature,
    sysfs::device_name,
};

/// Refuses an output that is one of the `inputs`, or shares a device with one.
///
/// # Errors
///
/// That one, with the name of the input, and those of looking files up. Inputs that are missing are nobody's output.
pub fn check_is_no_input<'a>(
    output: &Path,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<()> {
    let Some(out) = FileId::at(output)? else {
        return Ok(());
    };
    let is_device = matches!(out, FileId::Device(_));
    let under = if is_device {
        below(out)
    } else {
        HashSet::from([out])
    };
    for input in inputs {
        let Some(id) = FileId::at(input)? else {
            continue;
        };
        // What is stored on the output, or what the output is stored on.
        if under.contains(&id) || (is_device && below(id).contains(&out)) {
            let what = format!(
                "is an input itself ({}), which it would destroy",
                name(input)
            );
            return Err(Error::new(output, what));
        }
    }
    Ok(())
}

/// Who uses the block device at `path`, or one that is made of it; `None` if nobody is seen to. Mounts in other mount
/// namespaces are not seen: only opening it exclusively shows them.
///
/// # Errors
///
/// /proc or /sys cannot be read: then nothing is known.
pub fn user(path: &Path) -> Result<Option<String>> {
    let Some(FileId::Device(device)) = FileId::at(path)? else {
        return Ok(None);
    };
    let own = Number::new(device);
    let devices = above(FileId::Device(device))?;
    let via = |number: Number| match number == own {
        true => String::new(),
        false => format!(" as {}", device_name(number)),
    };
    let mounts = mounts()?;
    let swaps = swaps()?;
    for number in &devices {
        if let Some(mount) = mounts.iter().find(|mount| mount.is_on(*number)) {
            let what = format!("mounted on {}{}", name(&mount.point), via(*number));
            return Ok(Some(what));
        }
        if swaps.iter().any(|swap| block_number(swap) == Some(*number)) {
            return Ok(Some(format!("swap is on it{}", via(*number))));
        }
    }
    // Partitions that nobody uses are part of what the device holds.
    let held = devices
        .iter()
        .find(|number| **number != own && !number.sysfs().join("partition").exists());
    Ok(held.map(|number| format!("used by {}", device_name(*number))))
}

/// Opens the block device at `path` for reading and writing, exclusively: nobody can mount it meanwhile.
///
/// # Errors
///
/// It is in use, and the system's.
pub fn open_exclusively(path: &Path) -> Result<File> {
    let in_use = |what: String| Error::new(path, format!("in use: {what}"));
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(path)
        .map_err(|e| match Errno::from_io_error(&e) {
            Some(Errno::BUSY) => in_use(match user(path) {
                Ok(Some(what)) => what,
                _ => "another program has it, or another mount namespace".to_owned(),
            }),
            _ => Error::io(path, "open", e),
        })?;
    let found = file.metadata().map_err(|e| Error::io(path, "look up", e))?;
    if !found.file_type().is_block_device() {
        return Err(Error::new(path, "not a block device any more"));
    }
    match user(path)? {
        Some(what) => Err(in_use(what)),
        None => Ok(file),
    }
}

/// Opens the block device at `path` to overwrite it. `content_may_go` says that what it holds is not wanted.
///
/// # Errors
///
/// It is in use, or it holds something, and the system's.
pub fn open_device(path: &Path, content_may_go: bool) -> Result<File> {
    let file = open_exclusively(path)?;
    if !content_may_go {
        if let Some(what) = signature::find(path)? {
            let what = format!("holds {what} (--overwrite-device overwrites it)");
            return Err(Error::new(path, what));
        }
    }
    Ok(file)
}

/// Access mode of a new file that is made of `inputs`: others can do with it no more than with any of these.
///
/// # Errors
///
/// Those of looking files up.
pub fn common_mode<'a>(inputs: impl IntoIterator<Item = &'a Path>) -> Result<u32> {
    let mut mode = 0o666;
    for path in inputs {
        let found = std::fs::metadata(path).map_err(|e| Error::io(path, "look up", e))?;
        mode &= 0o600 | found.mode();
    }
    Ok(mode)
}
