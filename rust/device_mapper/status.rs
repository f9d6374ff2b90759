// SPDX-License-Identifier: GPL-2.0

//! Text that a target gives to user space: status lines and replies to messages.

use core::{fmt, marker::PhantomData, ptr};
use kernel::prelude::*;

/// Which status is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusType {
    /// `dmsetup status`: what the target wants to say about its present state, positional.
    Info,
    /// `dmsetup table`: the arguments that would construct the same target again, verbatim.
    Table,
    /// A measurement for the integrity subsystem: `key=value` pairs separated by commas.
    ///
    /// `target_name=<name>,target_version=<version>` is written already when the target is
    /// called; it adds `,key=value` for each of its own and ends with a semicolon. At most 2048
    /// bytes are measured; a target measures a digest of what would be longer.
    Ima,
}

/// A buffer for text, with the semantics of `DMEMIT()`.
///
/// Text that does not fit is cut off. That is not an error: device mapper sees the full buffer
/// and asks again with a larger one. So the result of writing can be ignored, it is always
/// [`Ok`].
///
/// # Invariants
///
/// `buf` is valid for writes of `size` bytes for `'a`. If `size` is not zero then
/// `used < size` and the byte at `used` is NUL.
pub struct StatusWriter<'a> {
    buf: *mut u8,
    size: usize,
    used: usize,
    _lifetime: PhantomData<&'a mut [u8]>,
}

impl StatusWriter<'_> {
    /// Creates a writer for the given buffer, and empties it.
    ///
    /// # Safety
    ///
    /// `buf` must be valid for writes of `size` bytes for the lifetime of the result and not be
    /// accessed by others during it.
    pub(super) unsafe fn from_raw(buf: *mut c_char, size: c_uint) -> Self {
        if size != 0 {
            // SAFETY: There is at least one byte by the check.
            unsafe { buf.write(0) };
        }
        // INVARIANT: The NUL was just written, and the rest is required from the caller.
        Self {
            buf: buf.cast(),
            size: size as usize,
            used: 0,
            _lifetime: PhantomData,
        }
    }

    /// Returns whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }
}

impl fmt::Write for StatusWriter<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.size.saturating_sub(self.used).saturating_sub(1);
        let len = room.min(text.len());
        if len != 0 {
            // SAFETY: `used + len + 1 <= size` by the computation of `room`, and the buffer is
            // valid for that by the type invariant. A `&str` cannot overlap memory that only this
            // writer may access.
            unsafe {
                ptr::copy_nonoverlapping(text.as_ptr(), self.buf.add(self.used), len);
                self.buf.add(self.used + len).write(0);
            }
            // INVARIANT: `used + len < size`, and the NUL was written there.
            self.used += len;
        }
        Ok(())
    }
}
