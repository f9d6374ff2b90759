// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The decoder for x86-64, in general registers.
//!
//! What nearly all sequences are like, [`decode_usual_sequences`] does, and leaves the others to
//! [`decode_sequence`]. It spends no instruction on what is known without it:
//!
//! - It copies 16 bytes for up to 14 literals, and 16 for a match of up to 16 bytes. What is too
//!   much, the next sequence overwrites. For that there must be room, see below.
//! - It does not check the input. Unless a length goes on in two bytes or more, a sequence has no
//!   more input than output. So, while the output keeps a distance from a limit, the input keeps
//!   one from its end, and one comparison after each sequence is enough.
//! - A match needs care if its offset is less than 8, as whole words are copied that must not
//!   overlap, or if it would begin before the output. It begins at `(op - 8) - (offset - 8)`, where
//!   `op` is the length of the output, and in both cases this borrows.
//! - Whether a match is longer than 16 the token tells. One branch for that and the borrow would be
//!   possible with a table, but then a processor that has guessed the length wrong knows it only
//!   when the offset is there: fewer instructions, and slower.
//! - The loop keeps `op - 8` instead of `op`, which saves that subtraction.
//! - The next token is loaded as soon as the number of literals is known. From one token to the
//!   next the processor has to wait for a shift and a load, and for nothing else.
//!
//! # Limits
//!
//! Before each sequence the loop knows that `op <= limit`, where `limit` is at most
//! [`OUTPUT_MARGIN`] less than the length that the output shall have. What is written for one:
//!
//! | what | from | bytes | ends at or before |
//! | --- | --- | ---: | --- |
//! | up to 14 literals | `op` | 16 | `limit + 16` |
//! | match of up to 16 after them | `op + 14` | 16 | **`limit + 30`** |
//! | 15 or more literals, which end at the limit | `limit - 15` | 32 | `limit + 17` |
//! | the rest of them, 16 at a time | | | `limit + 15` |
//! | match of up to 16 after them | `limit` | 16 | `limit + 16` |
//! | longer match, of 17 or more, which ends at the limit | `limit - 17` | 32 | `limit + 15` |
//! | the rest of it, 16 at a time, or any from less than 8 before, 8 at a time | | | `limit + 15` |
//!
//! When `limit` was computed, `ip` bytes of the input had been used, and `limit - op` is at most
//! `readable - INPUT_MARGIN - ip`. Since then at least as many bytes were added to the output as were
//! used of the input. So before each sequence `ip <= last`, where `last` is `readable - INPUT_MARGIN`,
//! and if it has 15 or more literals that end at the limit, then even `ip + literals <= last`. What
//! is read:
//!
//! | what | from | bytes | ends at or before |
//! | --- | --- | ---: | --- |
//! | up to 14 literals | `ip + 1` | 16 | `last + 17` |
//! | offset and next token after them | `ip + 15` | 3 | `last + 18` |
//! | the token after a length that goes on | `ip + 18` | 1 | **`last + 19`** |
//! | 15 or more literals | `ip + 2` | 32 | **`last - 15 + 34`** |
//! | the rest of them, 16 at a time | | | `last + 17` |
//! | offset, length and token after them | `ip + literals + 2` | 4 | `last + 6` |
//!
//! So [`OUTPUT_MARGIN`] is 30 and [`INPUT_MARGIN`] is 19; both tables have rows that take all of it.
//! Nothing need be readable behind a block; if [`INPUT_SLACK`] bytes are, the loop gets to its end.

use super::{
    decode_sequence,
    memory::{
        Input,
        SharedOutput,
        PERIODS,
        WORD, //
    },
    Malformed,
    Output,
    Position,
    MIN_MATCH, //
};
use core::{
    arch::asm,
    ptr::with_exposed_provenance, //
};

/// Readable bytes behind a block with which it is decoded fastest.
pub const INPUT_SLACK: usize = INPUT_MARGIN;

/// Bytes that are read behind the last place where a sequence may begin.
const INPUT_MARGIN: usize = 19;

/// Bytes that are written behind the last place to which a sequence may be decoded.
const OUTPUT_MARGIN: usize = 30;

/// The least token with 15 literals or more.
const MANY_LITERALS: usize = 0xf0;

/// The half of a token for the longest match that is copied as two words.
const SHORT_MATCH: usize = 2 * WORD - MIN_MATCH;

/// The half of a token for a match whose length goes on.
const LONG_MATCH: usize = 15;

/// Bytes of a token and an offset.
const HEADER: usize = 3;

/// Decompresses the first `len` bytes of `input`, and fails unless that takes all of them and
/// fills `output` exactly.
///
/// The other bytes of `input` do not matter, but [`INPUT_SLACK`] of them make it faster. What
/// is in `output` after a failure is unspecified.
///
/// # Errors
///
/// [`Malformed`].
pub fn decompress(input: &[u8], len: usize, output: &mut [u8]) -> Result<(), Malformed> {
    // SAFETY: The slice is valid for its length.
    unsafe { decompress_raw(input, len, output.as_mut_ptr(), output.len()) }
}

/// As [`decompress`], into memory that others may write to meanwhile.
///
/// # Errors
///
/// [`Malformed`].
///
/// # Safety
///
/// `output` is valid for reads and writes of `output_len` bytes, and not part of `input`.
pub unsafe fn decompress_raw(
    input: &[u8],
    len: usize,
    output: *mut u8,
    output_len: usize,
) -> Result<(), Malformed> {
    let block = input.get(..len).ok_or(Malformed)?;
    // SAFETY: As required from the caller.
    let mut output = unsafe { SharedOutput::new(output, output_len) };
    let mut position = Position::START;
    loop {
        position = decode_usual_sequences(Input(input), &mut output, position);
        if decode_sequence(block, &mut output, &mut position)? {
            return Ok(());
        }
    }
}

/// Keeps the compiler from rearranging what it knows about a number.
#[inline(always)]
fn opaque(mut n: usize) -> usize {
    // SAFETY: There are no instructions.
    unsafe { asm!("/* {0} */", inout(reg) n, options(pure, nomem, nostack, preserves_flags)) };
    n
}

/// The same for an address.
#[inline(always)]
fn opaque_address(at: *const u8) -> *const u8 {
    with_exposed_provenance(opaque(at.expose_provenance()))
}

/// A place in the block, as the loop keeps it.
#[derive(Clone, Copy)]
struct Place {
    /// The address in the input.
    ip: *const u8,
    /// The length of the output, less a word. At the beginning this wraps around.
    op: usize,
}

impl Place {
    #[inline(always)]
    fn new(input: Input<'_>, position: Position) -> Self {
        Self {
            ip: input.0.as_ptr().wrapping_add(position.input),
            op: position.output.wrapping_sub(WORD),
        }
    }

    #[inline(always)]
    fn position(self, input: Input<'_>) -> Position {
        Position {
            input: self.ip.addr().wrapping_sub(input.0.as_ptr().addr()),
            output: self.op.wrapping_add(WORD),
        }
    }

    /// Returns how great `op` may become before a sequence, or [`None`] if it is too great now.
    #[inline(always)]
    fn limit(self, input: Input<'_>, output: &SharedOutput<'_>) -> Option<usize> {
        let position = self.position(input);
        let readable = input.0.len().checked_sub(INPUT_MARGIN)?;
        let readable = readable.checked_sub(position.input)?;
        let limit = output.len().checked_sub(OUTPUT_MARGIN)?;
        let limit = limit.min(position.output.checked_add(readable)?);
        if position.output > limit {
            return None;
        }
        limit.checked_sub(WORD)
    }
}

/// Why the loop does not go on to the next sequence.
enum Stop {
    /// The output is beyond the limit.
    Limit,
    /// The token has 15 literals or more. Nothing was done.
    ManyLiterals(usize),
    /// The match needs care. The literals are copied and end at this place; this is its half of the
    /// token.
    Match(Place, usize),
}

/// Decodes a sequence with up to 14 literals and a match of up to 16 from 8 or more before, and
/// returns the next token.
///
/// `token` is at `LAG` bytes after `head.ip`. Then `head.ip` lags [`HEADER`] bytes more: they
/// need not be added each time. In case of another sequence, `head` stays where it is.
///
/// # Safety
///
/// All sequences from the place for which `limit` was computed up to `head` were decoded, and
/// `head.op <= limit`. There is a word of output, or of literals in the first sequence.
#[inline(always)]
unsafe fn usual_sequence<const LAG: usize>(
    input: Input<'_>,
    output: &mut SharedOutput<'_>,
    head: &mut Place,
    token: usize,
    limit: usize,
) -> Result<usize, Stop> {
    if token >= MANY_LITERALS {
        head.ip = head.ip.wrapping_add(LAG);
        return Err(Stop::ManyLiterals(token));
    }
    let literals = token >> 4;
    let length = token & 15;
    // SAFETY: See the tables on up to 14 literals, and on offset and token after them.
    let (next, end, offset) = unsafe {
        let next = head.ip.wrapping_add(literals).wrapping_add(LAG + HEADER);
        let next = opaque(input.byte(next));
        output.put_two_words::<1, 2>(head.op, input, head.ip.wrapping_add(LAG + 1));
        let end = Place {
            ip: opaque_address(head.ip.wrapping_add(literals)),
            op: opaque(head.op.wrapping_add(literals)),
        };
        (next, end, input.offset(end.ip.wrapping_add(LAG + 1)))
    };
    let (from, borrow) = end.op.overflowing_sub(opaque(offset.wrapping_sub(WORD)));
    if length > SHORT_MATCH || borrow {
        head.ip = head.ip.wrapping_add(LAG);
        let end = Place {
            ip: end.ip.wrapping_add(LAG + 1),
            ..end
        };
        return Err(Stop::Match(end, length));
    }
    // SAFETY: See the tables on a match of up to 16. It begins in the output.
    unsafe { output.copy_two_words(from, end.op) };
    head.ip = end.ip;
    head.op = end.op.wrapping_add(length).wrapping_add(MIN_MATCH);
    if head.op > limit {
        head.ip = head.ip.wrapping_add(LAG + HEADER);
        return Err(Stop::Limit);
    }
    Ok(next)
}

/// Copies the literals of a sequence that has 15 or more, and returns where they end.
///
/// Returns [`None`] if they end beyond the limit or their number goes on in a second byte.
///
/// # Safety
///
/// As [`usual_sequence`].
#[inline(always)]
unsafe fn many_literals(
    input: Input<'_>,
    output: &mut SharedOutput<'_>,
    head: Place,
    limit: usize,
) -> Option<Place> {
    // SAFETY: See the tables: this is where other sequences have literals.
    let more = unsafe { input.byte(head.ip.wrapping_add(1)) };
    let literals = more.wrapping_add(15);
    let from = head.ip.wrapping_add(2);
    let end = Place {
        ip: from.wrapping_add(literals),
        op: head.op.wrapping_add(literals),
    };
    if more == 255 || end.op > limit {
        return None;
    }
    // SAFETY: See the tables on 15 or more literals.
    unsafe {
        output.put_two_words::<1, 2>(head.op, input, from);
        output.put_two_words::<3, 4>(head.op, input, from.wrapping_add(2 * WORD));
        let mut done = 4 * WORD;
        while done < literals {
            let to = head.op.wrapping_add(done);
            output.put_two_words::<1, 2>(to, input, from.wrapping_add(done));
            done = opaque(done.wrapping_add(2 * WORD));
        }
    }
    Some(end)
}

/// Copies a match of up to 16 from 8 or more before, after the literals that [`many_literals`]
/// has copied, and returns where it ends.
///
/// Returns [`None`] if it is another.
///
/// # Safety
///
/// As [`usual_sequence`] before those literals.
#[inline(always)]
unsafe fn usual_match(
    input: Input<'_>,
    output: &mut SharedOutput<'_>,
    end: Place,
    length: usize,
) -> Option<(Place, usize)> {
    // SAFETY: See the tables on the offset after 15 or more literals.
    let offset = unsafe { input.offset(end.ip) };
    let (from, borrow) = end.op.overflowing_sub(offset.wrapping_sub(WORD));
    if length > SHORT_MATCH || borrow {
        return None;
    }
    // SAFETY: See the tables on a match of up to 16. It begins in the output.
    unsafe { output.copy_two_words(from, end.op) };
    let next = Place {
        ip: end.ip.wrapping_add(2),
        op: end.op.wrapping_add(length).wrapping_add(MIN_MATCH),
    };
    // SAFETY: See the tables on the token after 15 or more literals and an offset.
    Some((next, unsafe { input.byte(next.ip) }))
}

/// Copies a match after literals, and returns where it ends.
///
/// Returns [`None`] if it begins nowhere, ends beyond the limit, or its length goes on in a second
/// byte.
///
/// # Safety
///
/// As [`usual_sequence`] before those literals.
#[inline(always)]
unsafe fn any_match(
    input: Input<'_>,
    output: &mut SharedOutput<'_>,
    end: Place,
    length: usize,
    limit: usize,
) -> Option<(Place, usize)> {
    // If the compiler knew that this was loaded before, it would keep a copy in the usual case too.
    //
    // SAFETY: See the tables on the offset after literals.
    let offset = unsafe { input.offset(opaque_address(end.ip)) };
    let mut next = Place {
        ip: end.ip.wrapping_add(2),
        op: end.op.wrapping_add(length).wrapping_add(MIN_MATCH),
    };
    if length == LONG_MATCH {
        // SAFETY: See the tables: this is where other sequences have the next token.
        let more = unsafe { input.byte(next.ip) };
        if more == 255 {
            return None;
        }
        next.ip = next.ip.wrapping_add(1);
        next.op = next.op.wrapping_add(more);
    }
    // SAFETY: See the tables on the next token, also after a length that goes on.
    let token = unsafe { input.byte(next.ip) };
    let at = end.op.wrapping_add(WORD);
    if offset == 0 || offset > at || next.op > limit {
        return None;
    }
    let mut to = end.op;
    // SAFETY: See the tables on longer and other matches. It begins in the output.
    unsafe {
        if offset >= WORD {
            let from = at.wrapping_sub(offset);
            output.copy_two_words(from, to);
            output.copy_two_words(from.wrapping_add(2 * WORD), to.wrapping_add(2 * WORD));
            to = to.wrapping_add(4 * WORD);
            while to < next.op {
                let from = to.wrapping_add(WORD).wrapping_sub(offset);
                output.copy_two_words(from, to);
                to = opaque(to.wrapping_add(2 * WORD));
            }
        } else {
            let pattern = output.pattern(at, offset);
            while to < next.op {
                output.set_word::<1>(to, pattern);
                to = opaque(to.wrapping_add(PERIODS[offset & 7]));
            }
        }
    }
    Some((next, token))
}

/// Decodes sequences from `start` on as long as they are usual, or nearly so, and there is room.
/// Returns where the first other one begins.
#[inline(always)]
fn decode_usual_sequences(
    input: Input<'_>,
    output: &mut SharedOutput<'_>,
    start: Position,
) -> Position {
    // A match is only looked for where there is a word of output.
    match input.0.get(start.input) {
        Some(token) if start.output.saturating_add(usize::from(token >> 4)) >= WORD => {}
        _ => return start,
    }
    let mut head = Place::new(input, start);
    while let Some(limit) = head.limit(input, output) {
        // SAFETY: See the tables: a sequence begins here.
        let mut token = unsafe { input.byte(head.ip) };
        loop {
            let stop = 'stop: {
                // Two in turn, so that a token stays in its register when the next is loaded.
                loop {
                    // SAFETY: The limit is that of a place from which only this loop has gone on,
                    // and nothing comes here that is beyond it. There is a word, as above.
                    let next = match unsafe {
                        usual_sequence::<0>(input, output, &mut head, token, limit)
                    } {
                        Ok(next) => next,
                        Err(stop) => break 'stop stop,
                    };
                    // SAFETY: As above.
                    token = match unsafe {
                        usual_sequence::<HEADER>(input, output, &mut head, next, limit)
                    } {
                        Ok(token) => token,
                        Err(stop) => break 'stop stop,
                    };
                    head.ip = head.ip.wrapping_add(2 * HEADER);
                }
            };
            // SAFETY: As above.
            let next = unsafe {
                match stop {
                    Stop::Limit => break,
                    Stop::Match(end, length) => any_match(input, output, end, length, limit),
                    Stop::ManyLiterals(token) => match many_literals(input, output, head, limit) {
                        None => None,
                        Some(end) => match usual_match(input, output, end, token & 15) {
                            None => any_match(input, output, end, token & 15, limit),
                            next => next,
                        },
                    },
                }
            };
            match next {
                None => return head.position(input),
                Some(next) => (head, token) = next,
            }
            if head.op > limit {
                break;
            }
        }
    }
    head.position(input)
}
