// SPDX-License-Identifier: GPL-2.0

//! Checksums, digests and decompressors.
//!
//! The input of a decompressor must be private memory: it is validated as it is read, so it must
//! not change meanwhile. The output may be memory that others write to, see [`Destination`]: a
//! decompressor reads back what it has written, but it checks every access against the bounds, so
//! interference garbles the output and nothing else.

// A module uses only a part of it.
#![allow(dead_code, unreachable_pub, unused_imports)]

use crate::{
    bindings,
    lower_read::Destination, //
};

mod crc32c;
mod digest;
mod input;
pub mod lz4;
mod lz4_block;
mod zstd;

pub use self::{
    crc32c::crc32c,
    digest::{
        Digest,
        DigestValue, //
    },
    input::Input,
    lz4_block::Lz4Decoder,
    zstd::ZstdDecompressor, //
};
