// SPDX-License-Identifier: GPL-2.0

//! Who uses a block device: mounts, swap, other devices, programs.

use std::fs;

use ovbd_kernel::Number;

use crate::storage::Storage;
use ovbd_layers::{error::Result, sysfs::holders};

pub use ovbd_layers::{block_device::block_number, sysfs::device_name};

/// Why a device cannot go away, apart from the holders in `known`.
///
/// # Errors
///
/// It cannot be told.
pub fn why_in_use(device: Number, known: &[Number], storage: &Storage) -> Result<Option<String>> {
    if let Some(mount) = storage.mounts_on(device).next() {
        return Ok(Some(format!("mounted on {}", mount.point.display())));
    }
    let mut swaps = storage.swaps().iter();
    if swaps.any(|swap| block_number(swap) == Some(device)) {
        return Ok(Some("used as swap".to_owned()));
    }
    let mut others = holders(device)?;
    let loops = storage.loops().iter();
    let on_it = loops.filter(|user| user.status.block_device == Some(device));
    others.extend(on_it.map(|user| user.number));
    let holder = others.into_iter().find(|number| !known.contains(number));
    Ok(holder.map(|holder| format!("used by {}", device_name(holder))))
}

/// Which programs have a device open, if any has.
pub fn why_open(device: Number) -> Option<String> {
    let programs = programs(device);
    (!programs.is_empty()).then(|| format!("in use by {}", programs.join(", ")))
}

/// The programs that have a device open, as `name (pid)`.
fn programs(device: Number) -> Vec<String> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for process in processes.flatten().map(|entry| entry.path()) {
        let Ok(files) = fs::read_dir(process.join("fd")) else {
            continue;
        };
        if files
            .flatten()
            .any(|file| block_number(&file.path()) == Some(device))
        {
            let name = fs::read(process.join("comm")).unwrap_or_default();
            let name = String::from_utf8_lossy(&name);
            let id = process.file_name().unwrap_or_default().to_string_lossy();
            found.push(format!("{} ({id})", name.trim_end()));
        }
    }
    found
}
