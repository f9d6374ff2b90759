// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The jump table of a ZFile: where every block is.
//!
//! In the file it is an array of stored lengths, from which the offsets follow. [`JumpTableReader`] checks
//! it as it streams by; [`JumpTable`] is its compact form in memory.

use core::ops::Deref;

use super::{
    error::{Error, Reason},
    zfile::{Crc32c, Geometry, ENTRY_BYTES, HEADER_BYTES},
};

/// Where a block is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes, CRC included.
    pub bytes: u32,
}

/// Reads a jump table as it streams by, and checks every entry.
///
/// Extents may only be used when [`JumpTableReader::finish`] succeeded.
#[derive(Clone, Debug)]
pub struct JumpTableReader {
    geometry: Geometry,
    crc_function: Crc32c,
    crc: u32,
    block: u64,
    /// First byte of the next block.
    next: u64,
}

impl JumpTableReader {
    /// Starts reading the jump table of a file with this geometry.
    pub fn new(geometry: &Geometry, crc: Crc32c) -> Self {
        Self {
            geometry: *geometry,
            crc_function: crc,
            crc: 0,
            block: 0,
            next: HEADER_BYTES as u64,
        }
    }

    /// Takes the next `bytes`, whole entries, and hands the extent of every block to `sink`.
    ///
    /// # Errors
    ///
    /// A block that is too small, too large or reaches into the jump table; more entries than blocks;
    /// bytes that are not whole entries; the first error of `sink`.
    pub fn feed<E: From<Error>>(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(Extent) -> Result<(), E>,
    ) -> Result<(), E> {
        self.crc = (self.crc_function)(self.crc, bytes);
        let entries = bytes.chunks_exact(ENTRY_BYTES);
        let whole = entries.remainder().is_empty();
        for entry in entries {
            let entry = entry.try_into().map_or(0, u32::from_le_bytes);
            sink(self.entry(entry)?)?;
        }
        if !whole {
            return Err(self.fail(Reason::ZfileIndexTruncated).into());
        }
        Ok(())
    }

    /// Checks that the table is complete and its CRC.
    ///
    /// # Errors
    ///
    /// Entries are missing, or a wrong CRC.
    pub fn finish(&self) -> Result<(), Error> {
        if self.block != self.geometry.blocks() {
            return Err(self.fail(Reason::ZfileIndexTruncated));
        }
        if self.geometry.index_crc.is_some_and(|crc| crc != self.crc) {
            return Err(Error::new(
                Reason::ZfileIndexCrc,
                self.geometry.index_offset(),
            ));
        }
        Ok(())
    }

    /// Byte after the last block so far. The original leaves no gap before the jump table, but reads a
    /// file that has one.
    pub fn data_end(&self) -> u64 {
        self.next
    }

    fn entry(&mut self, bytes: u32) -> Result<Extent, Error> {
        if self.block >= self.geometry.blocks() {
            return Err(self.fail(Reason::ZfileTooManyBlocks));
        }
        if bytes <= self.geometry.crc_bytes() {
            return Err(self.fail(Reason::ZfileBlockTooSmall));
        }
        if bytes > self.geometry.max_stored_bytes() {
            return Err(self.fail(Reason::ZfileBlockTooLarge));
        }
        let offset = self.next;
        match offset.checked_add(u64::from(bytes)) {
            Some(end) if end <= self.geometry.index_offset() => self.next = end,
            _ => return Err(self.fail(Reason::ZfileBlockOutside)),
        }
        self.block += 1;
        Ok(Extent { offset, bytes })
    }

    /// `reason`, at the entry that comes next.
    fn fail(&self, reason: Reason) -> Error {
        // No overflow: the table lies inside the file.
        let at = self.geometry.index_offset() + self.block * ENTRY_BYTES as u64;
        Error::new(reason, at)
    }
}

/// Blocks that share one base in a [`JumpTable`]: their lengths fill one cache line.
pub const JUMP_GROUP: usize = 16;

/// A jump table in memory: 4.5 bytes per block.
///
/// The caller supplies the storage and fills it while a [`JumpTableReader`] reads: `lengths` takes the
/// length of every block, `bases` the offset of every block whose number is a multiple of
/// [`JUMP_GROUP`]. Looking up a block adds up at most 15 neighbouring lengths.
#[derive(Clone, Debug)]
pub struct JumpTable<L, B> {
    lengths: L,
    bases: B,
}

impl<L: Deref<Target = [u32]>, B: Deref<Target = [u64]>> JumpTable<L, B> {
    /// Wraps the two arrays, or `None` where their lengths do not belong together.
    pub fn new(lengths: L, bases: B) -> Option<Self> {
        (lengths.len().div_ceil(JUMP_GROUP) == bases.len()).then_some(Self { lengths, bases })
    }

    /// Where `block` is, or `None` beyond the last.
    pub fn extent(&self, block: u64) -> Option<Extent> {
        let block = usize::try_from(block).ok()?;
        let group = block / JUMP_GROUP;
        let before = self.lengths.get(group * JUMP_GROUP..block)?;
        let skipped: u64 = before.iter().map(|bytes| u64::from(*bytes)).sum();
        Some(Extent {
            offset: self.bases.get(group)?.checked_add(skipped)?,
            bytes: *self.lengths.get(block)?,
        })
    }

    /// Stored lengths of the blocks from `first` to `last`, CRCs included, or `None` beyond the last.
    pub fn lengths(&self, first: u64, last: u64) -> Option<&[u32]> {
        let first = usize::try_from(first).ok()?;
        let last = usize::try_from(last).ok()?;
        self.lengths.get(first..=last)
    }

    /// First byte of `first` and the byte after `last`: what one read of all blocks between must cover.
    pub fn span(&self, first: u64, last: u64) -> Option<(u64, u64)> {
        let end = self.extent(last)?;
        let start = self.extent(first)?.offset;
        let end = end.offset.checked_add(u64::from(end.bytes))?;
        (start <= end).then_some((start, end))
    }
}
