// SPDX-License-Identifier: GPL-2.0

//! Which CPU works on a part of a large request.
//!
//! To hand work to another CPU costs a wake-up, which pays where that CPU would be idle otherwise.
//! The scheduler does not tell modules which CPUs are idle. So a CPU is left alone where another
//! task had bios of the same device mapped just now: it has work, or soon will. What is known of
//! other CPUs need not be exact: a mistake makes a read slower, not wrong.

use super::bindings;
use kernel::{
    cpu::nr_cpu_ids,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// Parts that a CPU may have been given. With the second it goes on when it has finished the first.
const MOST_GIVEN: i32 = 2;

/// So many other CPUs are looked at.
const CANDIDATES: u32 = 8;

/// How busy one CPU is, in a cache line of its own.
#[repr(align(64))]
struct Load {
    /// When a bio was last mapped there, in ticks of the clock.
    mapped: Atomic<usize>,
    /// The address of the task that did it, only to be compared.
    task: Atomic<usize>,
    /// Parts that it was given and has not finished.
    given: Atomic<i32>,
}

/// Ticks of the clock since some moment.
#[inline]
fn now() -> usize {
    // SAFETY: The variable always exists, and a word is read at once.
    unsafe { core::ptr::read_volatile(&raw const bindings::jiffies) }
}

/// How busy all CPUs are with one instance of a target.
pub(super) struct Loads {
    cpus: KVVec<Load>,
}

impl Loads {
    /// All CPUs are idle.
    pub(super) fn new() -> Result<Self> {
        let long_ago = now().wrapping_sub(usize::MAX / 2);
        let mut cpus = KVVec::with_capacity(nr_cpu_ids() as usize, GFP_KERNEL)?;
        for _ in 0..nr_cpu_ids() {
            let idle = Load {
                mapped: Atomic::new(long_ago),
                task: Atomic::new(0),
                given: Atomic::new(0),
            };
            cpus.push(idle, GFP_KERNEL)?;
        }
        Ok(Self { cpus })
    }

    /// Returns another CPU than `here` that should get a part of what `task` reads, if there is
    /// any.
    pub(super) fn another(&self, here: u32, task: *const bindings::task_struct) -> Option<u32> {
        // SAFETY: The function has no requirements.
        let online = unsafe { bindings::num_online_cpus_now() };
        let now = now();
        let mut chosen = None;
        let mut least = MOST_GIVEN;
        for further in 1..online.min(CANDIDATES + 1) {
            // Where all possible CPUs are online, which is usual, this counts them.
            let cpu = here.wrapping_add(further) % online;
            let load = self.cpus.get(cpu as usize)?;
            // The tick may have come between the bio there and the one here.
            let recent = now.wrapping_sub(load.mapped.load(Relaxed)) <= 1;
            // A task that was there itself has moved.
            let busy = recent && load.task.load(Relaxed) != task.addr();
            let given = load.given.load(Relaxed);
            // SAFETY: The function takes any number.
            if !busy && given < least && unsafe { bindings::cpu_is_online(cpu) } {
                least = given;
                chosen = Some(cpu);
            }
        }
        chosen
    }

    /// `task` has a bio mapped on `cpu`.
    #[inline]
    pub(super) fn maps(&self, cpu: u32, task: *const bindings::task_struct) {
        if let Some(load) = self.cpus.get(cpu as usize) {
            load.mapped.store(now(), Relaxed);
            load.task.store(task.addr(), Relaxed);
        }
    }

    /// `cpu` is given a part of a bio that was mapped elsewhere.
    #[inline]
    pub(super) fn give(&self, cpu: u32) {
        if let Some(load) = self.cpus.get(cpu as usize) {
            load.given.add(1, Relaxed);
        }
    }

    /// `cpu` has finished a part that it was given.
    #[inline]
    pub(super) fn finish(&self, cpu: u32) {
        if let Some(load) = self.cpus.get(cpu as usize) {
            load.given.add(-1, Relaxed);
        }
    }
}
