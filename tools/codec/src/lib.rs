// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The crate that gives userspace the LZ4 decoder of the kernel target, `rust/codec/lz4.rs`.

#![no_std]

#[allow(unsafe_code)]
#[path = "../../../rust/codec/lz4.rs"]
pub mod lz4;
