// SPDX-License-Identifier: GPL-2.0

//! Loop devices: linux/loop.h.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{call, Number};

/// Major number of loop devices.
pub const MAJOR: u32 = 7;

/// The device that makes loop devices.
pub const CONTROL: &str = "/dev/loop-control";

const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

/// What of its file a new loop device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First byte.
    pub offset: u64,
    /// Bytes, whole sectors; 0 for all.
    pub bytes: u64,
    /// Bytes of a block of the device. Direct I/O wants no smaller blocks than those of the disk below, and `offset` at the
    /// start of one of them.
    pub block_bytes: u32,
}

impl Part {
    /// The whole file in blocks of 512 bytes, also where it lies on a disk with larger ones: layers are made of sectors of
    /// this size.
    pub const ALL: Self = Self {
        offset: 0,
        bytes: 0,
        block_bytes: 512,
    };
}

/// `struct loop_info64`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Default for Info {
    fn default() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}

/// `struct loop_config`.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct Config {
    file: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// An attached loop device, held open: it detaches itself when this is dropped and nothing else has it open.
#[derive(Debug)]
pub struct Attached {
    _device: File,
    /// Number of the device.
    pub number: Number,
    /// Device node.
    pub node: PathBuf,
}

/// Attaches a part of a file to a free loop device; read-only if the file was opened so. There is no moment at which the device has the file and would not let it go with its last user.
///
/// Reads and writes bypass the page cache of the file system below where it can do that: the mapped devices have their
/// own.
///
/// # Errors
///
/// The system's.
pub fn attach(file: &File, writable: bool, part: Part) -> io::Result<Attached> {
    // Threads of one program need not race each other for the same free device.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let control = File::options().read(true).write(true).open(CONTROL)?;
    let config = Config {
        file: file.as_raw_fd() as u32,
        block_size: part.block_bytes,
        info: Info {
            offset: part.offset,
            size_limit: part.bytes,
            flags: AUTOCLEAR | DIRECT_IO | if writable { 0 } else { READ_ONLY },
            ..Info::default()
        },
        reserved: [0; 8],
    };
    loop {
        let free = call::loop_get_free(&control)?;
        let node = PathBuf::from(format!("/dev/loop{free}"));
        let device = match File::options().read(true).write(writable).open(&node) {
            // Removed since.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => continue,
            result => result?,
        };
        match call::loop_configure(&device, &config) {
            // Another program was faster.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            result => {
                result?;
                let number = Number(MAJOR, free);
                return Ok(Attached {
                    _device: device,
                    number,
                    node,
                });
            }
        }
    }
}

/// What a loop device is attached to, as the kernel itself knows it: names may be those of other files by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Number that `stat` gives as the device of the file.
    pub device: Number,
    /// Inode number of the file.
    pub inode: u64,
    /// Number of the block device, where the file is one.
    pub block_device: Option<Number>,
    /// First byte.
    pub offset: u64,
    /// Bytes, 0 for all.
    pub size_limit: u64,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Whether it detaches itself from the file with its last user.
    pub autoclear: bool,
    /// Whether it reads and writes past the page cache of the file system below.
    pub direct_io: bool,
}

/// Asks a loop device what it is attached to; `None` if to nothing.
///
/// # Errors
///
/// The system's.
pub fn status(node: &Path) -> io::Result<Option<Status>> {
    let nothing = |e: io::Error| match e.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        _ => Err(e),
    };
    let device = match File::open(node) {
        Ok(device) => device,
        Err(e) => return nothing(e),
    };
    let info = match call::loop_status(&device) {
        Ok(info) => info,
        Err(e) => return nothing(e),
    };
    Ok(Some(Status {
        device: Number::from_ioctl(info.device),
        inode: info.inode,
        block_device: (info.rdevice != 0).then(|| Number::from_ioctl(info.rdevice)),
        offset: info.offset,
        size_limit: info.size_limit,
        read_only: info.flags & READ_ONLY != 0,
        autoclear: info.flags & AUTOCLEAR != 0,
        direct_io: info.flags & DIRECT_IO != 0,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, mem::size_of, os::unix::fs::MetadataExt};

    #[test]
    fn structures_have_the_size_that_the_kernel_wants() {
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(size_of::<Config>(), 304);
        assert_eq!(std::mem::offset_of!(Info, flags), 52);
        assert_eq!(std::mem::offset_of!(Config, info), 8);
    }

    /// Whether this machine lets the test make loop devices; says why not.
    fn can_attach() -> bool {
        match File::options().read(true).write(true).open(CONTROL) {
            Ok(_) => true,
            Err(e) => {
                println!("skipped: {CONTROL}: {e}");
                false
            }
        }
    }

    #[test]
    fn a_file_is_attached_whole_and_known_by_its_inode() {
        if !can_attach() {
            return;
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let data: Vec<u8> = (0..8192_u32).flat_map(u32::to_le_bytes).collect();
        file.write_all(&data).unwrap();
        let found = file.as_file().metadata().unwrap();

        let readable = File::open(file.path()).unwrap();
        let attached = attach(
            &readable,
            false,
            Part {
                offset: 1536,
                bytes: 4096,
                ..Part::ALL
            },
        )
        .unwrap();
        let status = super::status(&attached.node).unwrap().unwrap();
        assert_eq!(status.device, Number::new(found.dev()));
        assert_eq!(status.inode, found.ino());
        assert_eq!((status.offset, status.size_limit), (1536, 4096));
        assert!(status.read_only && status.autoclear);
        assert_eq!(std::fs::read(&attached.node).unwrap(), data[1536..][..4096]);
        // The name does not matter.
        let (node, number) = (attached.node.clone(), attached.number);
        drop(file);
        assert_eq!(super::status(&node).unwrap().unwrap().inode, found.ino());
        drop(attached);
        let gone = !number.sysfs().join("loop").exists();
        assert!(gone, "{} goes with its last user", node.display());
    }

    #[test]
    fn a_writable_one_writes() {
        if !can_attach() {
            return;
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let attached = attach(&file, true, Part::ALL).unwrap();
        let status = super::status(&attached.node).unwrap().unwrap();
        assert!(!status.read_only);
        let mut device = File::options().write(true).open(&attached.node).unwrap();
        device.write_all(&[7; 4096]).unwrap();
        device.sync_all().unwrap();
        let mut found = [0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).unwrap();
        assert_eq!(found, [7; 4096]);
    }
}
