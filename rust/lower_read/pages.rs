// SPDX-License-Identifier: GPL-2.0

//! The memory behind a bio.
//!
//! A bio to read lists pieces of pages that are to be filled. Those pages belong to somebody
//! else: with direct I/O user space can write to them at any time, even while the kernel does. A
//! Rust reference to such memory would promise that it does not change, so none is ever made
//! here. Data is copied in by C code, to which the memory model of Rust does not apply, or a
//! [`Destination`] is passed to a decompressor that treats the memory as raw and validates
//! everything it reads back.

use super::bindings;
use crate::device_mapper::{
    BioRef,
    Target, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

/// Walks over the data of a bio to read.
///
/// For any other bio there is nothing to walk over: their pages must not be written to.
///
/// # Invariants
///
/// `bio` is valid for `'a`, and `iter` is a position within it. If `iter.bi_size` is not zero
/// then the bio is one to read and its pages may be written to for `'a`.
pub struct BioCursor<'a> {
    bio: NonNull<bindings::bio>,
    iter: bindings::bvec_iter,
    _lifetime: PhantomData<&'a bindings::bio>,
}

impl<'a> BioCursor<'a> {
    /// Creates a cursor at the beginning of the bio's data.
    ///
    /// A bio that is not one to read gives an empty one.
    #[inline]
    pub fn new<T: Target>(bio: &'a BioRef<T>) -> Self {
        let bio = bio.as_raw();
        // SAFETY: The bio is valid and belongs to the target for `'a`.
        let (opf, mut iter) = unsafe { ((*bio.as_ptr()).bi_opf, (*bio.as_ptr()).bi_iter) };
        if opf & bindings::REQ_OP_MASK != bindings::req_op_REQ_OP_READ {
            iter.bi_size = 0;
        }
        // INVARIANT: The size is zero unless this is a bio to read, whose pages may be written
        // to until it is ended.
        Self {
            bio,
            iter,
            _lifetime: PhantomData,
        }
    }

    /// Returns the number of bytes from here to the end.
    #[inline]
    pub fn remaining(&self) -> usize {
        self.iter.bi_size as usize
    }

    /// Moves forward by `len` bytes, or to the end.
    pub fn advance(&mut self, len: usize) {
        let len = len.min(self.remaining());
        if len != 0 {
            // SAFETY: The bio is valid and `iter` a position in it with at least `len` bytes left.
            // INVARIANT: The position stays within the bio.
            unsafe {
                bindings::bio_advance_iter(
                    self.bio.as_ptr(),
                    &mut self.iter,
                    len as bindings::__u32,
                )
            };
        }
    }

    /// Returns the contiguous memory at the present position, not empty.
    fn segment(&self) -> Option<bindings::bio_vec> {
        if self.iter.bi_size == 0 {
            return None;
        }
        // Pages that follow each other physically do so in the direct mapping, unless they are in
        // high memory, where they are mapped one by one.
        //
        // SAFETY: The bio is valid and `iter` is a position in it that is not the end.
        Some(unsafe {
            if cfg!(CONFIG_HIGHMEM) {
                bindings::bio_iter_iovec(self.bio.as_ptr(), &self.iter)
            } else {
                bindings::mp_bvec_iter_bvec(self.bio.as_ptr(), &self.iter)
            }
        })
    }

    /// Has `fill` write to the next `len` bytes as one piece, and moves past them.
    ///
    /// Returns [`None`], and does neither, if they are not contiguous in memory or not there.
    pub fn contiguous<R>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut Destination<'_>) -> R,
    ) -> Option<R> {
        let mut segment = self.segment()?;
        if len > segment.bv_len as usize {
            return None;
        }
        self.advance(len);
        segment.bv_len = len as bindings::__u32;
        // SAFETY: The segment has valid pages, and in high memory lies in one of them.
        let mapped = unsafe { bindings::bvec_kmap_local(&segment) };
        // INVARIANT: The mapping covers the whole segment, in high memory because it is in one
        // page, otherwise because the direct mapping is linear. The pages may be written to until
        // the bio ends, which is later than this.
        let mut destination = Destination {
            // SAFETY: A mapping of a page is not at address zero.
            ptr: unsafe { NonNull::new_unchecked(mapped.cast()) },
            len,
            _lifetime: PhantomData,
        };
        let result = fill(&mut destination);
        // SAFETY: The segment is what was mapped last, and is not used any more: `fill` cannot
        // keep what it was lent, and what it has mapped itself it has unmapped.
        unsafe {
            bindings::bvec_flush_dcache(&segment);
            bindings::kunmap_local(mapped);
        }
        Some(result)
    }

    /// Has `fill` write to the longest contiguous piece of at most `max` bytes, and moves past it.
    ///
    /// Returns [`None`] at the end.
    fn next_piece<R>(
        &mut self,
        max: usize,
        fill: impl FnOnce(&mut Destination<'_>) -> R,
    ) -> Option<R> {
        let len = max.min(self.segment()?.bv_len as usize);
        self.contiguous(len, fill)
    }

    /// Copies from `src` and moves forward, until one of them ends.
    ///
    /// Returns how many bytes were copied.
    pub fn copy_from_slice(&mut self, src: &[u8]) -> usize {
        let mut left = src;
        while !left.is_empty() {
            let Some(copied) = self.next_piece(left.len(), |piece| {
                piece.copy_from_slice(left);
                piece.len()
            }) else {
                break;
            };
            left = left.get(copied..).unwrap_or(&[]);
        }
        src.len().saturating_sub(left.len())
    }

    /// Fills everything from here to the end with zeroes.
    pub fn zero_rest(&mut self) {
        while self
            .next_piece(self.remaining(), |piece| piece.zero())
            .is_some()
        {}
    }
}

/// Memory to put data into, which others may write to at the same time.
///
/// # Invariants
///
/// `ptr` is valid for reads and writes of `len` bytes for `'a`.
pub struct Destination<'a> {
    ptr: NonNull<u8>,
    len: usize,
    _lifetime: PhantomData<&'a mut [u8]>,
}

impl<'a> From<&'a mut [u8]> for Destination<'a> {
    fn from(slice: &'a mut [u8]) -> Self {
        // INVARIANT: The slice is borrowed for `'a`.
        Self {
            len: slice.len(),
            ptr: NonNull::from(slice).cast(),
            _lifetime: PhantomData,
        }
    }
}

impl Destination<'_> {
    /// Returns the length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there is no room at all.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the address, for code that treats the memory as shared.
    #[inline]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Copies `src` to the beginning, as far as there is room.
    pub fn copy_from_slice(&mut self, src: &[u8]) {
        // SAFETY: The destination is valid for as many bytes by the type invariant. They do not
        // overlap: a shared slice is not memory that may be written to.
        unsafe {
            bindings::copy_to_shared(
                self.ptr.as_ptr().cast(),
                src.as_ptr().cast(),
                src.len().min(self.len),
            )
        };
    }

    /// Fills everything with zeroes.
    pub fn zero(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::zero_shared(self.ptr.as_ptr().cast(), self.len) };
    }
}
