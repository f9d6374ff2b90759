// SPDX-License-Identifier: GPL-2.0

//! Which CPU works on a part of a large request.
//!
//! To hand work to another CPU costs a wake-up, which pays where that CPU would be idle otherwise.
//! The scheduler does not tell modules which CPUs are idle. So a CPU is left alone that maps bios
//! of the same device itself: it has work, or soon will. The counts by which this is known need
//! not be exact: a wrong one makes a read slower, not wrong.

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

/// What makes a CPU busy.
#[derive(Clone, Copy)]
pub(super) enum Work {
    /// A bio that was mapped there and has not ended.
    Own,
    /// A part of a bio that was mapped elsewhere.
    Given,
}

impl Work {
    fn weight(self) -> i32 {
        match self {
            Work::Own => MOST_GIVEN,
            Work::Given => 1,
        }
    }
}

/// How busy one CPU is, in a cache line of its own.
#[repr(align(64))]
struct Load(Atomic<i32>);

/// How busy all CPUs are with one instance of a target.
pub(super) struct Loads {
    cpus: KVVec<Load>,
}

impl Loads {
    /// All CPUs are idle.
    pub(super) fn new() -> Result<Self> {
        let mut cpus = KVVec::with_capacity(nr_cpu_ids() as usize, GFP_KERNEL)?;
        for _ in 0..nr_cpu_ids() {
            cpus.push(Load(Atomic::new(0)), GFP_KERNEL)?;
        }
        Ok(Self { cpus })
    }

    /// Returns another CPU than `here` that should get a part, if there is any.
    pub(super) fn another(&self, here: u32) -> Option<u32> {
        // SAFETY: The function has no requirements.
        let online = unsafe { bindings::num_online_cpus_now() };
        let mut chosen = None;
        let mut least = MOST_GIVEN;
        for further in 1..online.min(CANDIDATES + 1) {
            // Where all possible CPUs are online, which is usual, this counts them.
            let cpu = here.wrapping_add(further) % online;
            let load = self.cpus.get(cpu as usize)?.0.load(Relaxed);
            // SAFETY: The function takes any number.
            if load < least && unsafe { bindings::cpu_is_online(cpu) } {
                least = load;
                chosen = Some(cpu);
            }
        }
        chosen
    }

    /// There is this work on `cpu`.
    #[inline]
    pub(super) fn begin(&self, cpu: u32, work: Work) {
        if let Some(load) = self.cpus.get(cpu as usize) {
            load.0.add(work.weight(), Relaxed);
        }
    }

    /// What [`Loads::begin`] said is over.
    #[inline]
    pub(super) fn end(&self, cpu: u32, work: Work) {
        if let Some(load) = self.cpus.get(cpu as usize) {
            load.0.add(-work.weight(), Relaxed);
        }
    }
}
