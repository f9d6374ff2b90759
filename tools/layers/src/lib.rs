// SPDX-License-Identifier: GPL-2.0

//! Layers of OverlayBD images: opening, checking, reading, building and exporting them.
//!
//! A [`blob::Blob`] is the bytes of one layer as they are stored in a file: as they are, or compressed as a
//! [`zfile::Zfile`]; either may be inside a tar wrapper. A [`layer::Layer`] is what a blob holds, data and index, or
//! the pair of files of a writable layer. A [`stack::Stack`] of layers reads like a block device. The formats
//! themselves are in [`ovbd_image`], which the kernel targets share.
//!
//! Everything that is read is untrusted. Memory grows only with what a file really holds, and every error
//! names the file, the reason and the byte. Nothing here prints: what a user should see meanwhile goes to a
//! [`report::Report`].

pub mod apply;
pub mod blob;
pub mod block_device;
pub mod build;
pub mod codec;
pub mod compare;
pub mod content_hash;
pub mod crc;
pub mod delta;
pub mod direct;
pub mod erofs_index;
pub mod error;
pub mod export;
pub mod file_id;
pub mod file_range;
pub mod foreign;
pub mod gzip_index;
pub mod info;
pub mod joined;
pub mod layer;
pub mod layer_writer;
pub mod map;
pub mod mounts;
pub mod output;
pub mod overwrite;
pub mod parents;
pub mod pipeline;
pub mod ranges;
pub mod rebase;
pub mod report;
mod reseal;
pub mod same;
pub mod seal;
pub mod signature;
pub mod source;
pub mod split;
pub mod squash;
pub mod stack;
pub mod stack_or_zfile;
pub mod sysfs;
pub mod tar;
pub mod turbo;
pub mod units;
pub mod verify;
pub mod verity;
pub mod zeros;
pub mod zfile;
pub mod zfile_writer;

pub use error::{Error, Result};
