// SPDX-License-Identifier: GPL-2.0

//! Reading a ZFile: the jump table in memory, blocks checked and decompressed on demand.

use std::sync::{Arc, Mutex, PoisonError};

use ovbd_image::{
    jump_table::{Extent, JumpTable, JumpTableReader, JUMP_GROUP},
    zfile::{trailer_position, Geometry, Header, Options, HEADER_BYTES},
    Reason,
};

use crate::{
    codec::Decompressor,
    crc::crc32c,
    error::{Error, Place, Result},
    file_range::{FileRange, CHUNK_BYTES},
};

/// Uncompressed bytes that one read covers: what is read then still is in the cache when it is
/// decompressed.
const SPAN_BYTES: u64 = 128 << 10;

/// A jump table in memory.
type Table = JumpTable<Vec<u32>, Vec<u64>>;

/// A block that is kept, with its number.
type Kept = (u64, Arc<Vec<u8>>);

/// An open ZFile.
#[derive(Clone, Debug)]
pub struct Zfile {
    input: FileRange,
    geometry: Geometry,
    table: Table,
    final_header: bool,
    gap: u64,
    /// The block that any thread read last in part: neighbouring parts of a stack often need the same.
    last: Arc<Mutex<Option<Kept>>>,
}

impl Zfile {
    /// Whether `first`, the first bytes of a file of `bytes`, are those of a ZFile.
    pub fn recognise(first: &[u8], bytes: u64) -> bool {
        bytes >= HEADER_BYTES as u64 && Header::recognise(first)
    }

    /// Reads header, trailer and jump table, and checks all that they say.
    ///
    /// # Errors
    ///
    /// Those of the format, and of reading.
    pub fn open(input: FileRange) -> Result<Self> {
        let fail = |e: ovbd_image::Error| Self::error(&input, e);
        let bytes = input.bytes();
        let header = Header::parse(&input.read_array(0)?, bytes, crc32c).map_err(fail)?;
        let (geometry, final_header) = match header {
            Header::Final(geometry) => (geometry, true),
            Header::SeeTrailer => {
                let at = trailer_position(bytes).map_err(fail)?;
                let block = input.read_array(at)?;
                let geometry = Geometry::parse_trailer(&block, bytes, crc32c).map_err(fail)?;
                (geometry, false)
            }
        };
        let (table, end) = Self::read_table(&input, &geometry)?;
        Ok(Self {
            final_header,
            gap: geometry.index_offset() - end,
            input,
            geometry,
            table,
            last: Arc::default(),
        })
    }

    /// The jump table, and the byte after the last block.
    fn read_table(input: &FileRange, geometry: &Geometry) -> Result<(Table, u64)> {
        let fail = |e: ovbd_image::Error| Self::error(input, e);
        let mut reader = JumpTableReader::new(geometry, crc32c);
        let (mut lengths, mut bases) = (Vec::new(), Vec::new());
        let mut buffer = vec![0; geometry.index_bytes().min(CHUNK_BYTES as u64) as usize];
        let mut at = 0;
        while at < geometry.index_bytes() {
            let want = (geometry.index_bytes() - at).min(CHUNK_BYTES as u64) as usize;
            let chunk = &mut buffer[..want];
            input.read(chunk, geometry.index_offset() + at)?;
            reader
                .feed(
                    chunk,
                    |extent| -> std::result::Result<(), ovbd_image::Error> {
                        if lengths.len() % JUMP_GROUP == 0 {
                            bases.push(extent.offset);
                        }
                        lengths.push(extent.bytes);
                        Ok(())
                    },
                )
                .map_err(fail)?;
            at += want as u64;
        }
        reader.finish().map_err(fail)?;
        let table = JumpTable::new(lengths, bases)
            .ok_or_else(|| Error::new(input.path(), Reason::ZfileIndexTruncated.as_str()))?;
        Ok((table, reader.data_end()))
    }

    /// An error of the format, at its byte of the file.
    fn error(input: &FileRange, error: ovbd_image::Error) -> Error {
        let at = Place::File(input.start().saturating_add(error.offset()));
        Error::format(input.path(), error, at)
    }

    /// The file around it.
    pub fn input(&self) -> &FileRange {
        &self.input
    }

    /// What header or trailer say.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What another one with the same blocks is made with.
    pub fn options(&self) -> Options {
        Options {
            block_bytes: self.geometry.block_bytes(),
            algorithm: self.geometry.algorithm(),
            block_crc: self.geometry.has_block_crc(),
        }
    }

    /// Whether the header was overwritten with the final values.
    pub fn has_final_header(&self) -> bool {
        self.final_header
    }

    /// Bytes between the last block and the jump table; the original leaves none.
    pub fn gap(&self) -> u64 {
        self.gap
    }

    /// Where a block is stored; `None` beyond the last.
    pub fn extent(&self, block: u64) -> Option<Extent> {
        self.table.extent(block)
    }

    /// Fills `buffer` from byte `offset` of the uncompressed content.
    ///
    /// # Errors
    ///
    /// A block with a wrong CRC or one that does not decompress, content that ends before the buffer is
    /// full, and those of reading.
    pub fn read(&self, cursor: &mut Cursor, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
        let end = offset
            .checked_add(buffer.len() as u64)
            .filter(|end| *end <= self.geometry.original_bytes())
            .ok_or_else(|| {
                Error::new(self.input.path(), "ends too early")
                    .at(Place::Content(self.geometry.original_bytes()))
            })?;
        let block_bytes = u64::from(self.geometry.block_bytes());
        while offset < end {
            let block = self.geometry.block_of(offset);
            let inside = (offset % block_bytes) as usize;
            if inside != 0 || end - offset < self.decoded(block) || cursor.has(block) {
                let from = &self.load(cursor, block)?[inside..];
                let n = from.len().min(buffer.len());
                buffer[..n].copy_from_slice(&from[..n]);
                buffer = &mut buffer[n..];
                offset += n as u64;
                continue;
            }
            // From here on whole blocks, decompressed in place.
            let mut last = self.geometry.block_of(end - 1);
            if end % block_bytes != 0 && end != self.geometry.original_bytes() {
                last -= 1;
            }
            let last = last.min(block + (SPAN_BYTES / block_bytes) - 1);
            let n = self.read_blocks(cursor, block, last, buffer)?;
            buffer = &mut buffer[n..];
            offset += n as u64;
        }
        Ok(())
    }

    fn decoded(&self, block: u64) -> u64 {
        u64::from(self.geometry.decoded_bytes(block))
    }

    /// Reads the blocks `first..=last` as they are stored; returns where they begin, too.
    fn fetch<'s>(&self, stored: &'s mut Stored, first: u64, last: u64) -> Result<(u64, &'s [u8])> {
        let span = self.table.span(first, last);
        let (start, end) = span.ok_or_else(|| self.no_block(last))?;
        let span = stored.fetch(&self.input, start, (end - start) as usize)?;
        Ok((start, span))
    }

    /// Decompresses the blocks `first..=last` to the start of `buffer`; returns the bytes filled.
    fn read_blocks(
        &self,
        cursor: &mut Cursor,
        first: u64,
        last: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let (start, span) = self.fetch(&mut cursor.stored, first, last)?;
        let mut done = 0;
        for block in first..=last {
            let extent = self.extent(block).ok_or_else(|| self.no_block(block))?;
            let from = (extent.offset - start) as usize;
            let size = self.decoded(block) as usize;
            let to = &mut buffer[done..done + size];
            self.decode(&mut cursor.decompressor, &span[from..], extent, to)?;
            done += size;
        }
        Ok(done)
    }

    /// A block, which the cursor keeps.
    fn load<'a>(&self, cursor: &'a mut Cursor, block: u64) -> Result<&'a [u8]> {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |kept: &Option<Kept>| kept.clone().filter(|(number, _)| *number == block);
        let kept = match known(&cursor.kept).or_else(|| known(&last())) {
            Some(kept) => kept,
            None => {
                cursor.kept = None;
                let idle = last().take().and_then(|(_, data)| Arc::into_inner(data));
                let mut data = idle.unwrap_or_default();
                data.resize(self.decoded(block) as usize, 0);
                self.decode_one(cursor, block, &mut data)?;
                let kept = (block, Arc::new(data));
                *last() = Some(kept.clone());
                kept
            }
        };
        Ok(cursor.kept.insert(kept).1.as_slice())
    }

    /// Reads and decompresses one block into `data`, of its size.
    fn decode_one(&self, cursor: &mut Cursor, block: u64, data: &mut [u8]) -> Result<()> {
        let extent = self.extent(block).ok_or_else(|| self.no_block(block))?;
        let stored = cursor
            .stored
            .fetch(&self.input, extent.offset, extent.bytes as usize)?;
        self.decode(&mut cursor.decompressor, stored, extent, data)
    }

    /// Checks and decompresses the block that `extent` is about, which `readable` begins with.
    fn decode(
        &self,
        decompressor: &mut Decompressor,
        readable: &[u8],
        extent: Extent,
        block: &mut [u8],
    ) -> Result<()> {
        let data = self.payload(&readable[..extent.bytes as usize], extent)?;
        decompressor
            .decompress(self.geometry.algorithm(), readable, data.len(), block)
            .map_err(|_| {
                let error = ovbd_image::Error::new(Reason::ZfileBlockData, extent.offset);
                Self::error(&self.input, error)
            })
    }

    /// What is compressed in the block that `extent` is about, of which all is in `stored`, when its CRC was checked.
    fn payload<'s>(&self, stored: &'s [u8], extent: Extent) -> Result<&'s [u8]> {
        let payload = self.geometry.payload(stored, crc32c);
        payload.map_err(|e| Self::error(&self.input, e.shifted(extent.offset)))
    }

    /// Calls `take` with each of the blocks `first..=last` as it is stored, CRC included, when that was checked.
    ///
    /// # Errors
    ///
    /// A block with a wrong CRC, and those of reading.
    pub fn stored_blocks(
        &self,
        cursor: &mut Cursor,
        first: u64,
        last: u64,
        mut take: impl FnMut(&[u8]),
    ) -> Result<()> {
        let (start, span) = self.fetch(&mut cursor.stored, first, last)?;
        for block in first..=last {
            let extent = self.extent(block).ok_or_else(|| self.no_block(block))?;
            let from = (extent.offset - start) as usize;
            let stored = &span[from..from + extent.bytes as usize];
            self.payload(stored, extent)?;
            take(stored);
        }
        Ok(())
    }

    /// Reads, checks and decompresses the blocks `first..=last`, and hands every error to `report`.
    pub fn check_blocks(
        &self,
        cursor: &mut Cursor,
        first: u64,
        last: u64,
        mut report: impl FnMut(Error),
    ) {
        let span = self.table.span(first, last).and_then(|(start, end)| {
            let bytes = usize::try_from(end - start).ok()?;
            Some((start, cursor.stored.fetch(&self.input, start, bytes).ok()?))
        });
        let Some((start, span)) = span else {
            // Something cannot be read: find out which blocks that concerns.
            return (first..=last).for_each(|block| {
                let mut data = vec![0; self.decoded(block) as usize];
                if let Err(e) = self.decode_one(cursor, block, &mut data) {
                    report(e);
                }
            });
        };
        for block in first..=last {
            cursor.data.resize(self.decoded(block) as usize, 0);
            let checked = self.extent(block).ok_or_else(|| self.no_block(block));
            let checked = checked.and_then(|extent| {
                let readable = &span[(extent.offset - start) as usize..];
                self.decode(&mut cursor.decompressor, readable, extent, &mut cursor.data)
            });
            if let Err(e) = checked {
                report(e);
            }
        }
    }

    /// Reads the blocks that hold the bytes `from..to` of the content into `ahead`, as those of layer number `layer`,
    /// if there is room for them. What cannot be read is left to whoever reads these bytes.
    pub fn read_ahead(&self, from: u64, to: u64, layer: usize, ahead: &mut ReadAhead) {
        let to = to.min(self.geometry.original_bytes());
        if from >= to {
            return;
        }
        let (first, last) = (self.geometry.block_of(from), self.geometry.block_of(to - 1));
        if let Some((start, end)) = self.table.span(first, last) {
            ahead.read(&self.input, start, end - start, layer);
        }
    }

    fn no_block(&self, block: u64) -> Error {
        Error::new(self.input.path(), format!("there is no block {block}"))
    }
}

/// What a thread keeps between reads: its buffers, its decompressor, and the block it read last in part.
#[derive(Default)]
pub struct Cursor {
    kept: Option<Kept>,
    /// Memory for blocks that nobody keeps.
    data: Vec<u8>,
    stored: Stored,
    decompressor: Decompressor,
}

impl Cursor {
    fn has(&self, block: u64) -> bool {
        self.kept.as_ref().is_some_and(|(kept, _)| *kept == block)
    }

    /// Uses what was read ahead of layer number `layer`, whose cursor this is.
    pub fn take_ahead(&mut self, ahead: &Arc<ReadAhead>, layer: usize) {
        let piece = ahead.pieces.iter().position(|piece| piece.layer == layer);
        self.stored.ahead = piece.map(|piece| (Arc::clone(ahead), piece));
    }

    /// Gives back what was read ahead.
    pub fn drop_ahead(&mut self) {
        self.stored.ahead = None;
    }

    /// Makes it the cursor of another layer.
    pub fn reuse(&mut self) {
        self.kept = None;
        self.stored.bytes = 0;
        self.stored.ahead = None;
    }
}

/// Stored bytes of one window, of all layers together, that were read before they are wanted.
#[derive(Debug, Default)]
pub struct ReadAhead {
    data: Vec<u8>,
    /// Bytes of `data` that count.
    used: usize,
    pieces: Vec<Piece>,
}

/// What was read of one layer.
#[derive(Debug)]
struct Piece {
    layer: usize,
    /// Byte of the ZFile.
    offset: u64,
    /// Where it is in the memory, and how much it is.
    at: usize,
    bytes: usize,
}

impl ReadAhead {
    /// Bytes that one can hold: a window that does not compress, with a block at either end.
    const ROOM: usize = (1 << 20) + (3 << 16);

    /// Forgets what was read; keeps the memory.
    pub fn clear(&mut self) {
        self.used = 0;
        self.pieces.clear();
    }

    fn read(&mut self, input: &FileRange, offset: u64, bytes: u64, layer: usize) {
        let Some(bytes) = usize::try_from(bytes)
            .ok()
            .filter(|bytes| *bytes <= Self::ROOM - self.used)
        else {
            return;
        };
        let end = self.used + bytes;
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        if input.read(&mut self.data[self.used..end], offset).is_ok() {
            self.pieces.push(Piece {
                layer,
                offset,
                at: self.used,
                bytes,
            });
            self.used = end;
        }
    }
}

/// A piece of one ZFile in memory: what was read last, or ahead.
#[derive(Default)]
struct Stored {
    ahead: Option<(Arc<ReadAhead>, usize)>,
    data: Vec<u8>,
    /// Byte of the ZFile that the first byte of `data` is.
    offset: u64,
    /// Bytes of `data` that count.
    bytes: usize,
}

impl Stored {
    /// The `bytes` bytes from byte `offset` on, which are read from `input`, always the same one, unless they
    /// are there.
    fn fetch(&mut self, input: &FileRange, offset: u64, bytes: usize) -> Result<&[u8]> {
        let inside = |start: u64, length: usize| {
            offset
                .checked_sub(start)
                .and_then(|skip| usize::try_from(skip).ok())
                .filter(|skip| skip.checked_add(bytes).is_some_and(|end| end <= length))
        };
        if let Some((ahead, number)) = &self.ahead {
            let piece = &ahead.pieces[*number];
            if let Some(skip) = inside(piece.offset, piece.bytes) {
                return Ok(&ahead.data[piece.at + skip..][..bytes]);
            }
        }
        if let Some(skip) = inside(self.offset, self.bytes) {
            return Ok(&self.data[skip..skip + bytes]);
        }
        // Nothing is there if this fails.
        self.bytes = 0;
        if self.data.len() < bytes {
            self.data.resize(bytes, 0);
        }
        input.read(&mut self.data[..bytes], offset)?;
        (self.offset, self.bytes) = (offset, bytes);
        Ok(&self.data[..bytes])
    }
}
