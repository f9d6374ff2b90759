// SPDX-License-Identifier: GPL-2.0

//! Which blocks direct I/O wants.

use std::{fs::File, io, os::unix::fs::MetadataExt, path::Path};

use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_kernel::Number;
use rustix::fs::{AtFlags, StatxFlags};

use ovbd_layers::error::{Error, Result};

/// Largest blocks that a loop device can have everywhere.
const MAX_BLOCK_BYTES: u32 = 4096;

/// Bytes of the blocks that a loop device on `file` must have for direct I/O, as the kernel itself decides it: those of the
/// device of the file system, unless that says something else. A sector where there is no direct I/O.
///
/// # Errors
///
/// The system's.
pub fn block_bytes(file: &File, path: &Path) -> Result<u32> {
    let bytes = ask(file).map_err(|e| Error::io(path, "find the blocks of direct I/O on", e))?;
    let usable =
        (SECTOR_BYTES as u32..=MAX_BLOCK_BYTES).contains(&bytes) && bytes.is_power_of_two();
    Ok(if usable { bytes } else { SECTOR_BYTES as u32 })
}

fn ask(file: &File) -> io::Result<u32> {
    let found = file.metadata()?;
    if std::os::unix::fs::FileTypeExt::is_block_device(&found.file_type()) {
        return Ok(rustix::fs::ioctl_blksszget(file)?);
    }
    let wanted = StatxFlags::DIOALIGN;
    let status = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
    if status.stx_mask & wanted.bits() != 0 {
        return Ok(status.stx_dio_offset_align);
    }
    // Older file systems do not tell.
    let device = Number::new(found.dev()).sysfs();
    let of_disk = ["queue", "../queue"].iter().find_map(|queue| {
        let text = std::fs::read_to_string(device.join(queue).join("logical_block_size")).ok()?;
        text.trim_end().parse().ok()
    });
    Ok(of_disk.unwrap_or(0))
}
