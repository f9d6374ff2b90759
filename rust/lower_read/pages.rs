// SPDX-License-Identifier: GPL-2.0

//! The memory behind a bio.
//!
//! A bio to read lists pieces of pages that are to be filled. Those pages belong to somebody
//! else: with direct I/O user space can write to them at any time, even while the kernel does. A
//! Rust reference to such memory would promise that it does not change, so none is ever made
//! here. Data is copied in, or a [`Destination`] is passed to C code that treats the memory as
//! raw and validates everything it reads back, like the decompressors.

use super::bindings;
use crate::device_mapper::{
    BioRef,
    Target, //
};
use core::{marker::PhantomData, ptr, ptr::NonNull};

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

    /// Returns the next `len` bytes as one piece, and moves past them.
    ///
    /// Returns [`None`], and does not move, if they are not contiguous in memory or not there.
    /// Several destinations must be dropped in the reverse order of their creation.
    pub fn contiguous(&mut self, len: usize) -> Option<Destination<'a>> {
        let segment = self.segment()?;
        if len > segment.bv_len as usize {
            return None;
        }
        self.advance(len);
        // SAFETY: The pages may be written to for `'a`, by the type invariant.
        Some(unsafe { Destination::map(segment, len) })
    }

    /// Returns the longest contiguous piece of at most `max` bytes, and moves past it.
    ///
    /// Returns [`None`] at the end.
    pub fn next_piece(&mut self, max: usize) -> Option<Destination<'a>> {
        let len = max.min(self.segment()?.bv_len as usize);
        self.contiguous(len)
    }

    /// Copies from `src` and moves forward, until one of them ends.
    ///
    /// Returns how many bytes were copied.
    pub fn copy_from_slice(&mut self, src: &[u8]) -> usize {
        let mut rest = src;
        while let Some(mut piece) = self.next_piece(rest.len()) {
            let Some((now, later)) = rest.split_at_checked(piece.len()) else {
                break;
            };
            if now.is_empty() {
                break;
            }
            piece.copy_from_slice(now);
            rest = later;
        }
        src.len().saturating_sub(rest.len())
    }

    /// Fills `len` bytes, or all up to the end, with zeroes and moves forward.
    ///
    /// Returns how many bytes were zeroed.
    pub fn zero(&mut self, len: usize) -> usize {
        let mut rest = len;
        while let Some(mut piece) = self.next_piece(rest) {
            if piece.is_empty() {
                break;
            }
            piece.zero();
            rest = rest.saturating_sub(piece.len());
        }
        len.saturating_sub(rest)
    }
}

/// Memory to put data into, which may be shared with others.
///
/// # Invariants
///
/// `ptr` is valid for reads and writes of `len` bytes for `'a`. If `mapped` is something then it
/// is what `ptr` is a local mapping of.
pub struct Destination<'a> {
    ptr: NonNull<u8>,
    len: usize,
    mapped: Option<bindings::bio_vec>,
    _lifetime: PhantomData<&'a mut [u8]>,
}

impl<'a> From<&'a mut [u8]> for Destination<'a> {
    fn from(slice: &'a mut [u8]) -> Self {
        // INVARIANT: The slice is borrowed for `'a`.
        Self {
            len: slice.len(),
            ptr: NonNull::from(slice).cast(),
            mapped: None,
            _lifetime: PhantomData,
        }
    }
}

impl Destination<'_> {
    /// Maps the first `len` bytes of `segment`.
    ///
    /// # Safety
    ///
    /// The segment must be at least that long and, in high memory, lie in one page. Its pages may
    /// be written to for the lifetime of the result.
    unsafe fn map(mut segment: bindings::bio_vec, len: usize) -> Self {
        segment.bv_len = len as bindings::__u32;
        // SAFETY: The segment has valid pages.
        let ptr = unsafe { bindings::bvec_kmap_local(&segment) };
        // INVARIANT: The mapping covers the whole segment, in high memory because it is in one
        // page, otherwise because the direct mapping is linear.
        Self {
            // SAFETY: A mapping of a page is not at address zero.
            ptr: unsafe { NonNull::new_unchecked(ptr.cast()) },
            len,
            mapped: Some(segment),
            _lifetime: PhantomData,
        }
    }

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

    /// Returns the address, for C code that treats the memory as shared.
    #[inline]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Copies `src` to the beginning, as far as there is room.
    pub fn copy_from_slice(&mut self, src: &[u8]) {
        // SAFETY: The destination is valid for as many bytes by the type invariant. They do not
        // overlap: a shared slice is not memory that may be written to.
        unsafe {
            ptr::copy_nonoverlapping(src.as_ptr(), self.ptr.as_ptr(), src.len().min(self.len))
        };
    }

    /// Fills everything with zeroes.
    pub fn zero(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { ptr::write_bytes(self.ptr.as_ptr(), 0, self.len) };
    }
}

impl Drop for Destination<'_> {
    fn drop(&mut self) {
        if let Some(segment) = &self.mapped {
            // SAFETY: The segment is what was mapped at `ptr`, and not used any more.
            unsafe {
                bindings::bvec_flush_dcache(segment);
                bindings::kunmap_local(self.ptr.as_ptr().cast());
            }
        }
    }
}
