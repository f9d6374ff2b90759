// SPDX-License-Identifier: GPL-2.0 OR MIT

//! OverlayBD image formats: pure functions over bytes, shared by the kernel targets and the tools.
//!
//! Nothing here performs I/O, allocates, or is `unsafe`. The caller reads bytes and supplies storage
//! (`KVVec` in the kernel, `Vec` in userspace), so the same source is compiled by Kbuild as a module of
//! each target and by cargo as the crate `ovbd-image`.
//!
//! Everything read from an image is untrusted: arithmetic is checked and slices are accessed with
//! `get()`. An error names what is wrong; the caller adds the path or device and the offset.
//!
//! A blob is a compressed block file ([`zfile`]) or a layer ([`lsmt`]). What only the tools read, the tar wrapper and
//! the log of a writable layer, is in `tools/image`.

pub mod direct;
pub mod error;
pub mod index;
pub mod jump_table;
pub mod layer_index;
pub mod lsmt;
pub mod merge;
pub mod segment;
pub mod zfile;

pub use error::{Error, Reason};
