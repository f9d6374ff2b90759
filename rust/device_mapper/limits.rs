// SPDX-License-Identifier: GPL-2.0

//! Limits of the mapped device's request queue.

use super::bindings;

/// The queue limits device mapper has stacked from the devices below, for
/// [`Target::io_hints`](super::Target::io_hints) to adjust.
///
/// All sizes are in bytes.
#[repr(transparent)]
pub struct QueueLimits(bindings::queue_limits);

impl QueueLimits {
    /// Creates a reference from what the `io_hints` callback gets.
    ///
    /// # Safety
    ///
    /// `limits` must be valid and not be accessed by others for `'a`.
    pub(super) unsafe fn from_raw<'a>(limits: *mut bindings::queue_limits) -> &'a mut Self {
        // SAFETY: `QueueLimits` is a transparent wrapper; the rest is required from the caller.
        unsafe { &mut *limits.cast() }
    }

    /// Returns the smallest unit that can be addressed.
    pub fn logical_block_size(&self) -> u32 {
        self.0.logical_block_size
    }

    /// Sets the smallest unit that can be addressed, a power of two of at least 512.
    pub fn set_logical_block_size(&mut self, bytes: u32) {
        self.0.logical_block_size = bytes;
    }

    /// Returns the smallest unit that can be written without read-modify-write.
    pub fn physical_block_size(&self) -> u32 {
        self.0.physical_block_size
    }

    /// Sets the smallest unit that can be written without read-modify-write.
    pub fn set_physical_block_size(&mut self, bytes: u32) {
        self.0.physical_block_size = bytes;
    }

    /// Returns the preferred minimum size of a request.
    pub fn io_min(&self) -> u32 {
        self.0.io_min
    }

    /// Sets the preferred minimum size of a request.
    pub fn set_io_min(&mut self, bytes: u32) {
        self.0.io_min = bytes;
    }

    /// Returns the optimal size of a request, zero if there is none.
    pub fn io_opt(&self) -> u32 {
        self.0.io_opt
    }

    /// Sets the optimal size of a request.
    pub fn set_io_opt(&mut self, bytes: u32) {
        self.0.io_opt = bytes;
    }

    /// Returns the mask of the alignment that memory of a request needs.
    pub fn dma_alignment(&self) -> u32 {
        self.0.dma_alignment
    }

    /// Sets the mask of the alignment that memory of a request needs.
    ///
    /// A target that remaps at sector granularity needs the memory of each sector to be
    /// contiguous, that is a mask of 511.
    pub fn set_dma_alignment(&mut self, mask: u32) {
        self.0.dma_alignment = mask;
    }

    /// Raises the block sizes and the minimum request size to at least `bytes`.
    ///
    /// This is `dm_stack_bs_limits()`.
    pub fn stack_block_size(&mut self, bytes: u32) {
        self.0.logical_block_size = self.0.logical_block_size.max(bytes);
        self.0.physical_block_size = self.0.physical_block_size.max(bytes);
        self.0.io_min = self.0.io_min.max(bytes);
    }
}
