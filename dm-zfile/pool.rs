// SPDX-License-Identifier: GPL-2.0

//! Things of which a thread needs one for a short time, allocated in advance.

use kernel::{
    cpu::{
        nr_cpu_ids,
        CpuId, //
    },
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

/// A pool does not grow beyond this, however many CPUs there are.
const MAX_SIZE: u32 = 16;

/// A pool of `T`: one for each CPU, up to [`MAX_SIZE`].
///
/// # Invariants
///
/// There is at least one.
pub(super) struct Pool<T> {
    slots: KVec<Pin<KBox<Mutex<T>>>>,
}

impl<T> Pool<T> {
    /// Fills a pool with what `make` returns.
    pub(super) fn new(mut make: impl FnMut() -> Result<T>) -> Result<Self> {
        let mut slots = KVec::new();
        for _ in 0..nr_cpu_ids().clamp(1, MAX_SIZE) {
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
