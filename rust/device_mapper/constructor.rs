// SPDX-License-Identifier: GPL-2.0

//! What a target can see and set while it is being constructed.

use super::{
    bindings,
    claims::has_claims,
    dax::DaxDevice,
    device::{
        Devices,
        InstanceId,
        Mode,
        TargetDevice, //
    },
    error::CtrError, //
};
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{error::to_result, prelude::*};

/// The target under construction: `struct dm_target` as seen by a constructor.
///
/// # Invariants
///
/// `ti` is valid and not accessed by others for `'a`.
pub struct Constructor<'a> {
    ti: NonNull<bindings::dm_target>,
    id: InstanceId,
    devices: Devices,
    _lifetime: PhantomData<&'a mut bindings::dm_target>,
}

impl Constructor<'_> {
    /// Creates the context of a constructor.
    ///
    /// # Safety
    ///
    /// `ti` must be valid and not be accessed by others for the lifetime of the result, and valid
    /// until what [`Constructor::into_devices`] returns is dropped.
    pub(super) unsafe fn from_raw(ti: NonNull<bindings::dm_target>) -> Self {
        // INVARIANT: As required from the caller.
        Self {
            ti,
            id: InstanceId::new(),
            // SAFETY: As required from the caller.
            devices: unsafe { Devices::new(ti) },
            _lifetime: PhantomData,
        }
    }

    /// Returns the identifier of the instance under construction.
    pub(super) fn id(&self) -> InstanceId {
        self.id
    }

    /// Returns the devices that were opened.
    pub(super) fn into_devices(self) -> Devices {
        self.devices
    }

    fn ti(&self) -> &bindings::dm_target {
        // SAFETY: By the type invariant.
        unsafe { self.ti.as_ref() }
    }

    fn ti_mut(&mut self) -> &mut bindings::dm_target {
        // SAFETY: By the type invariant.
        unsafe { self.ti.as_mut() }
    }

    /// Returns the first sector of the target in the mapped device.
    pub fn begin(&self) -> u64 {
        self.ti().begin
    }

    /// Returns the length of the target in sectors.
    pub fn target_len(&self) -> u64 {
        self.ti().len
    }

    /// Returns whether the table is loaded for reading only or for writing as well. Devices are
    /// opened accordingly.
    ///
    /// A table is writable unless user space asked for a read-only one (`dmsetup create
    /// --readonly`).
    pub fn mode(&self) -> Mode {
        // SAFETY: The table of a target under construction is valid.
        Mode::from_raw(unsafe { bindings::dm_table_get_mode(self.ti().table) })
    }

    /// Refuses a table that is not read-only, with a message that says how to make one.
    ///
    /// For targets that cannot be written: a file system that is mounted read-write on a device
    /// that only seems writable fails where it first writes, perhaps in the middle of a recovery.
    pub fn require_read_only(&self) -> Result<(), CtrError> {
        match self.mode() {
            Mode::ReadOnly => Ok(()),
            Mode::ReadWrite => Err(CtrError::invalid(
                c"Table must be read-only (dmsetup create --readonly)",
            )),
        }
    }

    /// Opens the device at `path`, which may be given as `<major>:<minor>` too, in the mode of the
    /// table.
    ///
    /// It is closed after the target has been dropped. Opening a device twice is allowed.
    pub fn device(&mut self, path: &CStr) -> Result<TargetDevice> {
        self.devices.open(self.id, path)
    }

    /// Returns the block device behind a handle.
    pub(crate) fn bdev(&self, device: &TargetDevice) -> Result<NonNull<bindings::block_device>> {
        device.bdev_of(self.id).ok_or(ENODEV)
    }

    /// Returns the size of `device` in sectors.
    pub fn device_sectors(&self, device: &TargetDevice) -> Result<u64> {
        let bdev = self.bdev(device)?;
        // SAFETY: The device is open, since it belongs to this instance.
        Ok(unsafe { bindings::bdev_nr_sectors(bdev.as_ptr()) })
    }

    /// Returns the logical block size of `device` in bytes.
    pub fn logical_block_size(&self, device: &TargetDevice) -> Result<u32> {
        let bdev = self.bdev(device)?;
        // SAFETY: The device is open, since it belongs to this instance.
        Ok(unsafe { bindings::bdev_logical_block_size(bdev.as_ptr()) })
    }

    /// Claims the memory of `device` for direct access through this target alone.
    ///
    /// Fails with `ENXIO` where the device has none or does not start and end with a page, with
    /// `EBUSY` where a target of another mapped device has claimed some of it, and with `EEXIST` where
    /// one of this table has, perhaps this one.
    pub fn dax_device(&mut self, device: &TargetDevice) -> Result<DaxDevice> {
        let bdev = self.bdev(device)?;
        // SAFETY: The device is open, since it belongs to this instance, which is being constructed.
        unsafe { DaxDevice::claim(bdev, self.ti) }
    }

    /// Refuses a table without direct access for a mapped device of which a table has it, live or loaded.
    ///
    /// Device mapper does so where the first table of the device had it. It does not where the device got it later, and
    /// then a file system could go on to use memory that nobody claims any more.
    pub fn require_no_dax(&self) -> Result<(), CtrError> {
        // SAFETY: The table of a target under construction is valid, and is one of a mapped device.
        let mapped = unsafe { bindings::dm_table_get_md(self.ti().table) };
        if has_claims(mapped as usize) {
            return Err(CtrError::invalid(
                c"Table must have direct access, as another of the device has it",
            ));
        }
        Ok(())
    }

    /// Limits the size of a bio sent to the target, which device mapper splits accordingly.
    ///
    /// `sectors` is a count of sectors and must fit 32 bits. Bios are split at its multiples.
    pub fn set_max_io_len(&mut self, sectors: u64) -> Result {
        // SAFETY: `ti` is valid by the type invariant.
        to_result(unsafe { bindings::dm_set_target_max_io_len(self.ti.as_ptr(), sectors) })
    }

    /// Sets how many empty bios the target gets for a flush, usually one per device.
    ///
    /// With zero, which is the default, flushes never reach the target.
    pub fn set_num_flush_bios(&mut self, count: u32) {
        self.ti_mut().num_flush_bios = count;
    }

    /// Sets how many bios the target gets for a discard; zero, the default, refuses discards.
    pub fn set_num_discard_bios(&mut self, count: u32) {
        self.ti_mut().num_discard_bios = count;
    }

    /// Sets how many bios the target gets for a secure erase; zero, the default, refuses them.
    pub fn set_num_secure_erase_bios(&mut self, count: u32) {
        self.ti_mut().num_secure_erase_bios = count;
    }

    /// Sets how many bios the target gets to write zeroes; zero, the default, refuses them.
    pub fn set_num_write_zeroes_bios(&mut self, count: u32) {
        self.ti_mut().num_write_zeroes_bios = count;
    }

    /// Has the time of a bio count from when [`DeferredBio::remap`](super::DeferredBio::remap)
    /// submits it, not from when it was mapped.
    ///
    /// For targets that remap bios after `map` has returned. Device mapper then accounts no bio that
    /// the target ends itself.
    pub fn set_accounts_remapped_io(&mut self) {
        self.ti_mut().set_accounts_remapped_io(true);
    }
}
