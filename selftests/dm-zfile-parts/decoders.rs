// SPDX-License-Identifier: GPL-2.0

//! The codecs of dm-zfile that are not the kernel's, for the benchmark's module in C.

#[path = "../../rust/bindings/mod.rs"]
mod bindings;
#[path = "../../rust/codec/crc32c.rs"]
#[allow(unreachable_pub)]
mod crc32c;
#[path = "../../rust/codec/lz4.rs"]
#[allow(dead_code, unreachable_pub, unused_imports)]
mod lz4;

use core::slice::from_raw_parts;

/// Decompresses the block of `len` bytes that `readable` bytes from `src` on begin with. Returns
/// `dst_len`, or 0 if the block is another.
///
/// # Safety
///
/// `src` and `dst` are valid for as many bytes, and not the same.
#[no_mangle]
unsafe extern "C" fn zfile_lz4_decompress(
    src: *const u8,
    readable: usize,
    len: usize,
    dst: *mut u8,
    dst_len: usize,
) -> usize {
    // SAFETY: As required from the caller.
    let done = unsafe { lz4::decompress_raw(from_raw_parts(src, readable), len, dst, dst_len) };
    match done {
        Ok(()) => dst_len,
        Err(_) => 0,
    }
}

/// Continues a CRC-32C.
///
/// # Safety
///
/// `data` is valid for `len` bytes.
#[no_mangle]
unsafe extern "C" fn zfile_crc32c(seed: u32, data: *const u8, len: usize) -> u32 {
    // SAFETY: As required from the caller.
    crc32c::crc32c(seed, unsafe { from_raw_parts(data, len) })
}
