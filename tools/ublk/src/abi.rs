// SPDX-License-Identifier: GPL-2.0

//! What is said between a ublk server and the kernel: linux/ublk_cmd.h.

use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device that makes others.
pub const CONTROL: &str = "/dev/ublk-control";

/// `_IOR('u', number, struct of bytes)`.
const fn read(number: u32, bytes: u32) -> u32 {
    (2 << 30) | (bytes << 16) | ((b'u' as u32) << 8) | number
}

/// `_IOWR('u', number, struct of bytes)`.
const fn read_write(number: u32, bytes: u32) -> u32 {
    (1 << 30) | read(number, bytes)
}

/// Bytes of `struct ublksrv_ctrl_cmd`.
const CONTROL_BYTES: u32 = 32;
/// Bytes of `struct ublksrv_io_cmd`.
const IO_BYTES: u32 = 16;

pub const GET_DEV_INFO: u32 = read(0x02, CONTROL_BYTES);
pub const ADD_DEV: u32 = read_write(0x04, CONTROL_BYTES);
pub const DEL_DEV: u32 = read_write(0x05, CONTROL_BYTES);
pub const START_DEV: u32 = read_write(0x06, CONTROL_BYTES);
pub const STOP_DEV: u32 = read_write(0x07, CONTROL_BYTES);
pub const SET_PARAMS: u32 = read_write(0x08, CONTROL_BYTES);
pub const GET_PARAMS: u32 = read(0x09, CONTROL_BYTES);
pub const START_USER_RECOVERY: u32 = read_write(0x10, CONTROL_BYTES);
pub const END_USER_RECOVERY: u32 = read_write(0x11, CONTROL_BYTES);
pub const GET_FEATURES: u32 = read(0x13, CONTROL_BYTES);
pub const TRY_STOP_DEV: u32 = read_write(0x17, CONTROL_BYTES);

pub const FETCH: u32 = read_write(0x20, IO_BYTES);
pub const COMMIT_AND_FETCH: u32 = read_write(0x21, IO_BYTES);

/// Requests wait for another server when this one has gone.
const USER_RECOVERY: u64 = 1 << 3;
/// And those that this one was about to answer are asked again.
const USER_RECOVERY_REISSUE: u64 = 1 << 4;
const CMD_IOCTL_ENCODE: u64 = 1 << 6;
/// The server writes what it gives to the character device.
const USER_COPY: u64 = 1 << 7;
/// [`TRY_STOP_DEV`] is there.
const SAFE_STOP: u64 = 1 << 17;
/// Nobody looks for partitions on a part of a stack.
const NO_AUTO_PART_SCAN: u64 = 1 << 18;

/// What a device is made with.
pub const FLAGS: u64 =
    USER_RECOVERY | USER_RECOVERY_REISSUE | CMD_IOCTL_ENCODE | USER_COPY | NO_AUTO_PART_SCAN;
/// What the kernel must know for it.
pub const FEATURES: u64 = FLAGS | SAFE_STOP;

/// `UBLK_S_DEV_LIVE`: a server is there.
pub const STATE_LIVE: u16 = 1;

/// `UBLK_IO_OP_READ`, in the low eight bits of what is to be done.
pub const OP_READ: u32 = 0;
pub const OP_MASK: u32 = 0xff;

/// Where on the character device the data of requests are.
const DATA_OFFSET: u64 = 0x8000_0000;
/// Bits of the place in the data of a request.
const DATA_BITS: u32 = 25;

/// Where on the character device byte `at` of the data of request `tag` is, in the only queue.
pub const fn data_offset(tag: u16, at: u64) -> u64 {
    DATA_OFFSET + ((tag as u64) << DATA_BITS) + at
}

/// `struct ublksrv_ctrl_cmd`.
#[derive(Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ControlCommand {
    pub device: u32,
    /// -1 where no queue is meant.
    pub queue: u16,
    /// Bytes of the buffer.
    pub length: u16,
    /// Address of the buffer.
    pub address: u64,
    pub data: u64,
    pub path_length: u16,
    pub pad: u16,
    pub reserved: u32,
}

/// `struct ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfo {
    pub queues: u16,
    pub depth: u16,
    pub state: u16,
    pub descriptor_bytes: u16,
    pub max_io_bytes: u32,
    pub device: u32,
    pub server: i32,
    pub pad: u32,
    pub flags: u64,
    pub server_flags: u64,
    pub owner: u32,
    pub group: u32,
    pub reserved: [u64; 2],
}

/// `struct ublk_params` as far as it is used: `UBLK_PARAM_TYPE_BASIC`.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Parameters {
    /// Bytes of all of it.
    pub length: u32,
    pub types: u32,
    pub attributes: u32,
    pub logical_shift: u8,
    pub physical_shift: u8,
    pub optimal_shift: u8,
    pub minimal_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub sectors: u64,
    pub virtual_boundary: u64,
}

pub const BASIC: u32 = 1;
pub const READ_ONLY: u32 = 1;

/// `struct ublksrv_io_cmd`.
#[derive(Clone, Copy, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoCommand {
    pub queue: u16,
    pub tag: u16,
    pub result: i32,
    pub address: u64,
}

/// `struct ublksrv_io_desc`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    pub operation: u32,
    pub sectors: u32,
    pub start: u64,
    pub address: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::size_of;

    #[test]
    fn structures_and_numbers_are_those_of_the_kernel() {
        assert_eq!(size_of::<ControlCommand>(), CONTROL_BYTES as usize);
        assert_eq!(size_of::<IoCommand>(), IO_BYTES as usize);
        assert_eq!(size_of::<DeviceInfo>(), 64);
        assert_eq!(size_of::<Parameters>(), 40);
        assert_eq!(size_of::<Descriptor>(), 24);
        // As a C compiler computes them from the header.
        assert_eq!(ADD_DEV, 0xc020_7504);
        assert_eq!(GET_DEV_INFO, 0x8020_7502);
        assert_eq!(COMMIT_AND_FETCH, 0xc010_7521);
        assert_eq!(data_offset(3, 5), 0x8000_0000 + (3 << 25) + 5);
    }
}
