// SPDX-License-Identifier: GPL-2.0

//! Things of which a thread needs one for a short time: one for each CPU, shared by all devices.

use super::lower_read::online_cpus;
use kernel::{
    cpu::CpuId,
    new_mutex,
    prelude::*,
    sync::{
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        Mutex, //
    },
};

/// A pool of `T`: one for each CPU that was there when it was made.
///
/// # Invariants
///
/// There is at least one.
pub(super) struct Pool<T> {
    slots: KVec<Pin<KBox<Mutex<T>>>>,
}

impl<T> Pool<T> {
    /// Fills a pool with what `make` returns.
    pub(super) fn new(make: impl Fn() -> Result<T>) -> Result<Self> {
        let mut slots = KVec::new();
        for _ in 0..online_cpus().max(1) {
            let slot = KBox::pin_init(new_mutex!(make()?), GFP_KERNEL)?;
            slots.push(slot, GFP_KERNEL)?;
        }
        // INVARIANT: There was at least one round.
        Ok(Self { slots })
    }

    /// Returns one that nobody uses, and waits if there is none.
    ///
    /// To hold one and wait for another of the same pool could last forever.
    pub(super) fn take(&self) -> Option<Guard<'_, T, MutexBackend>> {
        let own = CpuId::current().as_u32() as usize % self.slots.len().max(1);
        let (before, from) = self.slots.split_at_checked(own)?;
        from.iter()
            .find_map(|slot| slot.try_lock())
            .or_else(|| before.iter().find_map(|slot| slot.try_lock()))
            .or_else(|| from.first().map(|slot| slot.lock()))
    }
}
