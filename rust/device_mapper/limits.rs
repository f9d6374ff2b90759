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

    /// Sets the smallest unit that can be addressed, a power of two of at least 512.
    pub fn set_logical_block_size(&mut self, bytes: u32) {
        self.0.logical_block_size = bytes;
    }

    /// Sets the smallest unit that can be written without read-modify-write.
    pub fn set_physical_block_size(&mut self, bytes: u32) {
        self.0.physical_block_size = bytes;
    }

    /// Sets the preferred minimum size of a request.
    pub fn set_io_min(&mut self, bytes: u32) {
        self.0.io_min = bytes;
    }

    /// Sets the optimal size of a request.
    pub fn set_io_opt(&mut self, bytes: u32) {
        self.0.io_opt = bytes;
    }
}
