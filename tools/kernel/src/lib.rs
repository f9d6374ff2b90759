// SPDX-License-Identifier: GPL-2.0

//! What the tools ask of the kernel where no library of plain Rust does: loop devices, device-mapper, the semaphores
//! by which udev says that it has seen a mapped device, and file systems that are to hold still.
//!
//! The module `call` makes the system calls and is the only place with `unsafe`; what goes in and what comes out are
//! bytes, and the other modules check every length and offset in them.

mod call;
pub mod dm;
pub mod loops;
mod number;
pub mod udev;

use std::{fs::File, io};

pub use number::Number;

/// Freezes the file system that `file` is on: all that was written reaches its device, and who writes more waits
/// until [`thaw`]. The caller may be killed, the file system stays frozen.
///
/// # Errors
///
/// The system's: `EBUSY` where it is frozen already, `EOPNOTSUPP` where it cannot be.
pub fn freeze(file: &File) -> io::Result<()> {
    call::freeze(file)
}

/// Lets a frozen file system go on.
///
/// # Errors
///
/// The system's: `EINVAL` where it is not frozen.
pub fn thaw(file: &File) -> io::Result<()> {
    call::thaw(file)
}

/// Discards `bytes` of a block device from byte `start` on, both multiples of its sectors. What they read as then depends on
/// the device.
///
/// # Errors
///
/// The system's: `EOPNOTSUPP` where the device cannot discard.
pub fn discard(device: &File, start: u64, bytes: u64) -> io::Result<()> {
    call::clear(device, false, start, bytes)
}

/// Makes `bytes` of a block device from byte `start` on read as zeros, both multiples of its sectors.
///
/// # Errors
///
/// The system's.
pub fn zero_out(device: &File, start: u64, bytes: u64) -> io::Result<()> {
    call::clear(device, true, start, bytes)
}
