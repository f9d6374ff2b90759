// SPDX-License-Identifier: GPL-2.0

//! An EROFS that is only an index of tars ("mkfs.erofs --tar=i"), also of several that were merged: its files are in devices
//! besides, which are the tars. Where each begins behind the file system stands in its table of devices, so that all of them
//! can be one device, and that is what the kernel takes where no others are given to it.

use ovbd_image::lsmt::{Entry, Identity, UuidText, DATA_START, SECTOR_BYTES};

use crate::{
    blob::Content,
    error::{Error, Result},
    joined::{Joined, Part},
    layer_writer::MAX_RUN_SECTORS,
    turbo::Target,
    zfile::Cursor,
};

/// Where the superblock is.
const SUPERBLOCK: u64 = 1024;
/// Bytes of it that are looked at.
const SUPERBLOCK_BYTES: usize = 128;
const MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];
/// The feature that there is a table of devices.
const DEVICE_TABLE: u32 = 8;
/// Bytes of an entry there.
const SLOT_BYTES: usize = 128;
/// Most devices: what a stack can have.
const MAX_DEVICES: u16 = 255;

/// A device besides, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Where it begins in the one device.
    start: u64,
    /// Sectors of the tar.
    sectors: u64,
}

/// The devices of `image`, in order; `None` if it is no EROFS that has any.
///
/// # Errors
///
/// A table that cannot be there, and those of reading.
pub fn read(image: &Content) -> Result<Option<Vec<Device>>> {
    let cursor = &mut Cursor::default();
    if image.bytes() < SUPERBLOCK + SUPERBLOCK_BYTES as u64 {
        return Ok(None);
    }
    let block: [u8; SUPERBLOCK_BYTES] = image.read_array(cursor, SUPERBLOCK)?;
    let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let count = u16_at(86);
    if block[..4] != MAGIC || u32_at(&block, 80) & DEVICE_TABLE == 0 || count == 0 {
        return Ok(None);
    }
    let fail = |what: &str| Error::new(image.input().path(), what);
    let bits = block[12];
    if !(9..=16).contains(&bits) {
        return Err(fail("an EROFS with blocks of a size that cannot be"));
    }
    if count > MAX_DEVICES {
        return Err(fail("an EROFS with more devices than can be mapped"));
    }
    let sectors = |blocks: u32| u64::from(blocks) << (bits - 9);
    let table_at = u64::from(u16_at(88)) * SLOT_BYTES as u64;
    let mut devices = Vec::new();
    let mut end = image.bytes().div_ceil(SECTOR_BYTES);
    for number in 0..u64::from(count) {
        let slot: [u8; SLOT_BYTES] =
            image.read_array(cursor, table_at + number * SLOT_BYTES as u64)?;
        let device = Device {
            start: sectors(u32_at(&slot, 68)),
            sectors: sectors(u32_at(&slot, 64)),
        };
        if device.start < end || device.sectors == 0 {
            return Err(fail(
                "an EROFS with devices that are not one behind the other",
            ));
        }
        end = device.start + device.sectors;
        devices.push(device);
    }
    Ok(Some(devices))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..).and_then(<[u8]>::first_chunk);
    found.map_or(0, |found| u32::from_le_bytes(*found))
}

/// Makes one layer of `image`, which has these devices, and of the tars, its targets.
///
/// # Errors
///
/// Another number of targets, and one that is too short.
pub fn join(image: Content, devices: &[Device], targets: &[Target]) -> Result<Joined> {
    if devices.len() != targets.len() {
        let what = format!(
            "an EROFS over {} tars, and {} are given (--target, in order)",
            devices.len(),
            targets.len()
        );
        return Err(Error::new(image.input().path(), what));
    }
    if image.bytes() % SECTOR_BYTES != 0 {
        let what = "an EROFS that is cut off inside a sector";
        return Err(Error::new(image.input().path(), what));
    }
    let mut entries = Vec::new();
    let mut map = |start: u64, sectors: u64, stored: u64| {
        for at in (0..sectors).step_by(MAX_RUN_SECTORS as usize) {
            let entry = Entry {
                start: start + at,
                sectors: (sectors - at).min(MAX_RUN_SECTORS) as u32,
                stored: stored + at,
                zeroed: false,
                tag: 0,
            };
            entries.push(entry.encode());
        }
    };
    let head_sectors = image.bytes() / SECTOR_BYTES;
    map(0, head_sectors, DATA_START);
    let mut parts = Vec::new();
    let mut stored = DATA_START + head_sectors;
    for (device, target) in devices.iter().zip(targets) {
        if target.bytes() / SECTOR_BYTES < device.sectors {
            let what = format!(
                "has {} bytes, and the EROFS was made of a tar of {} at least",
                target.bytes(),
                device.sectors * SECTOR_BYTES
            );
            return Err(Error::new(target.path(), what));
        }
        map(device.start, device.sectors, stored);
        stored += device.sectors;
        parts.push(Part {
            target: target.clone(),
            sectors: device.sectors,
        });
    }
    let end = devices.last().map_or(0, |last| last.start + last.sectors);
    let identity = Identity {
        virtual_size: end * SECTOR_BYTES,
        uuid: UuidText::NIL,
        parent_uuid: UuidText::NIL,
    };
    let front = identity.header().to_vec();
    Ok(Joined::new(
        front,
        (image, head_sectors),
        parts,
        entries,
        &identity,
    ))
}
