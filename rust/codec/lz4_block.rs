// SPDX-License-Identifier: GPL-2.0

//! LZ4 blocks: our decoder, and the kernel's.

use super::{
    bindings,
    Destination,
    Input, //
};
use kernel::prelude::*;

/// Which decoder decompresses LZ4 blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lz4Decoder {
    /// That of [`lz4`](super::lz4) where it is made for the architecture, else the kernel's.
    Own,
    /// The kernel's.
    Kernel,
}

impl Lz4Decoder {
    /// Decompresses one LZ4 block to all of `dst`.
    ///
    /// Fails with `EINVAL` if the block is not valid, or not exactly as long as `dst` when
    /// decompressed. The content of `dst` is unspecified then.
    #[inline]
    pub fn decompress(self, src: Input<'_>, dst: &mut Destination<'_>) -> Result {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Own {
            // SAFETY: The destination is valid for its length. Input is private memory.
            return unsafe {
                super::lz4::decompress_raw(src.readable(), src.len(), dst.as_mut_ptr(), dst.len())
            }
            .map_err(|_| EINVAL);
        }
        let src_len = c_int::try_from(src.len()).map_err(|_| EINVAL)?;
        let dst_len = c_int::try_from(dst.len()).map_err(|_| EINVAL)?;
        // SAFETY: Both memories are valid for their lengths. The function reads and writes nothing
        // outside, whatever the input is.
        let len = unsafe {
            bindings::LZ4_decompress_safe(
                src.bytes().as_ptr().cast(),
                dst.as_mut_ptr().cast(),
                src_len,
                dst_len,
            )
        };
        if len == dst_len {
            Ok(())
        } else {
            Err(EINVAL)
        }
    }
}
