// SPDX-License-Identifier: GPL-2.0

//! Errors of target constructors.
//!
//! Device mapper reports a table that cannot be loaded by one line in the kernel log,
//! made of an error number and a string the target leaves in `ti->error`. [`CtrError`]
//! is that pair.

use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// Why a target could not be constructed.
///
/// The message becomes `ti->error`: device mapper prints it as
/// `device-mapper: table: <device>: <target>: <message> (<errno>)`. It is static because device
/// mapper reads it after the constructor has returned. Details that vary go to the log with
/// [`dm_err!`](super::dm_err) before the error is returned.
#[derive(Clone, Copy, Debug)]
pub struct CtrError {
    message: &'static CStr,
    errno: Error,
}

impl CtrError {
    /// Creates an error with `message` for the log and `errno` for the caller of the ioctl.
    pub const fn new(errno: Error, message: &'static CStr) -> Self {
        Self { message, errno }
    }

    /// Creates an error for something wrong in the table line: `EINVAL` with `message`.
    pub const fn invalid(message: &'static CStr) -> Self {
        Self::new(EINVAL, message)
    }

    /// Returns the message.
    pub const fn message(&self) -> &'static CStr {
        self.message
    }

    /// Returns the error number.
    pub const fn errno(&self) -> Error {
        self.errno
    }
}

impl From<AllocError> for CtrError {
    fn from(_: AllocError) -> Self {
        Self::new(ENOMEM, c"Cannot allocate target context")
    }
}

impl From<CtrError> for Error {
    fn from(err: CtrError) -> Self {
        err.errno
    }
}

/// Adds the message that turns any error into a [`CtrError`].
pub trait CtrContext<T> {
    /// Converts the error, with `message` as the text for `ti->error`.
    fn context(self, message: &'static CStr) -> Result<T, CtrError>;
}

impl<T, E: Into<Error>> CtrContext<T> for Result<T, E> {
    fn context(self, message: &'static CStr) -> Result<T, CtrError> {
        self.map_err(|err| CtrError::new(err.into(), message))
    }
}
