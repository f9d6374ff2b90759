// SPDX-License-Identifier: GPL-2.0

//! The checksum of ZFiles and of their parts: the kernel's CRC-32C.

use super::bindings;

/// Continues the CRC-32C `seed` over `data`.
///
/// Neither the seed nor the result is inverted. The usual CRC-32C is `!crc32c(!0, data)`.
#[inline]
pub fn crc32c(seed: u32, data: &[u8]) -> u32 {
    // SAFETY: The slice is valid for its length.
    unsafe { bindings::crc32c(seed, data.as_ptr().cast(), data.len()) }
}
