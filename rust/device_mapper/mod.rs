// SPDX-License-Identifier: GPL-2.0

//! Device-mapper targets.
//!
//! A mapped device is described by a table, whose lines each give a range of sectors to a
//! *target*. What a target does with the bios for its range is up to its type, and types come
//! from modules. These abstractions let a module implement one in safe code.
//!
//! C header: [`include/linux/device-mapper.h`](srctree/include/linux/device-mapper.h)
//!
//! # Overview
//!
//! - A type of target implements [`Target`]. [`Target::new`] is the constructor: it gets the
//!   words of the table line as [`Args`] and a [`Constructor`], by which it opens devices, reads
//!   from them and tells device mapper what it needs. The destructor is [`Drop`].
//! - [`Target::map`] gets each [`Bio`] and has to return a [`Mapped`], which only comes from
//!   consuming that bio: sending it to a device, ending it, giving it back, or keeping it as
//!   a [`DeferredBio`]. To forget a bio, or to end it twice, does not compile.
//! - Devices are named by a [`TargetDevice`]. They are closed when the target is gone; there is no
//!   reference to count.
//! - Errors of the constructor are a [`CtrError`]: an error number, and the static message that
//!   device mapper prints.
//! - [`Registration`] makes the type known for as long as it exists, and [`module_dm!`] is all that
//!   a module without other duties needs.
//!
//! The path of a bio that is remapped costs what it costs in C: neither locks nor reference counts
//! are involved, and what is not inlined is `bio_set_dev()` and, with per-bio data, a call of
//! `dm_per_bio_data()`.
//!
//! # Life of a target
//!
//! ```text
//! new() ---> preresume() -> resume() ---> map(), process(), end_io() ...
//!   |                  ^                        |
//!   |                  |                        v
//!   |                  +--- postsuspend() <- presuspend()
//!   v                             |
//! CtrError                        v
//!                               drop()
//! ```
//!
//! Between `new()` and `drop()` the target is shared: [`status`](Target::status) and
//! [`message`](Target::message) can be called at any time, also while bios are mapped. It is
//! dropped after the last bio has ended and all its worker functions have returned.
//!
//! # Units
//!
//! A sector is always 512 bytes. Positions and lengths of bios, devices and targets are in sectors
//! unless the name or the documentation says bytes. [`BioRef::sector`] counts from the beginning of
//! the target.
//!
//! # What is missing
//!
//! A target cannot have a bio mapped again that it has deferred, submit several lower bios for one
//! (except with bios of its own), change what an ioctl is passed on to (`prepare_ioctl`), report
//! zones, or make memory zero for a file system that writes to it (`dax_zero_page_range`). Devices are
//! opened in the constructor only.
//!
//! # Examples
//!
//! A target that shows a part of a device, like dm-linear. Its table line is
//! `<start> <sectors> part <device> <first sector>`.
//!
//! ```
//! use core::{fmt::{self, Write}, ops::ControlFlow};
//! use kernel::{device_mapper::*, prelude::*};
//!
//! struct Part {
//!     device: TargetDevice,
//!     start: u64,
//! }
//!
//! impl Part {
//!     fn parse(ctx: &mut Constructor<'_>, mut args: Args<'_>) -> Result<Self, CtrError> {
//!         let path = args.next(c"Missing device")?;
//!         let start = args.number(c"Invalid first sector")?;
//!         args.finish()?;
//!
//!         let device = ctx.device(path).context(c"Device lookup failed")?;
//!         // One flush for one device; without this the device would never see any.
//!         ctx.set_num_flush_bios(1);
//!         Ok(Self { device, start })
//!     }
//! }
//!
//! #[vtable]
//! impl Target for Part {
//!     const NAME: &'static CStr = c"part";
//!     const VERSION: [u32; 3] = [1, 0, 0];
//!     // Nothing here ever waits.
//!     const FEATURES: Features = Features::NOWAIT;
//!     // Nothing has to be remembered while a bio is in flight.
//!     type PerBio = ();
//!
//!     fn new(ctx: &mut Constructor<'_>, args: Args<'_>) -> impl PinInit<Self, CtrError> {
//!         Self::parse(ctx, args)
//!     }
//!
//!     fn map<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a> {
//!         let sector = self.start.wrapping_add(bio.sector());
//!         bio.remap(&self.device, sector)
//!     }
//!
//!     fn status(&self, kind: StatusType, out: &mut StatusWriter<'_>) -> fmt::Result {
//!         match kind {
//!             // There is nothing to say.
//!             StatusType::Info => Ok(()),
//!             // What `parse()` understands.
//!             StatusType::Table => write!(out, "{} {}", self.device.name(), self.start),
//!             StatusType::Ima => {
//!                 write!(out, ",device={},start={};", self.device.name(), self.start)
//!             }
//!         }
//!     }
//!
//!     fn iterate_devices(&self, devices: &mut DeviceIterator<'_>) -> ControlFlow<Stop> {
//!         // Device mapper refuses the table if this reaches beyond the end of the device.
//!         let len = devices.target_len();
//!         devices.visit(&self.device, self.start, len)
//!     }
//! }
//!
//! // A module has `module_dm!` do this.
//! static PART: TargetType<Part> = TargetType::new();
//! # // SAFETY: What is built into the kernel has a null pointer for a module.
//! # static THIS_MODULE: ThisModule = unsafe { ThisModule::from_ptr(core::ptr::null_mut()) };
//! let registered = Registration::new(&PART, &THIS_MODULE)?;
//! # drop(registered);
//! # Ok::<(), Error>(())
//! ```
//!
//! # Use outside of the kernel tree
//!
//! There are no library crates for modules that are built out of tree. So a target includes this
//! as a module of its own, and the bindings as another. Both must be at the root of the crate and be
//! named so:
//!
//! ```text
//! #![deny(unsafe_code)]
//!
//! #[allow(unsafe_code)]
//! #[path = "../rust/bindings/mod.rs"]
//! mod bindings;
//! #[allow(unsafe_code)]
//! #[path = "../rust/device_mapper/mod.rs"]
//! mod device_mapper;
//! ```

// Everything here would be public in the kernel crate, and a target uses only a part of it.
#![allow(dead_code, unreachable_pub, unused_imports, unused_macros)]

use crate::bindings;

mod args;
mod bio;
mod callbacks;
pub mod claims;
mod constructor;
mod dax;
mod device;
mod error;
mod instance;
mod limits;
pub mod log;
mod per_bio;
mod registration;
mod status;
mod target;

pub(crate) use self::per_bio::PerBioArea;
pub use self::{
    args::{
        parse_number,
        Args,
        RawArg, //
    },
    bio::{
        Bio,
        BioRef,
        BlkStatus,
        DeferredBio,
        EndIo,
        EndedBio,
        Mapped,
        Op,
        SECTOR_SHIFT,
        SECTOR_SIZE, //
    },
    constructor::Constructor,
    dax::{
        DaxDevice,
        DaxRange,
        PAGE_SECTORS, //
    },
    device::{
        DeviceIterator,
        Mode,
        Stop,
        TargetDevice, //
    },
    error::{
        CtrContext,
        CtrError, //
    },
    limits::QueueLimits,
    registration::{
        module_param,
        Registration,
        TargetType, //
    },
    status::{
        StatusType,
        StatusWriter, //
    },
    target::{
        Features,
        Target, //
    },
};
// Macros of the kernel crate are exported, those of another crate are not.
pub(crate) use self::{
    log::{
        dm_err,
        dm_err_limit,
        dm_warn, //
    },
    registration::module_dm,
};
