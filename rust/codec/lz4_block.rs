// SPDX-License-Identifier: GPL-2.0

//! LZ4 blocks: the kernel's decompressor.

use super::{
    bindings,
    Destination, //
};
use kernel::prelude::*;

/// Decompresses one LZ4 block, and returns the length of the output.
///
/// Fails with `EINVAL` if the block is not valid, or longer than `dst` when decompressed. The
/// content of `dst` beyond the output is unspecified, and so is all of it after a failure.
pub fn lz4_decompress_safe(src: &[u8], dst: &mut Destination<'_>) -> Result<usize> {
    let src_len = c_int::try_from(src.len()).map_err(|_| EINVAL)?;
    let dst_len = c_int::try_from(dst.len()).map_err(|_| EINVAL)?;
    // SAFETY: Both memories are valid for their lengths. The function reads and writes nothing
    // outside, whatever the input is.
    let ret = unsafe {
        bindings::LZ4_decompress_safe(
            src.as_ptr().cast(),
            dst.as_mut_ptr().cast(),
            src_len,
            dst_len,
        )
    };
    usize::try_from(ret).map_err(|_| EINVAL)
}
