// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The crate that gives userspace the format source of the kernel targets, `rust/image`, and the formats that only
//! the tools read: the tar wrapper of a registry, the log of a writable layer, and all that writes layers.
//!
//! A file is recognised in this order: the tar wrapper ([`tar`]), then the compressed block file ([`zfile`]), then a
//! layer ([`lsmt`]). The writable pair of a data and an index file ([`log`]) is never wrapped or compressed.

#![no_std]

mod encode_lsmt;
mod encode_zfile;
pub mod gzip_index;
#[path = "../../../rust/image/mod.rs"]
mod image;
pub mod log;
pub mod tar;
pub mod turbo;

pub use image::*;

/// The layer: what the kernel reads, and what tools write.
pub mod lsmt {
    pub use crate::{
        encode_lsmt::{set_tar_bytes, tar_bytes, Identity},
        image::lsmt::*,
    };
}

/// The ZFile: what the kernel reads, and what tools write.
pub mod zfile {
    pub use crate::{
        encode_zfile::{Options, Totals},
        image::zfile::*,
    };
}
