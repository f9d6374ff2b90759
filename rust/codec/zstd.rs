// SPDX-License-Identifier: GPL-2.0

//! Zstandard frames: the kernel's decompressor.

use super::{
    bindings,
    Destination, //
};
use core::ptr::NonNull;
use kernel::prelude::*;

/// A zstd decompressor with memory of its own, which it allocates once.
///
/// # Invariants
///
/// `dctx` is an initialised context inside `workspace`, which is never resized.
pub struct ZstdDecompressor {
    dctx: NonNull<bindings::zstd_dctx>,
    _workspace: KVVec<u64>,
}

// SAFETY: A context may be used by any thread, by one at a time.
unsafe impl Send for ZstdDecompressor {}
// SAFETY: There are no methods that take `&self`.
unsafe impl Sync for ZstdDecompressor {}

impl ZstdDecompressor {
    /// Returns the size of the memory that a decompressor takes, in bytes.
    pub fn memory() -> usize {
        // SAFETY: The function has no requirements.
        unsafe { bindings::zstd_dctx_workspace_bound() }
    }

    /// Allocates a decompressor.
    pub fn new() -> Result<Self> {
        let words = Self::memory().div_ceil(size_of::<u64>());
        let mut workspace = KVVec::from_elem(0u64, words, GFP_KERNEL)?;
        // SAFETY: The memory is valid, aligned to eight bytes, and stays where it is when the
        // vector is moved.
        let dctx = unsafe {
            bindings::zstd_init_dctx(
                workspace.as_mut_ptr().cast(),
                words.saturating_mul(size_of::<u64>()),
            )
        };
        // INVARIANT: The context was just initialised in the workspace.
        Ok(Self {
            dctx: NonNull::new(dctx).ok_or(EINVAL)?,
            _workspace: workspace,
        })
    }

    /// Decompresses one or more zstd frames, and returns the length of the output.
    ///
    /// Fails with `EINVAL` if they are not valid, or longer than `dst` when decompressed. The content
    /// of `dst` beyond the output is unspecified, and so is all of it after a failure.
    pub fn decompress(&mut self, src: &[u8], dst: &mut Destination<'_>) -> Result<usize> {
        // SAFETY: The context is initialised and used exclusively. Both memories are valid for
        // their lengths. The function reads and writes nothing outside, whatever the input is.
        let ret = unsafe {
            bindings::zstd_decompress_dctx(
                self.dctx.as_ptr(),
                dst.as_mut_ptr().cast(),
                dst.len(),
                src.as_ptr().cast(),
                src.len(),
            )
        };
        // SAFETY: The function takes any number.
        if unsafe { bindings::zstd_is_error(ret) } != 0 {
            return Err(EINVAL);
        }
        Ok(ret)
    }
}
