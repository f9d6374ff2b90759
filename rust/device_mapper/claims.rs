// SPDX-License-Identifier: GPL-2.0

//! Which target may give away which memory.
//!
//! A page that is mapped into programs is in one place of one file: `struct folio` has room for no
//! more. Where it is mapped through two file systems, or at two places of one, the kernel warns, and
//! one of them can perhaps never be unmounted. So memory is claimed for one mapped device at a time,
//! and in each of its tables for one target. The table that takes the place of another, while both
//! exist, claims the same.
//!
//! The claims are those of targets that use these abstractions. They do not see through what another
//! target has made of a device, and know nothing of what a file system still maps that was there
//! before a table was replaced.

use super::bindings;
use core::cell::UnsafeCell;
use kernel::prelude::*;

/// Pages of memory, and whom they are claimed for. Numbers that are compared and nothing else.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Claimed {
    /// The address of the DAX device.
    pub memory: usize,
    /// The first page.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
    /// The address of the table.
    pub table: usize,
    /// The address of the mapped device.
    pub mapped: usize,
}

impl Claimed {
    /// Whether some page is claimed by both.
    fn overlaps(&self, other: &Self) -> bool {
        self.memory == other.memory
            && self.first < other.first.saturating_add(other.pages)
            && other.first < self.first.saturating_add(self.pages)
    }
}

/// All claims.
///
/// # Invariants
///
/// The list is accessed only while the lock of `dax_claims_lock()` is held.
struct Claims(UnsafeCell<KVec<Claimed>>);

// SAFETY: By the type invariant the list is accessed by one thread at a time.
unsafe impl Sync for Claims {}

static CLAIMS: Claims = Claims(UnsafeCell::new(KVec::new()));

impl Claims {
    /// Calls `act` with the list. It must not do so itself. May sleep.
    fn with<T>(&self, act: impl FnOnce(&mut KVec<Claimed>) -> T) -> T {
        // SAFETY: Called where sleeping is allowed; nothing that runs under the lock takes it.
        unsafe { bindings::dax_claims_lock() };
        // SAFETY: The lock is held.
        let result = act(unsafe { &mut *self.0.get() });
        // SAFETY: It was taken above.
        unsafe { bindings::dax_claims_unlock() };
        result
    }
}

/// A claim, which ends when this is dropped.
pub struct Claim(Claimed);

impl Claim {
    /// Makes a claim.
    ///
    /// Fails with `EBUSY` where another mapped device has some of the pages, and with `EEXIST` where
    /// the table has.
    pub fn take(claimed: Claimed) -> Result<Self> {
        CLAIMS.with(|claims| {
            for other in claims.iter().filter(|other| other.overlaps(&claimed)) {
                if other.mapped != claimed.mapped {
                    return Err(EBUSY);
                }
                if other.table == claimed.table {
                    return Err(EEXIST);
                }
            }
            claims.push(claimed, GFP_KERNEL)?;
            Ok(Self(claimed))
        })
    }
}

/// Whether a table of the mapped device at this address has claimed memory.
pub fn has_claims(mapped: usize) -> bool {
    CLAIMS.with(|claims| claims.iter().any(|claimed| claimed.mapped == mapped))
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMS.with(|claims| {
            if let Some(at) = claims.iter().position(|other| *other == self.0) {
                let _ = claims.remove(at);
            }
            if claims.is_empty() {
                // The memory too: a static is never dropped.
                *claims = KVec::new();
            }
        });
    }
}
