// SPDX-License-Identifier: GPL-2.0

//! From compressed blocks to the pages of a request.
//!
//! The CRC of a block is checked in the private buffer of the lower read, and what was checked is
//! decompressed: straight into the pages if the request wants the whole block and they are
//! contiguous, else into the cache or a bounce buffer. A request ends well only if every block in
//! it had its exact length.

use super::{
    codec::{
        crc32c,
        Input,
        Lz4Decoder,
        ZstdDecompressor, //
    },
    counters::Count,
    device_mapper::{
        dm_err_limit,
        module_param,
        BioRef,
        BlkStatus,
        SECTOR_SHIFT, //
    },
    image::zfile::{
        Algorithm,
        Geometry,
        MAX_BLOCK_BYTES, //
    },
    lower_read::{
        BioCursor,
        Destination,
        FinishedRead,
        Shared,
        SharedRef, //
    },
    module_parameters,
    pool::Pool,
    Zfile,
};
use kernel::prelude::*;

/// What a bio wants of the file.
///
/// # Invariants
///
/// `start < end`, and both are in the file. `first` and `last` are the blocks of the first and
/// the last byte.
pub(super) struct Range {
    start: u64,
    end: u64,
    first: u64,
    last: u64,
}

impl Range {
    /// The range of a bio, or [`None`] if nothing of it is in the file.
    #[inline]
    pub(super) fn of(bio: &BioRef<Zfile>, geometry: &Geometry) -> Option<Self> {
        let start = bio.sector().checked_mul(1 << SECTOR_SHIFT)?;
        let end = start
            .checked_add(bio.len().into())?
            .min(geometry.original_bytes());
        if start >= end {
            return None;
        }
        // INVARIANT: As was just checked.
        Some(Self {
            start,
            end,
            first: geometry.block_of(start),
            last: geometry.block_of(end - 1),
        })
    }

    /// The first block.
    #[inline]
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// The last block.
    #[inline]
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// The part of `block` that is wanted, from byte to byte of the block.
    #[inline]
    fn part(&self, block: u64, geometry: &Geometry) -> (usize, usize) {
        let start = block.saturating_mul(geometry.block_bytes().into());
        let from = self.start.saturating_sub(start);
        let to = self.end.saturating_sub(start);
        (
            from as usize,
            to.min(geometry.decoded_bytes(block).into()) as usize,
        )
    }
}

/// Decompressors that need memory.
static ZSTD: Shared<Pool<ZstdDecompressor>> = Shared::new();

/// Room for a block of any size.
static BOUNCE: Shared<Pool<KVVec<u8>>> = Shared::new();

/// What decompression needs besides input and output. All devices share it.
pub(super) struct Workspaces {
    lz4: Lz4Decoder,
    /// The decompressors, if the algorithm needs memory.
    zstd: Option<SharedRef<Pool<ZstdDecompressor>>>,
    bounce: SharedRef<Pool<KVVec<u8>>>,
}

impl Workspaces {
    /// Allocates what no other device has yet.
    pub(super) fn new(algorithm: Algorithm) -> Result<Self> {
        let block = || Ok(KVVec::from_elem(0u8, MAX_BLOCK_BYTES as usize, GFP_KERNEL)?);
        Ok(Self {
            lz4: match module_param(&module_parameters::kernel_lz4) {
                0 => Lz4Decoder::Own,
                _ => Lz4Decoder::Kernel,
            },
            zstd: match algorithm {
                Algorithm::Lz4 => None,
                Algorithm::Zstd => Some(ZSTD.get(|| Pool::new(ZstdDecompressor::new))?),
            },
            bounce: BOUNCE.get(|| Pool::new(block))?,
        })
    }
}

/// Why a block cannot be had.
enum Damage {
    Crc,
    Data,
}

/// The decompressor for one request.
enum Decoder<'a> {
    Lz4(Lz4Decoder),
    Zstd(&'a mut ZstdDecompressor),
}

impl Decoder<'_> {
    /// Decompresses into the whole of `dst`.
    #[inline]
    fn decode(&mut self, src: Input<'_>, dst: &mut Destination<'_>) -> Result<(), Damage> {
        let done = match self {
            Decoder::Lz4(lz4) => lz4.decompress(src, dst).is_ok(),
            Decoder::Zstd(zstd) => zstd.decompress(src.bytes(), dst) == Ok(dst.len()),
        };
        if done {
            Ok(())
        } else {
            Err(Damage::Data)
        }
    }
}

impl Zfile {
    /// Answers a bio from the cache alone, if that is possible.
    #[inline]
    pub(super) fn read_cached(&self, bio: &BioRef<Self>, range: &Range) -> bool {
        let geometry = self.file.geometry();
        let (from, to) = range.part(range.first, geometry);
        if range.first != range.last || to - from == geometry.decoded_bytes(range.first) as usize {
            return false;
        }
        let mut cursor = BioCursor::new(bio);
        if !self.copy_cached(range.first, from, to, &mut cursor) {
            return false;
        }
        cursor.zero_rest();
        true
    }

    /// Copies part of a block, if it is in the cache.
    fn copy_cached(&self, block: u64, from: usize, to: usize, cursor: &mut BioCursor<'_>) -> bool {
        let copied = self
            .cache
            .find(block, |bytes| copy(bytes, from, to, cursor))
            .unwrap_or(false);
        if copied {
            self.counters.add(Count::CacheHits, 1);
        }
        copied
    }

    /// Answers a bio from what was read for it.
    pub(super) fn finish(&self, read: &FinishedRead<'_, Self>) -> BlkStatus {
        let data = match read.data() {
            Ok(data) => data,
            Err(status) => {
                self.counters.add(Count::ReadErrors, 1);
                return status;
            }
        };
        let Some(range) = Range::of(read, self.file.geometry()) else {
            return BlkStatus::IOERR;
        };
        let result = match self.workspaces.zstd.as_ref().map(|pool| pool.take()) {
            None => self.decode_all(Decoder::Lz4(self.workspaces.lz4), read, &range, data),
            Some(Some(mut zstd)) => self.decode_all(Decoder::Zstd(&mut zstd), read, &range, data),
            Some(None) => return BlkStatus::IOERR,
        };
        match result {
            Ok(()) => BlkStatus::OK,
            Err((block, damage)) => {
                self.report(read, block, damage);
                BlkStatus::IOERR
            }
        }
    }

    /// Counts, logs and raises an event for a block that is damaged.
    fn report(&self, read: &FinishedRead<'_, Self>, block: u64, damage: Damage) {
        let (counter, what) = match damage {
            Damage::Crc => (Count::CrcErrors, "CRC mismatch"),
            Damage::Data => (Count::DecodeErrors, "damaged data"),
        };
        self.counters.add(counter, 1);
        dm_err_limit!(
            Self,
            "{}: {what} in block {block}",
            self.file.device().name()
        );
        read.raise_event();
    }

    /// Decompresses all blocks of `range`, with whose stored bytes `data` begins.
    fn decode_all(
        &self,
        mut decoder: Decoder<'_>,
        bio: &BioRef<Self>,
        range: &Range,
        data: &[u8],
    ) -> Result<(), (u64, Damage)> {
        let geometry = self.file.geometry();
        let lengths = self.file.lengths(range.first, range.last).unwrap_or(&[]);
        let mut cursor = BioCursor::new(bio);
        let mut unread = data;
        let mut decompressed = 0;
        let mut result = Ok(());
        for (block, length) in (range.first..).zip(lengths) {
            let Some(stored) = Input::new(unread, *length as usize) else {
                result = Err((block, Damage::Data));
                break;
            };
            match self.decode_block(&mut decoder, block, stored, range, &mut cursor) {
                Ok(count) => {
                    decompressed += count;
                    unread = unread.get(stored.len()..).unwrap_or(&[]);
                }
                Err(damage) => {
                    result = Err((block, damage));
                    break;
                }
            }
        }
        self.counters.add(Count::Decompressed, decompressed);
        result?;
        // Only the last sector of the file is longer than its content.
        if (cursor.remaining() as u64) >> SECTOR_SHIFT != 0
            || range.end != geometry.original_bytes() && cursor.remaining() != 0
        {
            return Err((range.last, Damage::Data));
        }
        cursor.zero_rest();
        Ok(())
    }

    /// Puts the wanted part of one block into the bio, and returns how often that took
    /// decompression.
    #[inline]
    fn decode_block(
        &self,
        decoder: &mut Decoder<'_>,
        block: u64,
        stored: Input<'_>,
        range: &Range,
        cursor: &mut BioCursor<'_>,
    ) -> Result<u64, Damage> {
        let geometry = self.file.geometry();
        let (from, to) = range.part(block, geometry);
        let decoded = geometry.decoded_bytes(block) as usize;
        let whole = to - from == decoded;
        if !whole && self.copy_cached(block, from, to, cursor) {
            return Ok(0);
        }
        let payload = if self.options.ignore_crc {
            geometry.unchecked_payload(stored.bytes())
        } else {
            geometry.payload(stored.bytes(), crc32c)
        }
        .map_err(|_| Damage::Crc)?;
        // What is compressed comes first, then the CRC.
        let payload = Input::new(stored.readable(), payload.len()).ok_or(Damage::Data)?;

        if whole {
            let decoded = cursor.contiguous(decoded, |pages| decoder.decode(payload, pages));
            if let Some(decoded) = decoded {
                return decoded.map(|()| 1);
            }
        }
        self.decode_aside(decoder, block, payload, (from, to), cursor)
    }

    /// Decompresses a block elsewhere and copies what is wanted. Returns how often that took
    /// decompression.
    fn decode_aside(
        &self,
        decoder: &mut Decoder<'_>,
        block: u64,
        payload: Input<'_>,
        (from, to): (usize, usize),
        cursor: &mut BioCursor<'_>,
    ) -> Result<u64, Damage> {
        let decoded = self.file.geometry().decoded_bytes(block) as usize;
        let mut count = 0;
        let mut decode = |bytes: &mut [u8]| {
            count += 1;
            let bytes = bytes.get_mut(..decoded).ok_or(Damage::Data)?;
            decoder.decode(payload, &mut bytes.into())
        };
        let copied = if to - from < decoded {
            self.cache
                .fill(block, &mut decode, |bytes| copy(bytes, from, to, cursor))
        } else {
            None
        };
        let copied = match copied {
            Some(copied) => copied?,
            None => {
                let mut bounce = self.workspaces.bounce.take().ok_or(Damage::Data)?;
                decode(&mut bounce)?;
                copy(&bounce, from, to, cursor)
            }
        };
        if !copied {
            return Err(Damage::Data);
        }
        if count == 0 {
            self.counters.add(Count::CacheHits, 1);
        }
        Ok(count)
    }
}

/// Copies the bytes between `from` and `to`, and returns whether all of them were.
fn copy(bytes: &[u8], from: usize, to: usize, cursor: &mut BioCursor<'_>) -> bool {
    bytes
        .get(from..to)
        .is_some_and(|bytes| cursor.copy_from_slice(bytes) == bytes.len())
}
