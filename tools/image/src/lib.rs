// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The crate that gives userspace the format source of the kernel targets, `rust/image`.

#![no_std]

#[path = "../../../rust/image/mod.rs"]
mod image;

pub use image::*;
