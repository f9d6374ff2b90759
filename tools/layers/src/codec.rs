// SPDX-License-Identifier: GPL-2.0

//! The compressors, one block at a time, with the settings and therefore the bytes of the original.

use std::io;

use lz4::block::{compress_to_buffer, CompressionMode};
use ovbd_codec::lz4::decompress as decompress_lz4;
use ovbd_image::zfile::{Algorithm, MAX_EXPANSION};

/// Level that zstd uses when none is given; the original knows no other.
const ZSTD_LEVEL: i32 = 3;

/// Lowest level at which lz4 uses its high-compression mode.
const LZ4_HC_LEVEL: i32 = 3;

/// Compresses blocks. Every thread has its own.
pub struct Compressor {
    kind: CompressorKind,
}

enum CompressorKind {
    Lz4(CompressionMode),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    /// A compressor; without `level`, with the original's.
    pub fn new(algorithm: Algorithm, level: Option<i32>) -> io::Result<Self> {
        let kind = match algorithm {
            Algorithm::Lz4 => CompressorKind::Lz4(match level {
                Some(level) if level >= LZ4_HC_LEVEL => CompressionMode::HIGHCOMPRESSION(level),
                _ => CompressionMode::DEFAULT,
            }),
            Algorithm::Zstd => {
                CompressorKind::Zstd(zstd::bulk::Compressor::new(level.unwrap_or(ZSTD_LEVEL))?)
            }
        };
        Ok(Self { kind })
    }

    /// Levels that the algorithm knows; 0 is its default.
    pub fn levels(algorithm: Algorithm) -> std::ops::RangeInclusive<i32> {
        match algorithm {
            Algorithm::Lz4 => 0..=12,
            Algorithm::Zstd => 0..=22,
        }
    }

    /// Bytes that a compressed block of `block_bytes` can take.
    pub fn bound(block_bytes: usize) -> usize {
        block_bytes + MAX_EXPANSION as usize
    }

    /// Compresses one block into `out`, which has room for [`Compressor::bound`], and returns how much of
    /// it was used.
    pub fn compress(&mut self, block: &[u8], out: &mut [u8]) -> io::Result<usize> {
        match &mut self.kind {
            CompressorKind::Lz4(mode) => compress_to_buffer(block, Some(*mode), false, out),
            CompressorKind::Zstd(zstd) => zstd.compress_to_buffer(block, out),
        }
    }
}

/// Decompresses blocks. Every thread has its own.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Fills `block` from compressed data, the first `len` bytes of `readable`; fails unless it is filled exactly.
    ///
    /// The other bytes of `readable` do not matter, but with some the end of the data is reached faster.
    pub fn decompress(
        &mut self,
        algorithm: Algorithm,
        readable: &[u8],
        len: usize,
        block: &mut [u8],
    ) -> io::Result<()> {
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        match algorithm {
            Algorithm::Lz4 => decompress_lz4(readable, len, block).map_err(|_| malformed()),
            Algorithm::Zstd => {
                let data = readable.get(..len).ok_or_else(malformed)?;
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new()?),
                };
                match zstd.decompress_to_buffer(data, block)? == block.len() {
                    true => Ok(()),
                    false => Err(malformed()),
                }
            }
        }
    }
}
