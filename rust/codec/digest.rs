// SPDX-License-Identifier: GPL-2.0

//! A digest for measurements, which may not be long.

use super::bindings;
use core::fmt;

/// Bytes of a digest.
const BYTES: usize = bindings::blake2s_lengths_BLAKE2S_HASH_SIZE as usize;

/// The BLAKE2s-256 digest of text that is written to it.
///
/// The integrity subsystem gets at most 2048 bytes of `StatusType::Ima`
/// from a target; what does not fit is cut off, and what was cut off is not measured. A target with
/// many devices can measure a digest of what it would say of them.
///
/// BLAKE2s is the cryptographic hash that every kernel has built in.
///
/// # Examples
///
/// ```
/// use core::fmt::Write;
/// use kernel::codec::Digest;
///
/// let parts = [("8:16", 2048), ("8:32", 0)];
/// let mut digest = Digest::start();
/// for (device, start) in parts {
///     writeln!(digest, "{device} {start}")?;
/// }
/// let mut same = Digest::start();
/// same.write_str("8:16 2048\n8:32 0\n")?;
/// assert_eq!(digest.finish(), same.finish());
/// # Ok::<(), core::fmt::Error>(())
/// ```
pub struct Digest(bindings::blake2s_ctx);

impl Digest {
    /// Starts the digest of an empty text.
    pub fn start() -> Self {
        let mut ctx = bindings::blake2s_ctx::default();
        // SAFETY: `ctx` may be written, and the length is one that BLAKE2s has.
        unsafe { bindings::blake2s_init(&mut ctx, BYTES) };
        Self(ctx)
    }

    /// Returns the digest of all that was written.
    pub fn finish(mut self) -> DigestValue {
        let mut value = [0; BYTES];
        // SAFETY: The context was initialised for as many bytes as there are in `value`.
        unsafe { bindings::blake2s_final(&mut self.0, value.as_mut_ptr()) };
        DigestValue(value)
    }
}

impl fmt::Write for Digest {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: The context was initialised, and the text may be read.
        unsafe { bindings::blake2s_update(&mut self.0, text.as_ptr(), text.len()) };
        Ok(())
    }
}

/// What [`Digest::finish`] returns, printed as hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DigestValue([u8; BYTES]);

impl fmt::Display for DigestValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
