// SPDX-License-Identifier: GPL-2.0

//! What is decompressed.

/// A compressed block, and memory behind it that can be read too.
///
/// What is in that memory does not matter: a decompressor that looks ahead need not check so often
/// whether it is at the end.
///
/// # Invariants
///
/// `len` is at most the length of `readable`.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    readable: &'a [u8],
    len: usize,
}

impl<'a> Input<'a> {
    /// Returns the first `len` bytes of `readable` as input, if there are as many.
    #[inline]
    pub fn new(readable: &'a [u8], len: usize) -> Option<Self> {
        // INVARIANT: As is checked here.
        (len <= readable.len()).then_some(Self { readable, len })
    }

    /// Returns the length of the block.
    #[inline]
    pub fn len(self) -> usize {
        self.len
    }

    /// Returns whether the block has no bytes.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Returns the block.
    #[inline]
    pub fn bytes(self) -> &'a [u8] {
        self.readable.get(..self.len).unwrap_or(&[])
    }

    /// Returns the block and the memory behind it.
    #[inline]
    pub fn readable(self) -> &'a [u8] {
        self.readable
    }
}
