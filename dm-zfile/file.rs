// SPDX-License-Identifier: GPL-2.0

//! The ZFile: what the constructor reads from the device and keeps.
//!
//! `rust/image` checks every byte of header, trailer and jump table. They are read once; what
//! remains in memory is 4.5 bytes for each block.

use super::{
    codec::crc32c,
    device_mapper::{
        dm_err,
        module_param,
        Constructor,
        CtrContext,
        CtrError,
        TargetDevice,
        SECTOR_SHIFT,
        SECTOR_SIZE, //
    },
    image::{
        self,
        jump_table::{
            JumpTable,
            JumpTableReader,
            JUMP_GROUP, //
        },
        zfile::{
            trailer_position,
            Geometry,
            Header,
            HEADER_BYTES, //
        },
    },
    lower_read::{
        gfp_table,
        read_metadata,
        Extent, //
    },
    module_parameters,
    Zfile, //
};
use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// Bytes of the jump table that are read together, whole entries.
const BATCH_BYTES: u64 = 4 << 20;

/// Bytes that a request is cut into, if there are not too many compressed bytes in it.
const PIECE_BYTES: u64 = 128 << 10;

/// Compressed bytes that a piece may have. The blocks of the device around them fit into 128 KiB.
const SPAN_BYTES: usize = 120 << 10;

/// The jump table, in memory that the target owns.
type Table = JumpTable<KVVec<u32>, KVVec<u64>>;

/// A ZFile on a device.
///
/// # Invariants
///
/// - The extents in `table` are those of the file on the device, and the file was inside the device.
/// - `piece_sectors` is a power of two.
pub(super) struct File {
    device: TargetDevice,
    file_bytes: u64,
    device_sectors: u64,
    geometry: Geometry,
    table: Table,
    compressed_bytes: u64,
    piece_sectors: u64,
    largest_block: usize,
}

impl File {
    /// Reads the file of `file_bytes` bytes that begins with byte `start` of the device at `path`.
    pub(super) fn open(
        ctx: &mut Constructor<'_>,
        path: &CStr,
        start: u64,
        file_bytes: u64,
    ) -> Result<Self, CtrError> {
        let device = ctx.device(path).context(c"Cannot open device")?;
        let size = ctx.device_sectors(&device).context(c"Cannot use device")?;
        let sectors = start
            .checked_add(file_bytes)
            .map(|end| end.div_ceil(SECTOR_SIZE.into()))
            .filter(|sectors| *sectors <= size)
            .ok_or(CtrError::invalid(c"Length is beyond the end of the device"))?;
        let block_sectors = ctx
            .logical_block_size(&device)
            .context(c"Cannot use device")?
            >> SECTOR_SHIFT;
        let source = Source {
            ctx,
            device: &device,
            start,
            file_bytes,
        };
        let geometry = source.geometry()?;
        let (table, data_end) = source.jump_table(&geometry)?;
        let piece_sectors = choose_piece_sectors(&geometry, &table);
        let largest_block = table.lengths(0, geometry.blocks().saturating_sub(1));
        let largest_block = largest_block.unwrap_or(&[]).iter().max().copied();
        // INVARIANT: The reader of the jump table checks that all blocks come before it.
        Ok(Self {
            file_bytes,
            // Whole blocks of the device, as device mapper wants it.
            device_sectors: sectors
                .next_multiple_of(block_sectors.max(1).into())
                .min(size),
            geometry,
            table,
            compressed_bytes: data_end.saturating_sub(HEADER_BYTES as u64),
            piece_sectors,
            largest_block: largest_block.unwrap_or(0) as usize,
            device,
        })
    }

    /// The device that holds the file.
    pub(super) fn device(&self) -> &TargetDevice {
        &self.device
    }

    /// Exact length of the file in bytes.
    pub(super) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Sectors from the start of the device to the end of the file.
    pub(super) fn device_sectors(&self) -> u64 {
        self.device_sectors
    }

    /// Bytes of all compressed blocks.
    pub(super) fn compressed_bytes(&self) -> u64 {
        self.compressed_bytes
    }

    /// Sizes, algorithm and checksums.
    #[inline]
    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Sectors of the target that are read together at most, a power of two.
    #[inline]
    pub(super) fn piece_sectors(&self) -> u64 {
        self.piece_sectors
    }

    /// Compressed bytes that a block has at most.
    pub(super) fn largest_block(&self) -> usize {
        self.largest_block
    }

    /// Where the compressed blocks from `first` to `last` are on the device.
    #[inline]
    pub(super) fn extent(&self, first: u64, last: u64) -> Option<Extent> {
        let (start, end) = self.table.span(first, last)?;
        Some(Extent {
            offset: start,
            len: (end - start) as usize,
        })
    }

    /// Lengths of the compressed blocks from `first` to `last`.
    #[inline]
    pub(super) fn lengths(&self, first: u64, last: u64) -> Option<&[u32]> {
        self.table.lengths(first, last)
    }
}

/// Chooses the size of pieces in sectors: a power of two, so that the compressed blocks of none take
/// more than [`SPAN_BYTES`] bytes. A single block never does.
fn choose_piece_sectors(geometry: &Geometry, table: &Table) -> u64 {
    let least = u64::from(geometry.block_bytes().max(SECTOR_SIZE));
    let mut bytes = PIECE_BYTES;
    loop {
        let blocks = bytes >> geometry.block_bytes().trailing_zeros();
        let mut max_span = 0;
        let mut first = 0;
        while first < geometry.blocks() {
            let next = first.saturating_add(blocks).min(geometry.blocks());
            if let Some((start, end)) = table.span(first, next - 1) {
                max_span = max_span.max((end - start) as usize);
            }
            first = next;
        }
        if max_span <= SPAN_BYTES || bytes <= least {
            return bytes >> SECTOR_SHIFT;
        }
        bytes /= 2;
    }
}

/// A file that is being read by the constructor.
struct Source<'a, 'b> {
    ctx: &'a Constructor<'b>,
    device: &'a TargetDevice,
    /// First byte of the file on the device.
    start: u64,
    file_bytes: u64,
}

impl Source<'_, '_> {
    /// Logs what is wrong and gives the error for device mapper.
    fn refuse(&self, error: image::error::Error) -> CtrError {
        dm_err!(
            Zfile,
            "{}: {} at byte {}",
            self.device.name(),
            error.reason().as_str(),
            error.offset()
        );
        CtrError::invalid(error.reason().as_cstr())
    }

    /// Reads from byte `offset` of the file on.
    fn read(&self, offset: u64, buf: &mut [u8], message: &'static CStr) -> Result<(), CtrError> {
        // No overflow: the file is inside the device.
        read_metadata(self.ctx, self.device, self.start + offset, buf)
            .inspect_err(|errno| {
                dm_err!(
                    Zfile,
                    "{}: cannot read {} bytes at byte {offset} ({errno:?})",
                    self.device.name(),
                    buf.len()
                );
            })
            .context(message)
    }

    /// Reads header and, unless that is final, trailer.
    fn geometry(&self) -> Result<Geometry, CtrError> {
        let refuse = |error| self.refuse(error);
        let mut block = [0; HEADER_BYTES];
        if self.file_bytes < HEADER_BYTES as u64 {
            trailer_position(self.file_bytes).map_err(refuse)?;
        }
        self.read(0, &mut block, c"Cannot read header")?;
        match Header::parse(&block, self.file_bytes, crc32c).map_err(refuse)? {
            Header::Final(geometry) => Ok(geometry),
            Header::SeeTrailer => {
                let position = trailer_position(self.file_bytes).map_err(refuse)?;
                self.read(position, &mut block, c"Cannot read trailer")?;
                Geometry::parse_trailer(&block, self.file_bytes, crc32c).map_err(refuse)
            }
        }
    }

    /// Reads the jump table, and returns also where the last block ends.
    fn jump_table(&self, geometry: &Geometry) -> Result<(Table, u64), CtrError> {
        let limit = module_param(&module_parameters::max_blocks);
        if geometry.blocks() > limit {
            dm_err!(
                Zfile,
                "{}: the file has {} blocks, max_blocks allows {limit}",
                self.device.name(),
                geometry.blocks()
            );
            return Err(CtrError::new(E2BIG, c"Too many blocks"));
        }
        let blocks = usize::try_from(geometry.blocks()).context(c"Too many blocks")?;
        let mut lengths = KVVec::with_capacity(blocks, gfp_table())?;
        let mut bases = KVVec::with_capacity(blocks.div_ceil(JUMP_GROUP), gfp_table())?;

        let total = geometry.index_bytes();
        let mut buf = KVVec::from_elem(0u8, total.min(BATCH_BYTES) as usize, gfp_table())?;
        let mut reader = JumpTableReader::new(geometry, crc32c);
        let mut done = 0;
        while done < total {
            let len = (total - done).min(BATCH_BYTES) as usize;
            let part = buf.get_mut(..len).unwrap_or(&mut []);
            // No overflow: the table is inside the file.
            self.read(
                geometry.index_offset() + done,
                part,
                c"Cannot read jump table",
            )?;
            reader
                .feed(part, |extent| {
                    if lengths.len() % JUMP_GROUP == 0 {
                        bases.push(self.start + extent.offset, gfp_table())?;
                    }
                    lengths.push(extent.bytes, gfp_table())?;
                    Ok(())
                })
                .map_err(|error| match error {
                    TableError::Image(error) => self.refuse(error),
                    TableError::Memory => AllocError.into(),
                })?;
            done += len as u64;
        }
        reader.finish().map_err(|error| self.refuse(error))?;
        let table =
            JumpTable::new(lengths, bases).ok_or(CtrError::invalid(c"Cannot build jump table"))?;
        Ok((table, reader.data_end()))
    }
}

/// Why a jump table cannot be taken over.
enum TableError {
    Image(image::error::Error),
    Memory,
}

impl From<image::error::Error> for TableError {
    fn from(error: image::error::Error) -> Self {
        Self::Image(error)
    }
}

impl From<AllocError> for TableError {
    fn from(_: AllocError) -> Self {
        Self::Memory
    }
}
