// SPDX-License-Identifier: GPL-2.0

//! The compressors, one block at a time, with the settings and therefore the bytes of the original.

use std::io;

use lz4::block::CompressionMode;
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
            CompressorKind::Lz4(mode) => {
                lz4::block::compress_to_buffer(block, Some(*mode), false, out)
            }
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
    /// Fills `block` from the compressed `data`; fails unless it is filled exactly.
    pub fn decompress(
        &mut self,
        algorithm: Algorithm,
        data: &[u8],
        block: &mut [u8],
    ) -> io::Result<()> {
        let size = block.len();
        let used = match algorithm {
            Algorithm::Lz4 => {
                // The size is an i32 in the C interface; blocks are at most 64 KiB.
                lz4::block::decompress_to_buffer(data, Some(size as i32), block)?
            }
            Algorithm::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new()?),
                };
                zstd.decompress_to_buffer(data, block)?
            }
        };
        if used != size {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }
}
