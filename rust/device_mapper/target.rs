// SPDX-License-Identifier: GPL-2.0

//! The interface that a target implements.

use super::{
    args::Args,
    bindings,
    bio::{
        Bio,
        DeferredBio,
        EndIo,
        EndedBio,
        Mapped, //
    },
    constructor::Constructor,
    dax::DaxRange,
    device::{
        DeviceIterator,
        Stop, //
    },
    error::CtrError,
    limits::QueueLimits,
    per_bio::BioOwner,
    status::{
        StatusType,
        StatusWriter, //
    },
};
use core::{
    fmt,
    ops::ControlFlow, //
};
use kernel::{
    error::VTABLE_DEFAULT_ERROR,
    prelude::*, //
};

/// What a target declares to device mapper once and for all: `DM_TARGET_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u32);

impl Features {
    /// Nothing special.
    pub const NONE: Self = Self(0);
    /// The target accepts bios that must not block, and does not block for them.
    pub const NOWAIT: Self = Self(bindings::DM_TARGET_NOWAIT);

    pub(super) const fn into_raw(self) -> u64 {
        self.0 as u64
    }
}

/// A type of device-mapper target.
///
/// A value of the type is one target in a table. It is constructed from the table line by
/// [`Target::new`] and dropped when the table is destroyed, after the last bio has ended. In
/// between all functions may be called at the same time from several threads.
///
/// Functions that are not implemented leave the callback out, as a null pointer does in C.
///
/// See the [module documentation](super) for an example.
#[vtable]
pub trait Target: Sized + Send + Sync + 'static {
    /// The name by which tables refer to the target.
    const NAME: &'static CStr;

    /// The version: major, minor and patch level.
    const VERSION: [u32; 3];

    /// What the target supports.
    const FEATURES: Features = Features::NONE;

    /// Data which the target keeps with each bio.
    ///
    /// It is set to its default before the bio is mapped, and dropped when the bio has ended.
    /// The unit type takes no memory and no time. The alignment must not be larger than that of
    /// a pointer.
    type PerBio: Default + Send + 'static;

    /// Constructs a target from the arguments of a table line.
    ///
    /// Runs in process context, and may sleep and read from devices.
    fn new(ctx: &mut Constructor<'_>, args: Args<'_>) -> impl PinInit<Self, CtrError>;

    /// Decides what becomes of a bio.
    ///
    /// Runs in the context of whoever submits the bio. It should be quick and must not allocate
    /// memory in ways that wait for I/O.
    fn map<'a>(&self, bio: Bio<'a, Self>) -> Mapped<'a>;

    /// Takes a bio that was passed on by [`Bio::queue`] or [`DeferredBio::queue`].
    ///
    /// Runs in a worker thread of this target, several of them at a time, and may sleep.
    fn process(&self, _bio: DeferredBio<Self>) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Looks at a bio that has ended, and may have it mapped again.
    ///
    /// Called for each bio but those given back by [`Bio::kill`] and [`Bio::requeue`]. Usually
    /// runs in interrupt context.
    fn end_io(&self, _bio: &mut EndedBio<'_, Self>) -> EndIo {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called before the device is suspended, while bios are still being mapped.
    fn presuspend(&self) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called if suspending failed after [`Target::presuspend`].
    fn presuspend_undo(&self) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called when the device is suspended and no bio is in flight.
    fn postsuspend(&self) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called before the device, new or suspended, starts to work; can refuse that.
    fn preresume(&self) -> Result {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called when the device, new or suspended, has started to work.
    fn resume(&self) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Writes the status of the target.
    fn status(&self, _kind: StatusType, _out: &mut StatusWriter<'_>) -> fmt::Result {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Acts on a message from `dmsetup message`, and may reply.
    ///
    /// User space repeats a message when the reply did not fit, so replies should be short.
    fn message(&self, _args: Args<'_>, _reply: &mut StatusWriter<'_>) -> Result {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Shows device mapper every area of every device that the target uses.
    ///
    /// Device mapper learns from it the limits of the devices, and refuses a table that reaches
    /// beyond the end of one. A target that opens devices should have this function.
    fn iterate_devices(&self, _devices: &mut DeviceIterator<'_>) -> ControlFlow<Stop> {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Says where in memory the `sectors` from `sector` of the target on are, whole pages both.
    ///
    /// The answer is about the first of these pages, and may end before or after the last. A table has
    /// direct access where all of its targets have, and all devices that they show; then file systems
    /// read and write the memory, and neither [`Target::map`] nor a suspended device keeps them from
    /// it. So a target that is not to be written must be in a read-only table.
    ///
    /// Called while `srcu` and perhaps a lock of a file system are held, whenever a program touches
    /// a page for the first time: it must be quick. Where it fails, the program gets a signal. A page
    /// must not be the answer for two sectors, see [`claims`](super::claims).
    fn direct_access(&self, _sector: u64, _sectors: u64) -> Result<DaxRange<'_>> {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Adjusts the limits which were stacked from those of the devices.
    fn io_hints(&self, _limits: &mut QueueLimits) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }
}

impl<T: Target> BioOwner for T {
    type PerBio = <T as Target>::PerBio;

    const HAS_WORK: bool = T::HAS_PROCESS;
}
