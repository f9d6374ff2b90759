// SPDX-License-Identifier: GPL-2.0

//! Direct access to the memory behind a target (DAX).
//!
//! A file system that is mounted with `dax` reads files from the memory of its device, and maps that
//! memory into programs, instead of copying it into the page cache. It asks device mapper where the
//! memory is, which asks the target: see [`Target::direct_access`](super::Target::direct_access). A
//! target answers with a range of a [`DaxDevice`], which it got in its constructor.
//!
//! A page must be in one place only, which is why the memory of a device is claimed: see
//! [`claims`](super::claims). That a target does not give one page for two of its own sectors is up
//! to the target.

use super::{
    bindings,
    claims::{
        Claim,
        Claimed, //
    },
    SECTOR_SHIFT, //
};
use core::ptr::NonNull;
use kernel::{page::PAGE_SIZE, prelude::*};

/// Sectors of a page.
pub const PAGE_SECTORS: u64 = PAGE_SIZE as u64 >> SECTOR_SHIFT;

/// A reference to a DAX device.
///
/// # Invariants
///
/// It counts, and ends when this is dropped.
struct Reference(NonNull<bindings::dax_device>);

// SAFETY: References may be given up on any thread, and a DAX device be used on any.
unsafe impl Send for Reference {}
// SAFETY: As above.
unsafe impl Sync for Reference {}

impl Drop for Reference {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dax_device_put(self.0.as_ptr()) };
    }
}

/// The memory of a device, claimed for a target. The claim ends when this is dropped.
///
/// # Invariants
///
/// The pages `first..first + pages` of `dax` are those of the block device.
pub struct DaxDevice {
    dax: Reference,
    first: u64,
    pages: u64,
    _claim: Claim,
}

impl DaxDevice {
    /// Claims the memory of a block device.
    ///
    /// # Safety
    ///
    /// `bdev` must be open, and `ti` be a target under construction.
    pub(super) unsafe fn claim(
        bdev: NonNull<bindings::block_device>,
        ti: NonNull<bindings::dm_target>,
    ) -> Result<Self> {
        let mut start = 0;
        // SAFETY: The block device is open as required, and `start` can be written.
        let dax = unsafe { bindings::dax_device_get(bdev.as_ptr(), &mut start) };
        // INVARIANT: The reference was just got.
        let dax = Reference(NonNull::new(dax).ok_or(ENXIO)?);
        // SAFETY: The block device is open as required.
        let sectors = unsafe { bindings::bdev_nr_sectors(bdev.as_ptr()) };
        // SAFETY: A target under construction has a table, which is one of a mapped device.
        let (table, mapped) = unsafe {
            let table = (*ti.as_ptr()).table;
            (table, bindings::dm_table_get_md(table))
        };
        let (first, pages) = (start / PAGE_SIZE as u64, sectors / PAGE_SECTORS);
        let claim = Claim::take(Claimed {
            memory: dax.0.as_ptr() as usize,
            first,
            pages,
            table: table as usize,
            mapped: mapped as usize,
        })?;
        // INVARIANT: `start` is the byte at which the block device starts, which is the start of a
        // page, and it has so many sectors.
        Ok(Self {
            dax,
            first,
            pages,
            _claim: claim,
        })
    }

    /// Returns the size in pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Finds the memory of at most `pages` pages from `page` on.
    ///
    /// Returns how many of them are in order, or a negative error number.
    ///
    /// # Safety
    ///
    /// `mode`, `kaddr` and `pfn` must be arguments of a `direct_access` callback that has not returned:
    /// its caller holds `dax_read_lock()`, and each of the pointers is null or can be written to.
    #[inline]
    pub(super) unsafe fn direct_access(
        &self,
        page: u64,
        pages: u64,
        mode: bindings::dax_access_mode,
        kaddr: *mut *mut c_void,
        pfn: *mut c_ulong,
    ) -> c_long {
        let pages = pages.min(self.pages.saturating_sub(page));
        if pages == 0 {
            return EIO.to_errno() as c_long;
        }
        // SAFETY: There is a reference to the DAX device, the pages are those of the block device by
        // the type invariant, and the other arguments are as required.
        unsafe {
            bindings::dax_device_access(
                self.dax.0.as_ptr(),
                self.first.wrapping_add(page) as usize,
                pages as c_long,
                mode,
                kaddr,
                pfn,
            )
        }
    }
}

/// The memory behind some sectors of a target, the answer of
/// [`Target::direct_access`](super::Target::direct_access).
pub struct DaxRange<'a> {
    pub(super) device: &'a DaxDevice,
    pub(super) sector: u64,
    pub(super) sectors: u64,
}

impl<'a> DaxRange<'a> {
    /// The `sectors` from `sector` of `device` on, which is the start of a page.
    ///
    /// What is behind the last whole page of them does not count.
    #[inline]
    pub fn new(device: &'a DaxDevice, sector: u64, sectors: u64) -> Self {
        Self {
            device,
            sector,
            sectors,
        }
    }
}
