// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The memory that the decoder for x86-64 works with, and every access to it.
//!
//! The output may change at any time, as user space's pages do under direct I/O. So it is only
//! accessed by single instructions in assembly, which is defined whatever others do, and what is read
//! back is only written to the output again: no branch and no address depends on it. The input must
//! be private.

use super::{
    Malformed,
    Output, //
};
use core::{
    arch::asm,
    marker::PhantomData, //
};

/// Bytes of a word.
pub(super) const WORD: usize = 8;

/// Output that others may write to.
///
/// # Invariants
///
/// `start` is valid for reads and writes of `len` bytes for `'a`.
pub(super) struct SharedOutput<'a> {
    start: *mut u8,
    len: usize,
    _lifetime: PhantomData<&'a mut [u8]>,
}

impl SharedOutput<'_> {
    /// Takes memory over as output.
    ///
    /// # Safety
    ///
    /// `start` is valid for reads and writes of `len` bytes for the lifetime of the result.
    pub(super) unsafe fn new(start: *mut u8, len: usize) -> Self {
        // INVARIANT: As required from the caller.
        Self {
            start,
            len,
            _lifetime: PhantomData,
        }
    }

    /// Shows an access to who looks for wrong ones. KASAN does not see those in assembly.
    #[inline(always)]
    fn announce(&self, at: usize, bytes: usize) {
        debug_assert!(at <= self.len && bytes <= self.len - at);
        if cfg!(CONFIG_KASAN) {
            // SAFETY: Both are part of what is accessed next.
            unsafe {
                self.start.wrapping_add(at).read_volatile();
                self.start.wrapping_add(at + bytes - 1).read_volatile();
            }
        }
    }

    /// Loads the word that is `N` words after byte `at`.
    ///
    /// # Safety
    ///
    /// It is in the output.
    #[inline(always)]
    pub(super) unsafe fn word<const N: usize>(&self, at: usize) -> u64 {
        self.announce(at.wrapping_add(N * WORD), WORD);
        let word;
        // SAFETY: The memory is valid for reads.
        unsafe {
            asm!(
                "mov {word}, [{start} + {at} + {n}]",
                start = in(reg) self.start,
                at = in(reg) at,
                n = const N * WORD,
                word = lateout(reg) word,
                options(readonly, nostack, preserves_flags),
            );
        }
        word
    }

    /// Stores a word `N` words after byte `at`.
    ///
    /// # Safety
    ///
    /// It is in the output.
    #[inline(always)]
    pub(super) unsafe fn set_word<const N: usize>(&mut self, at: usize, word: u64) {
        self.announce(at.wrapping_add(N * WORD), WORD);
        // SAFETY: The memory is valid for writes.
        unsafe {
            asm!(
                "mov [{start} + {at} + {n}], {word}",
                start = in(reg) self.start,
                at = in(reg) at,
                n = const N * WORD,
                word = in(reg) word,
                options(nostack, preserves_flags),
            );
        }
    }

    /// Loads a byte.
    ///
    /// # Safety
    ///
    /// It is in the output.
    #[inline(always)]
    unsafe fn byte(&self, at: usize) -> u8 {
        self.announce(at, 1);
        let byte;
        // SAFETY: The memory is valid for reads.
        unsafe {
            asm!(
                "mov {byte}, [{start} + {at}]",
                start = in(reg) self.start,
                at = in(reg) at,
                byte = lateout(reg_byte) byte,
                options(readonly, nostack, preserves_flags),
            );
        }
        byte
    }

    /// Stores a byte.
    ///
    /// # Safety
    ///
    /// It is in the output.
    #[inline(always)]
    unsafe fn set_byte(&mut self, at: usize, byte: u8) {
        self.announce(at, 1);
        // SAFETY: The memory is valid for writes.
        unsafe {
            asm!(
                "mov [{start} + {at}], {byte}",
                start = in(reg) self.start,
                at = in(reg) at,
                byte = in(reg_byte) byte,
                options(nostack, preserves_flags),
            );
        }
    }

    /// Copies two words from byte `from` on to one word after byte `before`, the second after
    /// the first.
    ///
    /// # Safety
    ///
    /// Both places are in the output.
    #[inline(always)]
    pub(super) unsafe fn copy_two_words(&mut self, from: usize, before: usize) {
        // SAFETY: As required from the caller.
        unsafe {
            let word = self.word::<0>(from);
            self.set_word::<1>(before, word);
            let word = self.word::<1>(from);
            self.set_word::<2>(before, word);
        }
    }

    /// Copies two words of the input to the places `N` and `M` words after byte `at`.
    ///
    /// # Safety
    ///
    /// They are in the input, and the places in the output.
    #[inline(always)]
    pub(super) unsafe fn put_two_words<const N: usize, const M: usize>(
        &mut self,
        at: usize,
        input: Input<'_>,
        from: *const u8,
    ) {
        // SAFETY: As required from the caller.
        unsafe {
            self.set_word::<N>(at, input.load(from));
            self.set_word::<M>(at, input.load(from.wrapping_add(WORD)));
        }
    }

    /// Returns a word of what the `offset` bytes before `at` are when repeated.
    ///
    /// # Safety
    ///
    /// `1 <= offset < WORD`, `offset <= at`, and a word from there on is in the output.
    #[inline(always)]
    pub(super) unsafe fn pattern(&self, at: usize, offset: usize) -> u64 {
        // SAFETY: As required from the caller.
        let word = unsafe { self.word::<0>(at.wrapping_sub(offset)) };
        (word & !(!0 << (offset * 8))).wrapping_mul(REPEAT[offset & 7])
    }
}

/// What multiplies a number of `n` bytes to a word that repeats them.
static REPEAT: [u64; WORD] = [
    0,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0001_0000_0100_0001,
    0x0000_0001_0000_0001,
    0x0000_0100_0000_0001,
    0x0001_0000_0000_0001,
    0x0100_0000_0000_0001,
];

/// How many bytes of that word are whole repetitions.
pub(super) static PERIODS: [usize; WORD] = [8, 8, 8, 6, 8, 5, 6, 7];

impl Output for SharedOutput<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn put(&mut self, at: usize, from: &[u8], count: usize) -> Result<(), Malformed> {
        let room = self.len.checked_sub(at).ok_or(Malformed)?.min(from.len());
        if count > room {
            return Err(Malformed);
        }
        let input = Input(from);
        let from = from.as_ptr();
        // Where the last word may begin, and one more.
        let words = count.min((room + 1).saturating_sub(WORD));
        let mut done = 0;
        while done < words {
            // SAFETY: There is a word on both sides.
            unsafe { self.set_word::<0>(at + done, input.load(from.wrapping_add(done))) };
            done += WORD;
        }
        if done < count && count >= WORD {
            let last = count - WORD;
            // SAFETY: This is the last word of what is there and fits.
            unsafe { self.set_word::<0>(at + last, input.load(from.wrapping_add(last))) };
            done = count;
        }
        while done < count {
            // SAFETY: This is there and fits.
            unsafe { self.set_byte(at + done, input.load(from.wrapping_add(done))) };
            done += 1;
        }
        Ok(())
    }

    #[inline(always)]
    fn repeat(&mut self, at: usize, offset: usize, count: usize) -> Result<(), Malformed> {
        let room = self.len.checked_sub(at).ok_or(Malformed)?;
        if count > room || offset == 0 || offset > at {
            return Err(Malformed);
        }
        let from = at - offset;
        // Where the last word may begin, and one more.
        let words = count.min((room + 1).saturating_sub(WORD));
        let mut done = 0;
        if offset >= WORD {
            while done < words {
                // SAFETY: There is a word, and one before it.
                unsafe {
                    let word = self.word::<0>(from + done);
                    self.set_word::<0>(at + done, word);
                }
                done += WORD;
            }
        } else if words != 0 {
            // SAFETY: There is a word, and so there is one a bit before it.
            let pattern = unsafe { self.pattern(at, offset) };
            while done < words {
                // SAFETY: There is a word.
                unsafe { self.set_word::<0>(at + done, pattern) };
                done += PERIODS[offset & 7];
            }
        }
        while done < count {
            // SAFETY: There is a byte, and one before it.
            unsafe {
                let byte = self.byte(from + done);
                self.set_byte(at + done, byte);
            }
            done += 1;
        }
        Ok(())
    }
}

/// The bytes that may be read, of which a block is the first.
#[derive(Clone, Copy)]
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl Input<'_> {
    /// Loads a number.
    ///
    /// # Safety
    ///
    /// It is in the input.
    #[inline(always)]
    pub(super) unsafe fn load<T: Copy>(self, at: *const u8) -> T {
        debug_assert!({
            let bytes = self.0.as_ptr_range();
            bytes.start <= at && at.wrapping_add(size_of::<T>()) <= bytes.end
        });
        // SAFETY: As required from the caller.
        unsafe { at.cast::<T>().read_unaligned() }
    }

    /// Loads a token, or another byte.
    ///
    /// # Safety
    ///
    /// It is in the input.
    #[inline(always)]
    pub(super) unsafe fn byte(self, at: *const u8) -> usize {
        // SAFETY: As required from the caller.
        usize::from(unsafe { self.load::<u8>(at) })
    }

    /// Loads an offset.
    ///
    /// # Safety
    ///
    /// It is in the input.
    #[inline(always)]
    pub(super) unsafe fn offset(self, at: *const u8) -> usize {
        // SAFETY: As required from the caller.
        usize::from(unsafe { self.load::<u16>(at) })
    }
}
