// SPDX-License-Identifier: GPL-2.0

//! Making, finding and removing devices: commands to `/dev/ublk-control`, which go by io_uring alone.

#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd, process};

use io_uring::{opcode, squeue::Entry128, types::Fd, IoUring};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::{
    self, ControlCommand, DeviceInfo, Parameters, BASIC, CONTROL, FEATURES, FLAGS, READ_ONLY,
};

/// Requests that may be under way at once.
pub const DEPTH: u16 = 64;
/// Most bytes of a request.
pub const MAX_IO_BYTES: u32 = 1 << 20;
/// 512 bytes, and 4 KiB.
const SECTOR_SHIFT: u8 = 9;
const PAGE_SHIFT: u8 = 12;

/// The control device.
pub struct Control {
    file: File,
    ring: IoUring<Entry128>,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// The system's: `NotFound` where the kernel has no ublk, or its module is not loaded. `Unsupported` where it lacks what
    /// is used of it.
    pub fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(CONTROL)?;
        let mut control = Self {
            file,
            ring: IoUring::builder().build(4)?,
        };
        let mut features = 0_u64;
        control.command(abi::GET_FEATURES, u32::MAX, 0, Some(&mut features))?;
        match features & FEATURES == FEATURES {
            true => Ok(control),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Makes a read-only device of `bytes`, whole sectors, that remembers `owner`; nobody serves it yet. Returns its number.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn add(&mut self, bytes: u64, owner: u64) -> io::Result<u32> {
        let mut info = DeviceInfo {
            queues: 1,
            depth: DEPTH,
            max_io_bytes: MAX_IO_BYTES,
            // The kernel chooses a number.
            device: u32::MAX,
            flags: FLAGS,
            // The driver keeps it and does not look at it.
            server_flags: owner,
            ..DeviceInfo::default()
        };
        self.command(abi::ADD_DEV, u32::MAX, 0, Some(&mut info))?;
        let mut parameters = Parameters {
            length: size_of::<Parameters>() as u32,
            types: BASIC,
            attributes: READ_ONLY,
            logical_shift: SECTOR_SHIFT,
            // A blob in a wrapper begins at any sector.
            physical_shift: SECTOR_SHIFT,
            optimal_shift: PAGE_SHIFT,
            minimal_shift: SECTOR_SHIFT,
            max_sectors: MAX_IO_BYTES >> SECTOR_SHIFT,
            sectors: bytes >> SECTOR_SHIFT,
            ..Parameters::default()
        };
        let set = self.command(abi::SET_PARAMS, info.device, 0, Some(&mut parameters));
        match set {
            Ok(()) => Ok(info.device),
            Err(error) => {
                let _ = self.delete(info.device);
                Err(error)
            }
        }
    }

    /// What the kernel knows of a device.
    ///
    /// # Errors
    ///
    /// The system's; `ENODEV` where there is none.
    pub fn info(&mut self, device: u32) -> io::Result<DeviceInfo> {
        let mut info = DeviceInfo::default();
        self.command(abi::GET_DEV_INFO, device, 0, Some(&mut info))?;
        Ok(info)
    }

    /// Bytes of a device.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn bytes(&mut self, device: u32) -> io::Result<u64> {
        let mut parameters = Parameters {
            length: size_of::<Parameters>() as u32,
            types: BASIC,
            ..Parameters::default()
        };
        self.command(abi::GET_PARAMS, device, 0, Some(&mut parameters))?;
        Ok(parameters.sectors << SECTOR_SHIFT)
    }

    /// Begins to take over a device whose server has gone.
    ///
    /// # Errors
    ///
    /// The system's: `EBUSY` while one is there.
    pub fn begin_recovery(&mut self, device: u32) -> io::Result<()> {
        self.command::<u64>(abi::START_USER_RECOVERY, device, 0, None)
    }

    /// Lets requests through, `recovered` or for the first time. Waits until all of them can be taken by this process.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn start(&mut self, device: u32, recovered: bool) -> io::Result<()> {
        let command = match recovered {
            true => abi::END_USER_RECOVERY,
            false => abi::START_DEV,
        };
        self.command::<u64>(command, device, u64::from(process::id()), None)
    }

    /// Ends a device that nobody has open.
    ///
    /// # Errors
    ///
    /// `EBUSY` where somebody has, and the system's.
    pub fn try_stop(&mut self, device: u32) -> io::Result<()> {
        self.command::<u64>(abi::TRY_STOP_DEV, device, 0, None)
    }

    /// Ends a device: who has it open gets errors from now on.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn stop(&mut self, device: u32) -> io::Result<()> {
        self.command::<u64>(abi::STOP_DEV, device, 0, None)
    }

    /// Removes a device, and waits until its server has let go of it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn delete(&mut self, device: u32) -> io::Result<()> {
        self.command::<u64>(abi::DEL_DEV, device, 0, None)
    }

    fn command<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        number: u32,
        device: u32,
        data: u64,
        mut buffer: Option<&mut T>,
    ) -> io::Result<()> {
        let address = buffer.as_mut().map_or(0, |buffer| {
            buffer.as_mut_bytes().as_mut_ptr().expose_provenance() as u64
        });
        let command = ControlCommand {
            device,
            queue: u16::MAX,
            length: if buffer.is_some() {
                size_of::<T>() as u16
            } else {
                0
            },
            address,
            data,
            path_length: 0,
            pad: 0,
            reserved: 0,
        };
        let mut bytes = [0; 80];
        bytes[..size_of::<ControlCommand>()].copy_from_slice(command.as_bytes());
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), number)
            .cmd(bytes)
            .build();
        // SAFETY: The command is in the entry itself. Of memory the driver reads and writes the buffer alone, of which it is
        // told the length, and any bytes are a value of it; it is borrowed mutably for this call, which does not end before
        // the command has, as there is no other in the ring.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The entry may be under way: what it points to must not go.
                Err(error) => {
                    tracing::error!(%error, "io_uring");
                    process::abort();
                }
                Ok(_) => {}
            }
            if let Some(done) = self.ring.completion().next() {
                return match done.result() {
                    result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
                    _ => Ok(()),
                };
            }
        }
    }
}
