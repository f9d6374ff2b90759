// SPDX-License-Identifier: GPL-2.0

//! What a user is told while something runs. The command shows it; libraries and tests need not.

use crate::error::Error;

/// Takes the progress of one operation, and what went wrong beside it.
pub trait Report: Sync {
    /// The operation has `bytes` to do, as far as it is known. Called again when it is known better.
    fn expect(&self, bytes: u64);

    /// `bytes` more are done.
    fn add(&self, bytes: u64);

    /// Something is not as it should be, but the operation goes on.
    fn warn(&self, error: &Error);
}

/// Tells nobody.
impl Report for () {
    fn expect(&self, _bytes: u64) {}
    fn add(&self, _bytes: u64) {}
    fn warn(&self, _error: &Error) {}
}
