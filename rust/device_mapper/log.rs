// SPDX-License-Identifier: GPL-2.0

//! Log messages in the form of the device mapper's `DMERR()` family.

use super::{bindings, target::Target};
use kernel::{
    fmt,
    print::{call_printk, format_strings},
};

/// Severity of a message.
#[doc(hidden)]
#[derive(Clone, Copy)]
pub enum Level {
    /// `KERN_ERR`
    Err,
    /// `KERN_WARNING`
    Warn,
}

/// Prints `device-mapper: <target>: <args>`. Used by the macros.
#[doc(hidden)]
pub fn print<T: Target>(level: Level, args: fmt::Arguments<'_>) {
    let format = match level {
        Level::Err => &format_strings::ERR,
        Level::Warn => &format_strings::WARNING,
    };
    // SAFETY: The format string is one of the kernel crate's own, which take a NUL-terminated
    // prefix and the arguments.
    unsafe {
        call_printk(
            format,
            b"device-mapper\0",
            kernel::prelude::fmt!("{}: {}\n", T::NAME, args),
        )
    };
}

/// Returns whether another message may be printed now. Used by the macros.
///
/// All rate-limited messages of a module share one limit.
#[doc(hidden)]
pub fn may_print() -> bool {
    // SAFETY: The function has no requirements.
    unsafe { bindings::dm_printk_ratelimit() != 0 }
}

/// Prints an error of the given target type, like `DMERR()`: `dm_err!(Linear, "offset {}", n)`.
macro_rules! dm_err {
    ($target:ty, $($arg:tt)*) => {
        $crate::device_mapper::log::print::<$target>(
            $crate::device_mapper::log::Level::Err,
            ::kernel::prelude::fmt!($($arg)*),
        )
    };
}

/// Prints a warning of the given target type, like `DMWARN()`.
macro_rules! dm_warn {
    ($target:ty, $($arg:tt)*) => {
        $crate::device_mapper::log::print::<$target>(
            $crate::device_mapper::log::Level::Warn,
            ::kernel::prelude::fmt!($($arg)*),
        )
    };
}

/// Prints an error unless too many were printed lately, like `DMERR_LIMIT()`.
///
/// For the I/O path, where an error can repeat without end.
macro_rules! dm_err_limit {
    ($target:ty, $($arg:tt)*) => {
        if $crate::device_mapper::log::may_print() {
            $crate::device_mapper::dm_err!($target, $($arg)*)
        }
    };
}

pub(crate) use {dm_err, dm_err_limit, dm_warn};
