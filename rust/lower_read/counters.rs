// SPDX-License-Identifier: GPL-2.0

//! Counters of the path of a read: each CPU counts in memory of its own.

use super::bindings;
use kernel::{
    error::to_result,
    prelude::*,
    types::Opaque, //
};

/// `N` numbers that only grow, a `struct percpu_counter` each.
///
/// # Invariants
///
/// All of them are initialised.
pub struct Counters<const N: usize> {
    list: Pin<KBox<[Opaque<bindings::percpu_counter>; N]>>,
}

// SAFETY: The counters may be used by any thread.
unsafe impl<const N: usize> Send for Counters<N> {}
// SAFETY: As above, by several at a time.
unsafe impl<const N: usize> Sync for Counters<N> {}

impl<const N: usize> Counters<N> {
    /// Creates counters that are zero.
    pub fn new() -> Result<Self> {
        let list = KBox::pin([const { Opaque::uninit() }; N], GFP_KERNEL)?;
        // SAFETY: The memory is that of so many counters. It does not move.
        to_result(unsafe {
            bindings::percpu_counters_init(list.as_ptr().cast_mut().cast(), N as u32)
        })?;
        // INVARIANT: They were just initialised.
        Ok(Self { list })
    }

    /// Adds `count` to a counter. There is none beyond the last.
    #[inline]
    pub fn add(&self, counter: usize, count: u64) {
        if let Some(counter) = self.list.get(counter) {
            // SAFETY: By the type invariant.
            unsafe { bindings::percpu_counter_count(counter.get(), count as i64) };
        }
    }

    /// Returns the value of a counter, and what was added before this was called.
    pub fn get(&self, counter: usize) -> u64 {
        self.list.get(counter).map_or(0, |counter| {
            // SAFETY: By the type invariant.
            unsafe { bindings::percpu_counter_total(counter.get()) as u64 }
        })
    }
}

impl<const N: usize> Drop for Counters<N> {
    fn drop(&mut self) {
        let list = self.list.as_ptr().cast_mut().cast();
        // SAFETY: By the type invariant, and nobody uses them any more.
        unsafe { bindings::percpu_counters_destroy(list, N as u32) };
    }
}
