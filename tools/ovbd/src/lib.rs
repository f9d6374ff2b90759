// SPDX-License-Identifier: GPL-2.0

//! Building, reading and checking OverlayBD images.
//!
//! A [`stack::Stack`] of [`layer::Layer`]s reads like a block device. A layer's bytes come from a
//! [`content::Content`]: a file as it is, or a [`zfile::Zfile`] that is decompressed on demand; either may
//! be inside a tar wrapper. The formats themselves are in [`ovbd_image`], which the kernel targets share.
//!
//! [`devices`] maps stacks with the kernel's targets and makes layers of what is written over them.
//!
//! Everything that is read is untrusted. Memory grows only with what a file really holds, and every error
//! names the file, the reason and the byte.

pub mod build;
pub mod cli;
pub mod codec;
pub mod content;
pub mod crc;
pub mod devices;
pub mod error;
pub mod export;
pub mod image;
pub mod info;
pub mod input;
pub mod layer;
pub mod layer_writer;
pub mod map;
pub mod output;
pub mod pool;
pub mod progress;
pub mod source;
pub mod stack;
pub mod verify;
pub mod write_behind;
pub mod zeros;
pub mod zfile;
pub mod zfile_writer;

pub use error::{Error, Result};
