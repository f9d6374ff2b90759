// SPDX-License-Identifier: GPL-2.0 OR MIT

//! A decoder of LZ4 blocks whose decoded length is known.
//!
//! # The format
//!
//! A block is a row of sequences. Each appends to the output, first some bytes that it carries
//! itself, the literals, then a match, which repeats output that is already there:
//!
//! ```text
//!    token    more literals?    literals     offset    longer match?
//!   +------+ +-------------+ +------------+ +------+ +-------------+
//!   | l  m | | 255 ... n   | | l bytes    | | u16  | | 255 ... n   |
//!   +------+ +-------------+ +------------+ +------+ +-------------+
//! ```
//!
//! The upper half of the token is the number of literals, the lower half the length of the match
//! less 4. A half of 15 goes on in bytes that are added to it, up to the first that is not 255. The
//! offset, little-endian, is how far before the end of the output the match begins. It may be less
//! than the length, then the match repeats what it writes itself: offset 1 is a run of one byte.
//!
//! The last sequence ends after its literals. No match ends in the last [`LAST_LITERALS`] bytes of
//! the output, and none begins in the last [`MATCH_LIMIT`].
//!
//! # Two decoders
//!
//! `decode_sequence` decodes one sequence and checks everything: this is the format in safe Rust.
//! Called until the block ends, it is a complete decoder, [`decompress_portable`].
//!
//! On x86-64, [`decompress`] has a loop for what nearly all sequences are like, and leaves the others
//! to `decode_sequence`; see `lz4/x86_64.rs`.
//!
//! # Tests
//!
//! `tools/codec` compares both decoders with liblz4 and lz4_flex. With debug assertions, every access
//! of the loop is checked against the exact bounds.

/// Bytes at the end of the output in which no match ends.
pub const LAST_LITERALS: usize = 5;

/// Bytes at the end of the output in which no match begins.
pub const MATCH_LIMIT: usize = 12;

/// Bytes of the shortest match.
const MIN_MATCH: usize = 4;

/// The block is not valid, or is not as long as it should be when decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// How far a block is decoded: up to the beginning of a sequence.
#[derive(Clone, Copy)]
struct Position {
    /// Bytes of the input that were used.
    input: usize,
    /// Bytes of the output that are there.
    output: usize,
}

impl Position {
    const START: Self = Self {
        input: 0,
        output: 0,
    };
}

/// Memory that is filled from its beginning.
trait Output {
    /// Bytes it has.
    fn len(&self) -> usize;

    /// Copies the first `count` bytes of `from` to byte `at`. Fails if they are not there or do not
    /// fit.
    ///
    /// Bytes beyond may change as well.
    fn put(&mut self, at: usize, from: &[u8], count: usize) -> Result<(), Malformed>;

    /// Copies `count` bytes that begin `offset` before `at` to byte `at`, one after the other. Fails
    /// if they do not begin before it or do not fit.
    ///
    /// Bytes beyond may change as well.
    fn repeat(&mut self, at: usize, offset: usize, count: usize) -> Result<(), Malformed>;
}

impl Output for [u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn put(&mut self, at: usize, from: &[u8], count: usize) -> Result<(), Malformed> {
        let from = from.get(..count).ok_or(Malformed)?;
        self.get_mut(at..)
            .and_then(|rest| rest.get_mut(..count))
            .ok_or(Malformed)?
            .copy_from_slice(from);
        Ok(())
    }

    fn repeat(&mut self, at: usize, offset: usize, count: usize) -> Result<(), Malformed> {
        let from = at.checked_sub(offset).ok_or(Malformed)?;
        let end = at.checked_add(count).ok_or(Malformed)?;
        if offset == 0 || end > <[u8]>::len(self) {
            return Err(Malformed);
        }
        // What was copied can be copied too, so each time there is more.
        let mut at = at;
        while at < end {
            let count = (at - from).min(end - at);
            self.copy_within(from..from + count, at);
            at += count;
        }
        Ok(())
    }
}

/// Decompresses `block`, and fails unless that takes all of it and fills `output` exactly.
///
/// What is in `output` after a failure is unspecified. This is the decoder in safe Rust, the same
/// for all architectures.
///
/// # Errors
///
/// [`Malformed`].
pub fn decompress_portable(block: &[u8], output: &mut [u8]) -> Result<(), Malformed> {
    let mut position = Position::START;
    while !decode_sequence(block, output, &mut position)? {}
    Ok(())
}

/// Decodes the sequence at `position` and goes past it. Returns whether it was the last.
#[inline(always)]
fn decode_sequence<O: Output + ?Sized>(
    block: &[u8],
    output: &mut O,
    position: &mut Position,
) -> Result<bool, Malformed> {
    let Position {
        input: mut ip,
        output: mut op,
    } = *position;
    // Before every sequence but the first a match has ended.
    if op != 0 && output.len().saturating_sub(op) < LAST_LITERALS {
        return Err(Malformed);
    }
    let token = take_byte(block, &mut ip)?;
    let literals = take_length(block, &mut ip, token >> 4)?;
    output.put(op, block.get(ip..).ok_or(Malformed)?, literals)?;
    ip += literals;
    op += literals;
    if ip == block.len() {
        // The block for nothing is a byte of 0.
        return if op == output.len() && (op != 0 || token == 0) {
            Ok(true)
        } else {
            Err(Malformed)
        };
    }
    if output.len().saturating_sub(op) < MATCH_LIMIT {
        return Err(Malformed);
    }
    let offset = take_byte(block, &mut ip)? | (take_byte(block, &mut ip)? << 8);
    let count = take_length(block, &mut ip, token & 15)?;
    let count = count.checked_add(MIN_MATCH).ok_or(Malformed)?;
    output.repeat(op, offset, count)?;
    *position = Position {
        input: ip,
        output: op + count,
    };
    Ok(false)
}

/// Takes a byte of `block`.
#[inline(always)]
fn take_byte(block: &[u8], ip: &mut usize) -> Result<usize, Malformed> {
    let byte = *block.get(*ip).ok_or(Malformed)?;
    *ip += 1;
    Ok(byte.into())
}

/// Takes the rest of a length of which `half` is in the token.
#[inline(always)]
fn take_length(block: &[u8], ip: &mut usize, half: usize) -> Result<usize, Malformed> {
    let mut length = half;
    if half == 15 {
        loop {
            let more = take_byte(block, ip)?;
            length = length.checked_add(more).ok_or(Malformed)?;
            if more != 255 {
                break;
            }
        }
    }
    Ok(length)
}

/// Decompresses the first `len` bytes of `input`, and fails unless that takes all of them and fills
/// `output` exactly.
///
/// The other bytes of `input` do not matter. What is in `output` after a failure is unspecified.
///
/// # Errors
///
/// [`Malformed`].
#[cfg(not(all(target_arch = "x86_64", target_pointer_width = "64")))]
pub fn decompress(input: &[u8], len: usize, output: &mut [u8]) -> Result<(), Malformed> {
    decompress_portable(input.get(..len).ok_or(Malformed)?, output)
}

/// Readable bytes behind a block with which it is decoded fastest.
#[cfg(not(all(target_arch = "x86_64", target_pointer_width = "64")))]
pub const INPUT_SLACK: usize = 0;

#[cfg(all(target_arch = "x86_64", target_pointer_width = "64"))]
#[path = "lz4/memory.rs"]
mod memory;
#[cfg(all(target_arch = "x86_64", target_pointer_width = "64"))]
#[path = "lz4/x86_64.rs"]
mod x86_64;

#[cfg(all(target_arch = "x86_64", target_pointer_width = "64"))]
pub use self::x86_64::{
    decompress,
    decompress_raw,
    INPUT_SLACK, //
};
