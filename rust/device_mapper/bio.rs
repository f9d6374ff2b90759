// SPDX-License-Identifier: GPL-2.0

//! Bios on their way through a target.
//!
//! Device mapper hands a target one bio at a time and wants to know what becomes of it. A
//! [`Bio`] can only be answered by being consumed, and every way to consume it yields the
//! [`Mapped`] that [`Target::map`](super::Target::map) has to return. So a bio is remapped, ended
//! or deferred exactly once, which the compiler checks:
//!
//! ```text
//!         map(Bio)
//!            |
//!            +-- remap(device, sector) ------------> lower device -> end_io()
//!            +-- end(status), end_zeroed() ------------------------> end_io()
//!            +-- kill(), requeue()
//!            +-- queue() ----> process(DeferredBio) --+
//!            +-- defer() ----> DeferredBio -----------+-- remap(), end()
//! ```

use super::{
    bindings,
    device::TargetDevice,
    instance::Instance,
    per_bio::{
        BioOwner,
        PerBioArea, //
    }, //
};
use core::{marker::PhantomData, mem::ManuallyDrop, ops::Deref, ptr::NonNull};
use kernel::prelude::*;

/// The size of a sector in bytes, as a power of two.
pub const SECTOR_SHIFT: u32 = bindings::SECTOR_SHIFT;

/// The size of a sector in bytes. All sectors are of this size, whatever the device.
pub const SECTOR_SIZE: u32 = bindings::SECTOR_SIZE;

/// What a bio asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read sectors, which includes read-ahead.
    Read,
    /// Write sectors. Also an empty bio for a flush.
    Write,
    /// Discard sectors.
    Discard,
    /// Erase sectors beyond recovery.
    SecureErase,
    /// Write zeroes without sending them as data.
    WriteZeroes,
    /// Another operation, as its `REQ_OP_*` number.
    Other(u32),
}

/// How a bio ended: a `blk_status_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkStatus(bindings::blk_status_t);

impl BlkStatus {
    /// Success.
    pub const OK: Self = Self(0);
    /// The medium is bad at this place.
    pub const MEDIUM: Self = Self(bindings::BLK_STS_MEDIUM);
    /// Any other error.
    pub const IOERR: Self = Self(bindings::BLK_STS_IOERR);

    /// Returns whether this is success.
    pub fn is_ok(self) -> bool {
        self == Self::OK
    }

    pub(crate) const fn from_raw(status: bindings::blk_status_t) -> Self {
        Self(status)
    }

    pub(super) const fn into_raw(self) -> bindings::blk_status_t {
        self.0
    }
}

/// A bio that a target of type `T` has in its hands, in whatever state.
///
/// # Invariants
///
/// `bio` is a valid clone that device mapper made for `ti`, whose `private` is an
/// `Instance<T>`. It belongs to the target: it was given to its `map` callback and has not been
/// ended or submitted. The per-bio data is initialised.
pub struct BioRef<T: BioOwner> {
    bio: NonNull<bindings::bio>,
    ti: NonNull<bindings::dm_target>,
    _type: PhantomData<T>,
}

impl<T: BioOwner> BioRef<T> {
    /// # Safety
    ///
    /// The arguments must fulfil the invariants of the type for as long as the result is used.
    #[inline]
    pub(crate) unsafe fn from_raw(
        bio: NonNull<bindings::bio>,
        ti: NonNull<bindings::dm_target>,
    ) -> Self {
        // INVARIANT: As required from the caller.
        Self {
            bio,
            ti,
            _type: PhantomData,
        }
    }

    #[inline]
    pub(crate) fn as_raw(&self) -> NonNull<bindings::bio> {
        self.bio
    }

    /// Wakes up those who wait for an event of the mapped device, like `dmsetup wait`.
    ///
    /// May sleep.
    pub fn raise_event(&self) {
        // SAFETY: The bio belongs to the target, so the table exists.
        unsafe { bindings::dm_table_event((*self.ti.as_ptr()).table) };
    }

    #[inline]
    pub(crate) fn ti(&self) -> NonNull<bindings::dm_target> {
        self.ti
    }

    #[inline]
    pub(super) fn instance(&self) -> &Instance<T> {
        // SAFETY: By the type invariant. The instance is not dropped before the bio is ended.
        unsafe { &*(*self.ti.as_ptr()).private.cast::<Instance<T>>() }
    }

    /// Returns the target that the bio was sent to.
    #[inline]
    pub fn target(&self) -> &T {
        &self.instance().target
    }

    #[inline]
    fn opf(&self) -> bindings::blk_opf_t {
        // SAFETY: The bio is valid by the type invariant.
        unsafe { (*self.bio.as_ptr()).bi_opf }
    }

    /// Returns what the bio asks for.
    #[inline]
    pub fn op(&self) -> Op {
        match self.opf() & bindings::REQ_OP_MASK {
            bindings::req_op_REQ_OP_READ => Op::Read,
            bindings::req_op_REQ_OP_WRITE => Op::Write,
            bindings::req_op_REQ_OP_DISCARD => Op::Discard,
            bindings::req_op_REQ_OP_SECURE_ERASE => Op::SecureErase,
            bindings::req_op_REQ_OP_WRITE_ZEROES => Op::WriteZeroes,
            op => Op::Other(op),
        }
    }

    /// Returns the first sector, counted from the beginning of the target.
    ///
    /// That is `dm_target_offset()`: the position of the target in the table is taken off. For a
    /// bio without data, see [`BioRef::sectors`], the value means nothing.
    #[inline]
    pub fn sector(&self) -> u64 {
        // SAFETY: Bio and target are valid by the type invariant.
        let (sector, begin) = unsafe {
            (
                (*self.bio.as_ptr()).bi_iter.bi_sector,
                (*self.ti.as_ptr()).begin,
            )
        };
        // An empty flush is sent to all targets with sector 0.
        sector.saturating_sub(begin)
    }

    /// Returns the length in bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        // SAFETY: The bio is valid by the type invariant.
        unsafe { (*self.bio.as_ptr()).bi_iter.bi_size }
    }

    /// Returns whether there is nothing to transfer, as for a flush.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the length in sectors.
    #[inline]
    pub fn sectors(&self) -> u32 {
        self.len() >> SECTOR_SHIFT
    }

    /// Fills the bio's data with zeroes.
    #[inline]
    pub fn zero_fill(&self) {
        if self.op() == Op::Read {
            // SAFETY: A bio to read has pages, which may be written until the bio is ended.
            unsafe { bindings::zero_fill_bio(self.bio.as_ptr()) };
        }
    }

    /// Ends the bio.
    ///
    /// # Safety
    ///
    /// The bio must not be used any more, through `self` or otherwise.
    #[inline]
    unsafe fn end(&self, status: BlkStatus) {
        // SAFETY: By the type invariant the bio belongs to the target, and the caller promises
        // that this is the last use.
        unsafe {
            (*self.bio.as_ptr()).bi_status = status.into_raw();
            bindings::bio_endio(self.bio.as_ptr());
        }
    }

    /// Points the bio at a device of this instance, or returns `false` if it is not one.
    #[inline]
    fn set_device(&mut self, device: &TargetDevice, sector: u64) -> bool {
        let Some(bdev) = device.bdev_of(self.instance().id) else {
            return false;
        };
        // SAFETY: The bio belongs to the target. The device is open while the instance exists,
        // and that is not dropped before the bio has ended.
        unsafe {
            bindings::bio_set_dev(self.bio.as_ptr(), bdev.as_ptr());
            (*self.bio.as_ptr()).bi_iter.bi_sector = sector;
        }
        true
    }
}

/// The answer to a bio, for [`Target::map`](super::Target::map) to return.
///
/// The lifetime is that of the one call it is made for, and is invariant. So the answer to one
/// bio cannot be given for another, not even for one that another thread is mapping.
#[must_use]
pub struct Mapped<'a> {
    ret: c_int,
    _call: PhantomData<fn(&'a ()) -> &'a ()>,
}

impl Mapped<'_> {
    #[inline]
    fn new(ret: u32) -> Self {
        Self {
            ret: ret as c_int,
            _call: PhantomData,
        }
    }

    #[inline]
    pub(super) fn into_raw(self) -> c_int {
        self.ret
    }
}

/// A bio to be mapped.
///
/// Dereferences to [`BioRef`] for everything that does not change what becomes of it.
pub struct Bio<'a, T: BioOwner> {
    bio: BioRef<T>,
    _call: PhantomData<fn(&'a ()) -> &'a ()>,
}

impl<T: BioOwner> Deref for Bio<'_, T> {
    type Target = BioRef<T>;

    #[inline]
    fn deref(&self) -> &BioRef<T> {
        &self.bio
    }
}

impl<'a, T: BioOwner> Bio<'a, T> {
    /// Creates the bio that the `map` callback got.
    #[inline]
    pub(super) fn new(bio: BioRef<T>) -> Self {
        Self {
            bio,
            _call: PhantomData,
        }
    }

    /// Returns the data that the target keeps with the bio.
    #[inline]
    pub fn per_bio(&mut self) -> &mut T::PerBio {
        // SAFETY: The invariant of `BioRef`; the data is borrowed as long as the bio is.
        unsafe { &mut *PerBioArea::<T>::data(self.bio.bio).as_ptr() }
    }

    /// Shortens the bio to its first `sectors` sectors. The rest comes in another bio.
    ///
    /// This is `dm_accept_partial_bio()`. To keep all sectors does nothing. `EINVAL` is returned
    /// for no sector or more sectors than the bio has, and for anything but reads and writes.
    #[inline]
    pub fn accept_partial(&mut self, sectors: u32) -> Result {
        let have = self.sectors();
        if sectors == have {
            return Ok(());
        }
        if sectors == 0 || sectors > have {
            return Err(EINVAL);
        }
        if !matches!(self.op(), Op::Read | Op::Write) || self.opf() & bindings::REQ_ATOMIC != 0 {
            return Err(EINVAL);
        }
        // SAFETY: This is called while the bio is being mapped. The operation was checked, so it
        // is not one of those that must stay whole or come in duplicates: atomic writes, zone
        // operations (targets for zoned devices are not supported here), and the empty flush,
        // which has been refused for its length. The length was checked too.
        unsafe { bindings::dm_accept_partial_bio(self.bio.bio.as_ptr(), sectors) };
        Ok(())
    }

    /// Sends the bio to `sector` of `device`.
    ///
    /// If the device belongs to another instance of the target then the bio fails.
    #[inline]
    pub fn remap(mut self, device: &TargetDevice, sector: u64) -> Mapped<'a> {
        if self.bio.set_device(device, sector) {
            Mapped::new(bindings::DM_MAPIO_REMAPPED)
        } else {
            self.kill()
        }
    }

    /// Ends the bio with the given status.
    #[inline]
    pub fn end(self, status: BlkStatus) -> Mapped<'a> {
        // SAFETY: The bio is consumed, and `DM_MAPIO_SUBMITTED` tells device mapper that it is
        // not its own any more.
        unsafe { self.bio.end(status) };
        Mapped::new(bindings::DM_MAPIO_SUBMITTED)
    }

    /// Fills the bio with zeroes and ends it, which is how a hole is read.
    #[inline]
    pub fn end_zeroed(self) -> Mapped<'a> {
        self.zero_fill();
        self.end(BlkStatus::OK)
    }

    /// Lets the bio fail with an I/O error, without a call to `end_io`.
    #[inline]
    pub fn kill(self) -> Mapped<'a> {
        Mapped::new(bindings::DM_MAPIO_KILL)
    }

    /// Pushes the bio back to device mapper, to be mapped again later.
    ///
    /// While the device is suspended without flushing, that is with the next table; otherwise
    /// the bio fails.
    #[inline]
    pub fn requeue(self) -> Mapped<'a> {
        Mapped::new(bindings::DM_MAPIO_REQUEUE)
    }

    /// Keeps the bio to be dealt with after `map` has returned, or by another thread.
    #[inline]
    pub fn defer(self) -> (Mapped<'a>, DeferredBio<T>) {
        (
            Mapped::new(bindings::DM_MAPIO_SUBMITTED),
            DeferredBio { bio: self.bio },
        )
    }

    /// Passes the bio to [`Target::process`](super::Target::process) in a worker thread.
    ///
    /// This allocates nothing and cannot fail: the work item is part of the data that comes with
    /// each bio.
    #[inline]
    pub fn queue(self) -> Mapped<'a> {
        self.defer().1.queue();
        Mapped::new(bindings::DM_MAPIO_SUBMITTED)
    }
}

/// A bio that a target has kept after it was mapped.
///
/// It has to be ended or submitted eventually. If it is dropped instead then it ends with
/// an I/O error, so that nobody waits for it forever. The target it belongs to exists at least
/// until then.
pub struct DeferredBio<T: BioOwner> {
    bio: BioRef<T>,
}

// SAFETY: A bio may be ended on any thread. The per-bio data can be sent, as required by
// `Target::PerBio`, and the target is `Sync`.
unsafe impl<T: BioOwner> Send for DeferredBio<T> {}

impl<T: BioOwner> Deref for DeferredBio<T> {
    type Target = BioRef<T>;

    #[inline]
    fn deref(&self) -> &BioRef<T> {
        &self.bio
    }
}

impl<T: BioOwner> Drop for DeferredBio<T> {
    fn drop(&mut self) {
        // SAFETY: The bio is being dropped and so not used any more.
        unsafe { self.bio.end(BlkStatus::IOERR) };
    }
}

impl<T: BioOwner> DeferredBio<T> {
    /// Creates a deferred bio again that was taken apart.
    pub(crate) fn from_inner(bio: BioRef<T>) -> Self {
        Self { bio }
    }

    /// Returns the bio without ending it.
    #[inline]
    pub(crate) fn into_inner(self) -> BioRef<T> {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is never used or dropped, so the invariants move to the result.
        unsafe { BioRef::from_raw(this.bio.bio, this.bio.ti) }
    }

    /// Returns the data that the target keeps with the bio.
    #[inline]
    pub fn per_bio(&mut self) -> &mut T::PerBio {
        // SAFETY: The invariant of `BioRef`; the data is borrowed as long as the bio is.
        unsafe { &mut *PerBioArea::<T>::data(self.bio.bio).as_ptr() }
    }

    /// Ends the bio with the given status.
    #[inline]
    pub fn end(self, status: BlkStatus) {
        let bio = self.into_inner();
        // SAFETY: The bio is not used any more.
        unsafe { bio.end(status) };
    }

    /// Sends the bio to `sector` of `device`.
    ///
    /// If the device belongs to another instance of the target then the bio fails. See
    /// [`Constructor::set_accounts_remapped_io`](super::Constructor::set_accounts_remapped_io).
    pub fn remap(self, device: &TargetDevice, sector: u64) {
        let mut bio = self.into_inner();
        if bio.set_device(device, sector) {
            // SAFETY: `map` returned `DM_MAPIO_SUBMITTED` for the bio, and it is not used any
            // more.
            unsafe { bindings::dm_submit_bio_remap(bio.bio.as_ptr(), core::ptr::null_mut()) };
        } else {
            drop(DeferredBio { bio });
        }
    }

    /// Passes the bio to [`Target::process`](super::Target::process) in a worker thread.
    #[inline]
    pub fn queue(self) {
        const {
            assert!(
                T::HAS_WORK,
                "a target that queues bios must implement `process`"
            )
        };
        let bio = self.into_inner();
        if let Some(queue) = &bio.instance().workqueue {
            // SAFETY: There is a work item, as was checked. The bio is not used any more, and the
            // workqueue belongs to its instance.
            unsafe { PerBioArea::<T>::queue(bio.bio, bio.ti, queue) };
        } else {
            drop(Self { bio });
        }
    }
}

/// A bio that has been ended, as seen by [`Target::end_io`](super::Target::end_io).
///
/// Position and length are not what they were: the lower device has advanced them.
pub struct EndedBio<'a, T: BioOwner> {
    bio: NonNull<bindings::bio>,
    status: BlkStatus,
    _call: PhantomData<&'a T>,
}

impl<T: BioOwner> EndedBio<'_, T> {
    /// # Safety
    ///
    /// `bio` must be what the `end_io` callback got, and the per-bio data must be initialised.
    pub(super) unsafe fn from_raw(bio: NonNull<bindings::bio>, status: BlkStatus) -> Self {
        Self {
            bio,
            status,
            _call: PhantomData,
        }
    }

    /// Returns how the bio ended.
    pub fn status(&self) -> BlkStatus {
        self.status
    }

    /// Returns the data that the target keeps with the bio.
    pub fn per_bio(&mut self) -> &mut T::PerBio {
        // SAFETY: By the requirements of `from_raw()`; the bio is borrowed as long.
        unsafe { &mut *PerBioArea::<T>::data(self.bio).as_ptr() }
    }
}

/// What device mapper is to do with a bio after [`Target::end_io`](super::Target::end_io).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndIo {
    /// End the original bio with the status of this one.
    Done,
    /// Map the bio again, as [`Bio::requeue`] does.
    Requeue,
}
