// SPDX-License-Identifier: GPL-2.0

//! dm-overlaybd: a read-only block device over a stack of OverlayBD layers.
//!
//! The constructor loads the indexes of all layers and merges them ([`stack`]). Mapping a bio is
//! then one lookup: it is cut at the end of the segment that it starts in and sent to the layer
//! that holds the data, or filled with zeroes where none does. `docs/dm-overlaybd.rst` describes
//! the target for its users.

#![deny(unsafe_code)]

use core::{
    fmt::{
        self,
        Write, //
    },
    ops::ControlFlow, //
};
use device_mapper::{
    dm_err,
    module_param,
    Args,
    Bio,
    Constructor,
    CtrError,
    DaxRange,
    DeviceIterator,
    Features,
    Mapped,
    Op,
    StatusType,
    StatusWriter,
    Stop,
    Target, //
};
use image::index::Source;
use kernel::prelude::*;
use stack::Stack;

#[allow(unsafe_code)]
#[path = "../rust/bindings/mod.rs"]
mod bindings;
#[allow(unsafe_code)]
#[path = "../rust/codec/mod.rs"]
pub mod codec;
mod dax;
#[allow(unsafe_code)]
#[path = "../rust/device_mapper/mod.rs"]
pub mod device_mapper;
#[path = "../rust/image/mod.rs"]
pub mod image;
#[allow(unsafe_code)]
#[path = "../rust/lower_read/mod.rs"]
pub mod lower_read;
mod merged;
mod stack;

/// Sectors for which segments are joined when memory is asked for: those of a huge page.
const HUGE_SECTORS: u64 = 4096;

/// The target: a merged stack, which never changes.
struct Overlaybd {
    stack: Stack,
}

impl Overlaybd {
    fn construct(ctx: &mut Constructor<'_>, args: Args<'_>) -> Result<Self, CtrError> {
        ctx.require_read_only()?;
        let limit = module_param(&module_parameters::max_segments);
        let stack = Stack::load(ctx, args, limit)?;
        if ctx.target_len() > stack.virtual_sectors() {
            dm_err!(
                Self,
                "the table has {} sectors, the stack {}",
                ctx.target_len(),
                stack.virtual_sectors()
            );
            return Err(CtrError::invalid(c"Target is longer than the virtual size"));
        }
        Ok(Self { stack })
    }

    /// Answers the message `lookup <sector>`.
    fn lookup(&self, mut args: Args<'_>, reply: &mut StatusWriter<'_>) -> Result {
        let sector = args.number::<u64>(c"Invalid sector")?;
        args.finish()?;
        if sector >= self.stack.virtual_sectors() {
            return Err(ERANGE);
        }
        let mapping = self.stack.index().lookup(sector);
        match mapping.source() {
            Source::Data { layer, stored } => {
                let device = &self.stack.layer(layer).ok_or(EINVAL)?.device;
                let run = mapping.sectors();
                write!(reply, "{layer} {} {stored} {run}", device.name())?;
            }
            Source::Zero { .. } => reply.write_str("zero")?,
            Source::Hole => reply.write_str("hole")?,
        }
        Ok(())
    }
}

#[vtable]
impl Target for Overlaybd {
    const NAME: &'static CStr = c"overlaybd";
    const VERSION: [u32; 3] = [1, 1, 0];
    const FEATURES: Features = Features::NOWAIT;

    type PerBio = ();

    fn new(ctx: &mut Constructor<'_>, args: Args<'_>) -> impl PinInit<Self, CtrError> {
        Self::construct(ctx, args)
    }

    #[inline]
    fn map<'a>(&self, mut bio: Bio<'a, Self>) -> Mapped<'a> {
        if bio.op() != Op::Read {
            return bio.kill();
        }
        let sector = bio.sector();
        let mapping = self.stack.index().lookup(sector);
        let run = mapping.sectors();
        // A run that is shorter than the bio fits 32 bits as the length of a bio does.
        if run < u64::from(bio.sectors()) && bio.accept_partial(run as u32).is_err() {
            return bio.kill();
        }
        match mapping.source() {
            Source::Data { layer, stored } => match self.stack.layer(layer) {
                Some(layer) => bio.remap(&layer.device, stored),
                None => bio.kill(),
            },
            Source::Zero { .. } | Source::Hole => bio.end_zeroed(),
        }
    }

    fn status(&self, kind: StatusType, out: &mut StatusWriter<'_>) -> fmt::Result {
        let layers = self.stack.layers();
        match kind {
            StatusType::Info => {
                let index = self.stack.index();
                let mapped = layers.iter().map(|layer| layer.owned).sum::<u64>();
                write!(
                    out,
                    "{} {} {mapped} {}",
                    layers.len(),
                    index.segments().len(),
                    index.bytes()
                )?;
                for layer in layers {
                    write!(out, " {}", layer.owned)?;
                }
                if self.stack.memory().is_some() {
                    out.write_str(" dax")?;
                }
            }
            StatusType::Table => {
                write!(out, "{}", layers.len())?;
                for layer in layers {
                    write!(out, " {} {}", layer.device.name(), layer.blob_bytes)?;
                }
                if let Some(memory) = self.stack.memory() {
                    match memory.zeros() {
                        Some(zeros) => write!(out, " 3 dax zeros {}", zeros.name())?,
                        None => out.write_str(" 1 dax")?,
                    }
                }
            }
            // What is said of each of 255 layers would not fit.
            StatusType::Ima => {
                write!(
                    out,
                    ",layers={},virtual_sectors={},layers_digest=blake2s-256:{}",
                    layers.len(),
                    self.stack.virtual_sectors(),
                    self.stack.digest()
                )?;
                if let Some(memory) = self.stack.memory() {
                    let zeros = memory.zeros().map_or("-", |device| device.name());
                    write!(out, ",dax=y,zeros={zeros}")?;
                }
                out.write_str(";")?;
            }
        }
        Ok(())
    }

    fn message(&self, mut args: Args<'_>, reply: &mut StatusWriter<'_>) -> Result {
        match args.next(c"Missing message")?.to_bytes() {
            b"lookup" => self.lookup(args, reply),
            _ => Err(EINVAL),
        }
    }

    fn iterate_devices(&self, devices: &mut DeviceIterator<'_>) -> ControlFlow<Stop> {
        let memory = self.stack.memory();
        for layer in self.stack.layers() {
            let area = self.stack.area(layer);
            match memory {
                Some(_) => devices.visit(&layer.device, 0, area)?,
                None => devices.visit_without_dax(&layer.device, 0, area)?,
            }
        }
        match memory.and_then(|memory| memory.zeros()) {
            Some(zeros) => devices.visit(zeros, 0, devices.target_len()),
            None => ControlFlow::Continue(()),
        }
    }

    #[inline]
    fn direct_access(&self, sector: u64, sectors: u64) -> Result<DaxRange<'_>> {
        let memory = self.stack.memory().ok_or(ENXIO)?;
        let wanted = sectors.min(HUGE_SECTORS);
        memory.range(self.stack.index().run(sector, wanted))
    }
}

device_mapper::module_dm! {
    target: Overlaybd,
    name: "dm_overlaybd",
    authors: ["The dm-overlaybd developers"],
    description: "device-mapper target for a stack of OverlayBD layers",
    license: "GPL",
    params: {
        max_segments: u64 {
            default: 128_000_000,
            description: "index entries that a stack may have, before and after the merge",
        },
    },
}
