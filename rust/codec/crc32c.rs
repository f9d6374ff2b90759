// SPDX-License-Identifier: GPL-2.0

//! The checksum of ZFiles and of their parts: CRC-32C.

use super::bindings;

/// Continues the CRC-32C `seed` over `data`.
///
/// Neither the seed nor the result is inverted. The usual CRC-32C is `!crc32c(!0, data)`.
///
/// This is the kernel's, except on processors that have the instruction for CRC-32C but not that
/// with which the kernel computes several streams at a time, as virtual ones of level x86-64-v2.
/// There the kernel loops over words, and most of what it executes is the loop.
#[inline]
pub fn crc32c(seed: u32, data: &[u8]) -> u32 {
    #[cfg(all(CONFIG_X86_64, not(CONFIG_UML)))]
    {
        // SAFETY: The function has no requirements.
        if unsafe { bindings::crc32c_has_one_stream() } {
            // SAFETY: The processor has the instruction.
            return unsafe { x86_64::crc32c(seed, data) };
        }
    }
    // SAFETY: The slice is valid for its length.
    unsafe { bindings::crc32c(seed, data.as_ptr().cast(), data.len()) }
}

#[cfg(all(CONFIG_X86_64, not(CONFIG_UML)))]
mod x86_64 {
    use core::arch::asm;

    /// Bytes that are taken at a time.
    const CHUNK: usize = 64;

    /// Continues a CRC-32C.
    ///
    /// # Safety
    ///
    /// The processor must have the `crc32` instruction.
    pub(super) unsafe fn crc32c(seed: u32, data: &[u8]) -> u32 {
        let mut crc = u64::from(seed);
        let chunks = data.chunks_exact(CHUNK);
        let rest = chunks.remainder();
        for chunk in chunks {
            // SAFETY: These are the bytes of the chunk, and the processor has the instruction.
            unsafe {
                asm!(
                    "crc32 {crc}, qword ptr [{data}]",
                    "crc32 {crc}, qword ptr [{data} + 8]",
                    "crc32 {crc}, qword ptr [{data} + 16]",
                    "crc32 {crc}, qword ptr [{data} + 24]",
                    "crc32 {crc}, qword ptr [{data} + 32]",
                    "crc32 {crc}, qword ptr [{data} + 40]",
                    "crc32 {crc}, qword ptr [{data} + 48]",
                    "crc32 {crc}, qword ptr [{data} + 56]",
                    crc = inout(reg) crc,
                    data = in(reg) chunk.as_ptr(),
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
        }
        let words = rest.chunks_exact(8);
        let bytes = words.remainder();
        for word in words {
            // SAFETY: These are the bytes of the word, and the processor has the instruction.
            unsafe {
                asm!(
                    "crc32 {crc}, qword ptr [{data}]",
                    crc = inout(reg) crc,
                    data = in(reg) word.as_ptr(),
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
        }
        for byte in bytes {
            // SAFETY: The processor has the instruction.
            unsafe {
                asm!(
                    "crc32 {crc:e}, {byte}",
                    crc = inout(reg) crc,
                    byte = in(reg_byte) *byte,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
        // The instruction leaves the upper half zero.
        crc as u32
    }
}
