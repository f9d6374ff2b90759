// SPDX-License-Identifier: GPL-2.0

//! Arguments of a table line or of a message.
//!
//! Device mapper splits the text at white space; [`Args`] walks over the words. Numbers are
//! parsed strictly: decimal digits only, no sign, nothing before or after, and no overflow of
//! the type asked for. `sscanf()`, which C targets use, lets some of these pass.

use super::error::CtrError;
use core::{marker::PhantomData, ptr::NonNull};
use kernel::prelude::*;

/// One argument, as C passes it.
///
/// # Invariants
///
/// `ptr` points to a NUL-terminated string that is valid and unchanged for `'a`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct RawArg<'a> {
    ptr: NonNull<c_char>,
    _lifetime: PhantomData<&'a CStr>,
}

impl<'a> RawArg<'a> {
    fn as_cstr(self) -> &'a CStr {
        // SAFETY: By the type invariant this is a valid string for `'a`.
        unsafe { CStr::from_char_ptr(self.ptr.as_ptr()) }
    }
}

impl<'a> From<&'a CStr> for RawArg<'a> {
    fn from(arg: &'a CStr) -> Self {
        // INVARIANT: A `&'a CStr` points to a NUL-terminated string valid for `'a`.
        Self {
            ptr: NonNull::from(arg).cast(),
            _lifetime: PhantomData,
        }
    }
}

/// Parses a whole word as an unsigned decimal number.
pub fn parse_number<N: TryFrom<u64>>(word: &[u8]) -> Option<N> {
    if word.is_empty() {
        return None;
    }
    let value = word.iter().try_fold(0u64, |value, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(digit.into())
    })?;
    N::try_from(value).ok()
}

/// The arguments that have not been consumed yet.
///
/// Every method that takes an argument also takes the message to fail with, since it is the
/// only thing the user of a bad table line gets to see.
///
/// # Examples
///
/// The table `linear <dev> <start> [<#opts> [split <sectors>]]`:
///
/// ```
/// use kernel::device_mapper::{Args, CtrError, RawArg};
///
/// fn parse(mut args: Args<'_>) -> Result<(u64, Option<u32>), CtrError> {
///     let _path = args.next(c"Missing device")?;
///     let start = args.number(c"Invalid device sector")?;
///     let mut split = None;
///     let mut opts = args.group(2, c"Invalid number of optional arguments")?;
///     while let Some(opt) = opts.next_opt() {
///         match opt.to_bytes() {
///             b"split" => split = Some(opts.number(c"Invalid split size")?),
///             _ => return Err(CtrError::invalid(c"Unrecognised optional argument")),
///         }
///     }
///     args.finish()?;
///     Ok((start, split))
/// }
///
/// let words: [RawArg<'_>; 5] = [c"8:16", c"2048", c"2", c"split", c"8"].map(Into::into);
/// assert_eq!(parse(Args::new(&words)).ok(), Some((2048, Some(8))));
/// assert_eq!(parse(Args::new(&words[..2])).ok(), Some((2048, None)));
/// let message = parse(Args::new(&words[..4])).map_err(|error| error.message());
/// assert_eq!(message, Err(c"Not enough arguments in group"));
/// ```
#[derive(Clone)]
pub struct Args<'a> {
    words: &'a [RawArg<'a>],
}

impl<'a> Args<'a> {
    /// Creates the arguments from words, first argument first.
    pub fn new(words: &'a [RawArg<'a>]) -> Self {
        Self { words }
    }

    /// Creates the arguments from what a C callback gets.
    ///
    /// # Safety
    ///
    /// `argv` must point to `argc` pointers to NUL-terminated strings, all valid and unchanged
    /// for `'a`; it may be anything if `argc` is zero.
    pub(super) unsafe fn from_raw(argc: c_uint, argv: *mut *mut c_char) -> Self {
        let Some(argv) = NonNull::new(argv).filter(|_| argc > 0) else {
            return Self { words: &[] };
        };
        // SAFETY: By the requirements of this function there are `argc` elements, none null, and
        // `RawArg` is a transparent wrapper for such a pointer with just the same guarantees.
        let words = unsafe {
            core::slice::from_raw_parts(argv.as_ptr().cast::<RawArg<'a>>(), argc as usize)
        };
        Self { words }
    }

    /// Returns the number of arguments left.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// Returns whether all arguments have been consumed.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Consumes an argument if there is one.
    pub fn next_opt(&mut self) -> Option<&'a CStr> {
        let (first, others) = self.words.split_first()?;
        self.words = others;
        Some(first.as_cstr())
    }

    /// Consumes an argument.
    pub fn next(&mut self, message: &'static CStr) -> Result<&'a CStr, CtrError> {
        self.next_opt().ok_or(CtrError::invalid(message))
    }

    /// Consumes an argument which is a number.
    pub fn number<N: TryFrom<u64>>(&mut self, message: &'static CStr) -> Result<N, CtrError> {
        let word = self.next(message)?;
        parse_number(word.to_bytes()).ok_or(CtrError::invalid(message))
    }

    /// Consumes a group: its number of arguments, at most `max`, and those arguments.
    ///
    /// No argument left at all means an empty group, since `<#opts>` itself is left out when
    /// there are none. It is an error if fewer arguments follow than the number says. This is
    /// `dm_read_arg_group()`.
    pub fn group(&mut self, max: usize, message: &'static CStr) -> Result<Args<'a>, CtrError> {
        if self.is_empty() {
            return Ok(Args { words: &[] });
        }
        let count = self.number::<usize>(message)?;
        if count > max {
            return Err(CtrError::invalid(message));
        }
        let (group, others) = self
            .words
            .split_at_checked(count)
            .ok_or(CtrError::invalid(c"Not enough arguments in group"))?;
        self.words = others;
        Ok(Args { words: group })
    }

    /// Checks that no argument is left.
    pub fn finish(&self) -> Result<(), CtrError> {
        if self.is_empty() {
            Ok(())
        } else {
            Err(CtrError::invalid(c"Too many arguments"))
        }
    }
}
