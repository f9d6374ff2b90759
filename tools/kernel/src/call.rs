// SPDX-License-Identifier: GPL-2.0

//! The system calls themselves. Every function here is safe for whatever its arguments are.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use libc::{c_int, c_ulong};

use crate::{
    dm::HEADER_BYTES,
    loops::{Config, Info},
};

// linux/loop.h
const LOOP_GET_STATUS64: c_ulong = 0x4c05;
const LOOP_CONFIGURE: c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: c_ulong = 0x4c82;

// linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const FIFREEZE: c_ulong = 0xc004_5877;
const FITHAW: c_ulong = 0xc004_5878;

// linux/fs.h: _IO(0x12, 119) and _IO(0x12, 127).
const BLKDISCARD: c_ulong = 0x1277;
const BLKZEROOUT: c_ulong = 0x127f;

/// Takes what a system call returned.
fn checked(result: c_int) -> io::Result<c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// An ioctl that takes no memory of the caller; `number` must be of such a one. Private for that.
fn plain(file: RawFd, number: c_ulong, argument: c_ulong) -> io::Result<c_int> {
    // SAFETY: The callers below pass numbers of ioctls that take an integer, or ignore their argument, in the drivers
    // that know them. Any other driver refuses a number that it does not know; those numbers are of loop devices (type
    // 'L') and of file systems (type 'X', handled by the kernel's own do_vfs_ioctl before any driver).
    checked(unsafe { libc::ioctl(file, number as _, argument) })
}

/// LOOP_CTL_GET_FREE: the number of a loop device without a file, which is made where there is none.
pub fn loop_get_free(control: &File) -> io::Result<u32> {
    let number = plain(control.as_raw_fd(), LOOP_CTL_GET_FREE, 0)?;
    u32::try_from(number).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// LOOP_CONFIGURE: gives a loop device its file and everything else at once.
pub fn loop_configure(device: &File, config: &Config) -> io::Result<()> {
    // SAFETY: This ioctl reads a `struct loop_config` from the pointer and writes nothing. `Config` has its layout and
    // size, which a test compares, and lives until the call returns.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, config) }).map(drop)
}

/// LOOP_GET_STATUS64: what a loop device is attached to.
pub fn loop_status(device: &File) -> io::Result<Info> {
    let mut info = Info::default();
    // SAFETY: This ioctl writes one `struct loop_info64` to the pointer. `Info` has its layout and size, which a test
    // compares, any bytes are a value of it, and it is borrowed by nobody else during the call.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &mut info) })?;
    Ok(info)
}

/// FIFREEZE.
pub fn freeze(file: &File) -> io::Result<()> {
    plain(file.as_raw_fd(), FIFREEZE, 0).map(drop)
}

/// FITHAW.
pub fn thaw(file: &File) -> io::Result<()> {
    plain(file.as_raw_fd(), FITHAW, 0).map(drop)
}

/// BLKDISCARD, or BLKZEROOUT where the range must read as zeros.
pub fn clear(device: &File, zero: bool, start: u64, bytes: u64) -> io::Result<()> {
    let range = [start, bytes];
    let number = if zero { BLKZEROOUT } else { BLKDISCARD };
    // SAFETY: These ioctls, which only block devices know, read two 64-bit numbers from the pointer and write nothing.
    // `range` has them and lives until the call returns.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), number as _, range.as_ptr()) }).map(drop)
}

/// A device-mapper ioctl with the `struct dm_ioctl` that `buffer` starts with, and what follows it.
///
/// # Errors
///
/// The system's, and a buffer without such a structure or that says another size of itself.
pub fn dm(control: &File, command: u8, buffer: &mut [u8]) -> io::Result<()> {
    // The size is the fourth number.
    let size = buffer.get(12..16).and_then(|bytes| bytes.try_into().ok());
    let size = size.map(u32::from_ne_bytes).map_or(0, |size| size as usize);
    if size != buffer.len() || size < HEADER_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // linux/dm-ioctl.h: _IOWR(0xfd, command, struct dm_ioctl).
    let number =
        (3 << 30) | ((HEADER_BYTES as c_ulong) << 16) | (0xfd << 8) | c_ulong::from(command);
    // SAFETY: device-mapper, which alone knows this type of ioctl, copies the structure from the pointer, then as many
    // bytes as it says it has (`data_size`), and writes back at most as many (ctl_ioctl() in dm-ioctl.c). That is the
    // length of `buffer`, as was checked, and `buffer` is borrowed by nobody else during the call.
    checked(unsafe { libc::ioctl(control.as_raw_fd(), number as _, buffer.as_mut_ptr()) }).map(drop)
}

/// Makes a new set of one semaphore, whose value is 0; fails where the key is taken.
pub fn semaphore_create(key: i32) -> io::Result<c_int> {
    // SAFETY: Takes integers only.
    checked(unsafe { libc::semget(key, 1, libc::IPC_CREAT | libc::IPC_EXCL | 0o600) })
}

/// Adds `change` to the value of a semaphore, or where `change` is 0 asks whether the value is 0. `WouldBlock` where
/// the value would become negative or is not 0.
pub fn semaphore_change(id: c_int, change: i16) -> io::Result<()> {
    let mut operation = libc::sembuf {
        sem_num: 0,
        sem_op: change,
        sem_flg: libc::IPC_NOWAIT as i16,
    };
    // SAFETY: Reads one operation from the pointer, which lives until the call returns.
    checked(unsafe { libc::semop(id, &mut operation, 1) }).map(drop)
}

/// Removes a set of semaphores.
pub fn semaphore_remove(id: c_int) -> io::Result<()> {
    // SAFETY: This command takes no fourth argument, and no memory of the caller.
    checked(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}
