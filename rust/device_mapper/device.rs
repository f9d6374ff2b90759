// SPDX-License-Identifier: GPL-2.0

//! Devices that a target maps to.
//!
//! `dm_get_device()` opens a device for one instance of a target, and `dm_put_device()` must be
//! called for the same instance before it is gone. Here the instance itself keeps the list of
//! its devices and closes them after the target was dropped. What a target holds is a
//! [`TargetDevice`], which names an entry of that list and can be used only together with the
//! instance it belongs to: every operation compares an identifier that is never used twice. So
//! no reference is counted on the I/O path, and a handle kept somewhere for too long is merely
//! useless.
//!
//! # Modes
//!
//! A device is opened in the mode of the table: for reading only in a read-only table, and for
//! writing too in any other. Nothing here can ask for less or for more, because device mapper in C
//! does not keep what it gave for less: when a target opens, for writing, a device that a target
//! earlier in the table has opened for reading only, `upgrade_mode()` in `drivers/md/dm-table.c`
//! frees the `struct dm_dev` that the earlier one still holds. With one mode for a table the
//! targets that are written with these abstractions, and those in C that open devices in the mode
//! of the table as most do, cannot do that to each other.
//!
//! What remains are targets in C that open devices for writing whatever the mode of the table is,
//! as dm-cache and dm-clone do, over a device that an earlier line of the same read-only
//! table uses; [`TargetDevice`] says what is lost then.

use super::bindings;
use core::{marker::PhantomData, ops::ControlFlow, ptr::NonNull};
use kernel::{
    error::to_result,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// What a table, and so every device that its targets use, is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For reading only.
    ReadOnly,
    /// For reading and writing.
    ReadWrite,
}

impl Mode {
    pub(super) fn from_raw(mode: bindings::blk_mode_t) -> Self {
        if mode & bindings::BLK_OPEN_WRITE != 0 {
            Mode::ReadWrite
        } else {
            Mode::ReadOnly
        }
    }
}

/// Identifies one instance of a target among all that ever existed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct InstanceId(u64);

impl InstanceId {
    pub(super) fn new() -> Self {
        static NEXT: Atomic<u64> = Atomic::new(1);

        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// A device opened by a target, see [`Constructor::device`](super::Constructor::device).
///
/// # Invariants
///
/// `dev` is in the `Devices` of the instance `owner` and `bdev` is its block device, for as
/// long as that instance exists. `bdev` is open for as long. So is `dev`, unless a later line of a
/// read-only table has a target in C that opened the same device for writing: then device mapper
/// has freed `dev`, for this target as for one in C, and the block device is open by another
/// `struct dm_dev`. Only a change to device mapper can prevent that.
#[derive(Clone)]
pub struct TargetDevice {
    bdev: NonNull<bindings::block_device>,
    owner: InstanceId,
    dev: NonNull<bindings::dm_dev>,
    name: [u8; 16],
}

// SAFETY: The pointers are used only while the owning instance exists, and what they point to
// may be used from any thread.
unsafe impl Send for TargetDevice {}
// SAFETY: As above.
unsafe impl Sync for TargetDevice {}

impl TargetDevice {
    /// Returns the device number as `<major>:<minor>`, the form for table and status lines.
    pub fn name(&self) -> &str {
        let len = self.name.iter().position(|c| *c == 0).unwrap_or(0);
        self.name
            .get(..len)
            .and_then(|name| core::str::from_utf8(name).ok())
            .unwrap_or("?")
    }

    /// Returns the block device if `owner` is the instance the device was opened by.
    ///
    /// The pointer is valid for as long as that instance exists.
    #[inline]
    pub(super) fn bdev_of(&self, owner: InstanceId) -> Option<NonNull<bindings::block_device>> {
        (self.owner == owner).then_some(self.bdev)
    }

    /// Returns the device if `owner` is the instance it was opened by.
    fn dev_of(&self, owner: InstanceId) -> Option<NonNull<bindings::dm_dev>> {
        (self.owner == owner).then_some(self.dev)
    }
}

/// The devices which an instance of a target has opened.
///
/// # Invariants
///
/// `ti` is valid, and each element of `list` is a device that `dm_get_device()` returned for it
/// and for which `dm_put_device()` has not been called.
pub(super) struct Devices {
    ti: NonNull<bindings::dm_target>,
    list: KVec<NonNull<bindings::dm_dev>>,
}

// SAFETY: Devices may be closed on another thread than they were opened on.
unsafe impl Send for Devices {}
// SAFETY: There are no methods that take `&self`.
unsafe impl Sync for Devices {}

impl Devices {
    /// Creates an empty list.
    ///
    /// # Safety
    ///
    /// `ti` must stay valid until the list is dropped.
    pub(super) unsafe fn new(ti: NonNull<bindings::dm_target>) -> Self {
        // INVARIANT: The list is empty, and `ti` is valid by the requirement.
        Self {
            ti,
            list: KVec::new(),
        }
    }

    /// Opens a device in the mode of the table.
    ///
    /// `owner` must be the instance that this list belongs to or will belong to.
    pub(super) fn open(&mut self, owner: InstanceId, path: &CStr) -> Result<TargetDevice> {
        self.list.reserve(1, GFP_KERNEL)?;

        let mut dev = core::ptr::null_mut();
        // SAFETY: `ti` is valid by the type invariant, and so is the table that it belongs to;
        // `path` is a string and `dev` may be written.
        to_result(unsafe {
            bindings::dm_get_device(
                self.ti.as_ptr(),
                path.as_char_ptr(),
                bindings::dm_table_get_mode((*self.ti.as_ptr()).table),
                &mut dev,
            )
        })?;
        let dev = NonNull::new(dev).ok_or(ENODEV)?;

        // INVARIANT: `dev` was just returned by `dm_get_device()`.
        self.list.push(dev, GFP_KERNEL).inspect_err(|_| {
            // SAFETY: `dev` was opened above, and does not get into the list.
            unsafe { bindings::dm_put_device(self.ti.as_ptr(), dev.as_ptr()) }
        })?;

        // SAFETY: `dev` is open.
        let (bdev, name) = unsafe { ((*dev.as_ptr()).bdev, (*dev.as_ptr()).name) };
        // INVARIANT: The device is in the list, which the owner keeps until it is gone.
        Ok(TargetDevice {
            bdev: NonNull::new(bdev).ok_or(ENODEV)?,
            owner,
            dev,
            name,
        })
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for dev in &self.list {
            // SAFETY: By the type invariant the device is open for `ti`.
            unsafe { bindings::dm_put_device(self.ti.as_ptr(), dev.as_ptr()) };
        }
    }
}

/// Returned when device mapper does not want to see any further device.
#[derive(Debug)]
pub struct Stop(c_int);

/// Shows device mapper the areas of the devices that a target uses, see
/// [`Target::iterate_devices`](super::Target::iterate_devices).
pub struct DeviceIterator<'a> {
    ti: NonNull<bindings::dm_target>,
    owner: InstanceId,
    callout: unsafe extern "C" fn(
        *mut bindings::dm_target,
        *mut bindings::dm_dev,
        bindings::sector_t,
        bindings::sector_t,
        *mut c_void,
    ) -> c_int,
    data: *mut c_void,
    _lifetime: PhantomData<&'a bindings::dm_target>,
}

impl DeviceIterator<'_> {
    /// Creates an iterator from what the `iterate_devices` callback gets.
    ///
    /// # Safety
    ///
    /// All arguments must be those of the callback for the instance `owner`, and the result may
    /// be used only until that returns.
    pub(super) unsafe fn from_raw(
        ti: NonNull<bindings::dm_target>,
        owner: InstanceId,
        callout: bindings::iterate_devices_callout_fn,
        data: *mut c_void,
    ) -> Option<Self> {
        Some(Self {
            ti,
            owner,
            callout: callout?,
            data,
            _lifetime: PhantomData,
        })
    }

    /// Returns the length of the target in sectors.
    pub fn target_len(&self) -> u64 {
        // SAFETY: The target is valid during the callback.
        unsafe { (*self.ti.as_ptr()).len }
    }

    /// Shows the area of `len` sectors at sector `start` of `device`.
    ///
    /// The result is passed on with the `?` operator. A device of another instance is skipped.
    pub fn visit(&mut self, device: &TargetDevice, start: u64, len: u64) -> ControlFlow<Stop> {
        let Some(dev) = device.dev_of(self.owner) else {
            return ControlFlow::Continue(());
        };
        // SAFETY: `dev` is open by the type invariant, since its owner still exists.
        unsafe { self.call(dev.as_ptr(), start, len) }
    }

    /// The same for a target which does not allow direct access to the memory of the device, although
    /// other targets of its type do.
    ///
    /// Device mapper asks the type of each target of a table, and then each device. So it is shown the
    /// device without memory.
    pub fn visit_without_dax(
        &mut self,
        device: &TargetDevice,
        start: u64,
        len: u64,
    ) -> ControlFlow<Stop> {
        let Some(dev) = device.dev_of(self.owner) else {
            return ControlFlow::Continue(());
        };
        // SAFETY: `dev` is open by the type invariant, since its owner still exists.
        let dev = unsafe { dev.as_ref() };
        let mut without = bindings::dm_dev {
            bdev: dev.bdev,
            bdev_file: dev.bdev_file,
            dax_dev: core::ptr::null_mut(),
            mode: dev.mode,
            name: dev.name,
        };
        // SAFETY: What the copy refers to is open as `dev` is. The functions that device mapper has for
        // this look at what they are shown and do not keep it.
        unsafe { self.call(&mut without, start, len) }
    }

    /// Calls the function.
    ///
    /// # Safety
    ///
    /// `dev` must refer to an open device.
    unsafe fn call(
        &mut self,
        dev: *mut bindings::dm_dev,
        start: u64,
        len: u64,
    ) -> ControlFlow<Stop> {
        // SAFETY: The device is open as required, and the function is called with the data that
        // belongs to it.
        let ret = unsafe { (self.callout)(self.ti.as_ptr(), dev, start, len, self.data) };
        match ret {
            0 => ControlFlow::Continue(()),
            ret => ControlFlow::Break(Stop(ret)),
        }
    }
}

impl Stop {
    pub(super) fn into_raw(self) -> c_int {
        self.0
    }
}
