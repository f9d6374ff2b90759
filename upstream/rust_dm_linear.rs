// SPDX-License-Identifier: GPL-2.0

//! Rust device-mapper target sample: the target "linear" again.
//!
//! The table line is `<start> <sectors> rust-linear <device> <first sector>`.

use core::{
    fmt::{
        self,
        Write, //
    },
    ops::ControlFlow, //
};
use kernel::{
    device_mapper::{
        module_dm,
        Args,
        Bio,
        Constructor,
        CtrContext,
        CtrError,
        DeviceIterator,
        Features,
        Mapped,
        StatusType,
        StatusWriter,
        Stop,
        Target,
        TargetDevice, //
    },
    prelude::*, //
};

module_dm! {
    target: Linear,
    name: "rust_dm_linear",
    authors: ["Rust for Linux Contributors"],
    description: "Rust device-mapper target sample",
    license: "GPL",
}

/// A part of a device.
struct Linear {
    device: TargetDevice,
    /// The first sector of the part.
    start: u64,
}

impl Linear {
    fn parse(ctx: &mut Constructor<'_>, mut args: Args<'_>) -> Result<Self, CtrError> {
        let path = args.next(c"Missing device")?;
        let start = args.number(c"Invalid first sector")?;
        args.finish()?;
        let device = ctx.device(path).context(c"Device lookup failed")?;

        // One flush for one device; without this the device would never see any.
        ctx.set_num_flush_bios(1);
        ctx.set_num_discard_bios(1);
        ctx.set_num_secure_erase_bios(1);
        ctx.set_num_write_zeroes_bios(1);
        Ok(Self { device, start })
    }
}

#[vtable]
impl Target for Linear {
    const NAME: &'static CStr = c"rust-linear";
    const VERSION: [u32; 3] = [1, 0, 0];
    // Nothing here ever waits.
    const FEATURES: Features = Features::NOWAIT;
    // Nothing has to be remembered while a bio is in flight.
    type PerBio = ();

    fn new(ctx: &mut Constructor<'_>, args: Args<'_>) -> impl PinInit<Self, CtrError> {
        Self::parse(ctx, args)
    }

    fn map<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a> {
        let sector = self.start.wrapping_add(bio.sector());
        bio.remap(&self.device, sector)
    }

    fn status(&self, kind: StatusType, out: &mut StatusWriter<'_>) -> fmt::Result {
        let name = self.device.name();
        match kind {
            // There is nothing to say.
            StatusType::Info => Ok(()),
            // What `parse()` understands.
            StatusType::Table => write!(out, "{name} {}", self.start),
            StatusType::Ima => write!(out, ",device_name={name},start={};", self.start),
        }
    }

    fn iterate_devices(&self, devices: &mut DeviceIterator<'_>) -> ControlFlow<Stop> {
        // Device mapper refuses the table if this reaches beyond the end of the device.
        let len = devices.target_len();
        devices.visit(&self.device, self.start, len)
    }
}
