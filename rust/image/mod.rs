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
//! A file is recognised in this order: the tar wrapper ([`tar`]), then the compressed block file
//! ([`zfile`]), then a layer ([`lsmt`]). The writable pair of a data and an index file ([`log`]) is never
//! wrapped or compressed.

pub mod error;
pub mod index;
pub mod jump_table;
pub mod layer_index;
pub mod log;
pub mod lsmt;
pub mod merge;
pub mod segment;
pub mod tar;
pub mod zfile;

pub use error::{Error, Reason};
