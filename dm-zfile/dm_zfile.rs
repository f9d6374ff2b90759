// SPDX-License-Identifier: GPL-2.0

//! dm-zfile: a read-only block device over a compressed ZFile.
//!
//! The constructor reads and checks header, trailer and jump table ([`file`]). A read is cut into
//! pieces whose compressed blocks lie next to each other in the lower device; each piece is one
//! lower read, from which the blocks are decompressed into the pages of the request ([`read`]).
//! A block of which a request wants only a part stays in a small cache ([`cache`]).
//! `docs/dm-zfile.rst` describes the target for its users.

#![deny(unsafe_code)]

use cache::Cache;
use core::{
    fmt::{
        self,
        Write, //
    },
    ops::ControlFlow, //
};
use counters::Counters;
use device_mapper::{
    dm_err,
    dm_warn,
    Args,
    Bio,
    BlkStatus,
    Constructor,
    CtrContext,
    CtrError,
    DeviceIterator,
    Mapped,
    Op,
    QueueLimits,
    StatusType,
    StatusWriter,
    Stop,
    Target,
    SECTOR_SHIFT,
    SECTOR_SIZE, //
};
use file::File;
use kernel::prelude::*;
use lower_read::{
    read_lower,
    Extent,
    FinishedRead,
    LowerRead,
    LowerReader,
    LowerReads,
    Piece, //
};
use options::Options;
use read::{
    Range,
    Workspaces, //
};

#[allow(unsafe_code)]
#[path = "../rust/bindings/mod.rs"]
mod bindings;
mod cache;
#[allow(unsafe_code)]
#[path = "../rust/codec/mod.rs"]
pub mod codec;
mod counters;
#[allow(unsafe_code)]
#[path = "../rust/device_mapper/mod.rs"]
pub mod device_mapper;
mod file;
#[path = "../rust/image/mod.rs"]
pub mod image;
#[allow(unsafe_code)]
#[path = "../rust/lower_read/mod.rs"]
pub mod lower_read;
mod options;
mod pool;
mod read;

/// The target: a ZFile, which never changes, and what is needed to read it.
struct Zfile {
    reads: LowerReads,
    file: File,
    options: Options,
    cache: Cache,
    workspaces: Workspaces,
    counters: Counters,
}

impl Zfile {
    fn construct(ctx: &mut Constructor<'_>, mut args: Args<'_>) -> Result<Self, CtrError> {
        ctx.require_read_only()?;
        let path = args.next(c"Missing device")?;
        let file_bytes = args.number::<u64>(c"Invalid length")?;
        let options = Options::parse(&mut args)?;
        args.finish()?;
        let file = File::open(ctx, path, options.offset, file_bytes)?;

        let geometry = file.geometry();
        let sectors = geometry.original_bytes().div_ceil(SECTOR_SIZE.into());
        if ctx.target_len() > sectors {
            dm_err!(
                Self,
                "the table has {} sectors, the file {sectors}",
                ctx.target_len()
            );
            return Err(CtrError::invalid(c"Target is longer than the file"));
        }
        if options.ignore_crc && geometry.has_block_crc() {
            dm_warn!(
                Self,
                "{}: CRCs are ignored, damage may go unnoticed",
                file.device().name()
            );
        }
        let reads = LowerReads::new(ctx, file.device(), file.largest_block())
            .context(c"Cannot allocate buffers")?;
        let block_bytes = geometry.block_bytes();
        // A block of a sector or less is never read in part.
        let cached = if block_bytes > SECTOR_SIZE {
            options.cache_blocks
        } else {
            0
        };
        Ok(Self {
            reads,
            cache: Cache::new(cached, block_bytes as usize)
                .context(c"Cannot allocate the block cache")?,
            workspaces: Workspaces::new(geometry.algorithm())
                .context(c"Cannot allocate decompressors")?,
            counters: Counters::new().context(c"Cannot allocate counters")?,
            file,
            options,
        })
    }

    /// Cuts `bio` at the next multiple of `sectors`, a power of two. Returns whether that is before
    /// its end.
    #[inline]
    fn shorten(bio: &mut Bio<'_, Self>, sectors: u64) -> Result<bool> {
        let left = sectors - (bio.sector() & (sectors - 1));
        if u64::from(bio.sectors()) <= left {
            return Ok(false);
        }
        // This fits 32 bits as the length of the bio does.
        bio.accept_partial(left as u32)?;
        Ok(true)
    }

    /// Where the blocks of `range` are in the lower device.
    #[inline]
    fn extent(&self, range: &Range) -> Option<Extent> {
        self.file.extent(range.first(), range.last())
    }

    fn write_table(&self, out: &mut StatusWriter<'_>) -> fmt::Result {
        write!(
            out,
            "{} {}",
            self.file.device().name(),
            self.file.file_bytes()
        )?;
        self.options.write(out)
    }
}

#[vtable]
impl Target for Zfile {
    const NAME: &'static CStr = c"zfile";
    const VERSION: [u32; 3] = [1, 1, 0];

    type PerBio = LowerRead;

    fn new(ctx: &mut Constructor<'_>, args: Args<'_>) -> impl PinInit<Self, CtrError> {
        Self::construct(ctx, args)
    }

    #[inline]
    fn map<'a>(&self, mut bio: Bio<'a, Self>) -> Mapped<'a> {
        if bio.op() != Op::Read {
            return bio.kill();
        }
        // The pieces of a request that is larger than one come one after the other.
        let piece = match Self::shorten(&mut bio, self.file.piece_sectors()) {
            Ok(true) => Piece::Inner,
            Ok(false) => Piece::Last,
            Err(_) => return bio.kill(),
        };
        let Some(range) = Range::of(&bio, self.file.geometry()) else {
            return bio.kill();
        };
        if self.read_cached(&bio, &range) {
            return bio.end(BlkStatus::OK);
        }
        let Some(extent) = self.extent(&range) else {
            return bio.kill();
        };
        read_lower(bio, extent, piece, |bio| {
            let block = self.file.geometry().block_bytes().max(SECTOR_SIZE);
            Self::shorten(bio, u64::from(block >> SECTOR_SHIFT)).ok()?;
            self.extent(&Range::of(bio, self.file.geometry())?)
        })
    }

    fn status(&self, kind: StatusType, out: &mut StatusWriter<'_>) -> fmt::Result {
        let geometry = self.file.geometry();
        match kind {
            StatusType::Info => {
                write!(
                    out,
                    "{} {} {} {} ",
                    geometry.algorithm().as_str(),
                    geometry.block_bytes(),
                    geometry.blocks(),
                    self.file.compressed_bytes()
                )?;
                self.counters.write(out)
            }
            StatusType::Table => self.write_table(out),
            StatusType::Ima => write!(
                out,
                ",device={},bytes={},algorithm={},block_bytes={},original_bytes={},ignore_crc={},offset={};",
                self.file.device().name(),
                self.file.file_bytes(),
                geometry.algorithm().as_str(),
                geometry.block_bytes(),
                geometry.original_bytes(),
                if self.options.ignore_crc { 'y' } else { 'n' },
                self.options.offset
            ),
        }
    }

    fn message(&self, mut args: Args<'_>, reply: &mut StatusWriter<'_>) -> Result {
        match args.next(c"Missing message")?.to_bytes() {
            b"stats" => {
                args.finish()?;
                self.counters.describe(reply)?;
                Ok(())
            }
            _ => Err(EINVAL),
        }
    }

    fn iterate_devices(&self, devices: &mut DeviceIterator<'_>) -> ControlFlow<Stop> {
        devices.visit(self.file.device(), 0, self.file.device_sectors())
    }

    fn io_hints(&self, limits: &mut QueueLimits) {
        // The lower device is only read through buffers, so its block size does not matter.
        let block = self.file.geometry().block_bytes().max(SECTOR_SIZE);
        limits.set_logical_block_size(SECTOR_SIZE);
        limits.set_physical_block_size(SECTOR_SIZE);
        limits.set_io_min(block);
        limits.set_io_opt((self.file.piece_sectors() << SECTOR_SHIFT) as u32);
    }
}

impl LowerReader for Zfile {
    fn lower_reads(&self) -> &LowerReads {
        &self.reads
    }

    fn lower_read_done(&self, read: &FinishedRead<'_, Self>) -> BlkStatus {
        self.finish(read)
    }
}

device_mapper::module_dm! {
    target: Zfile,
    name: "dm_zfile",
    authors: ["The dm-overlaybd developers"],
    description: "device-mapper target for compressed ZFiles",
    license: "GPL",
    params: {
        max_blocks: u64 {
            default: 134_217_728,
            description: "blocks that a ZFile may have",
        },
        kernel_lz4: u8 {
            default: 0,
            description: "1: new tables decompress lz4 with the kernel's decoder, not the module's",
        },
    },
}
