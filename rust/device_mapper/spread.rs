// SPDX-License-Identifier: GPL-2.0

//! Which CPU works on a part of a large request.
//!
//! The task that reads offers the parts of a request to other CPUs, works itself when enough of
//! them wait, and at the end takes back those that nobody has begun. So all CPUs finish at about
//! the same time, however fast each is.
//!
//! To hand work to another CPU costs a wake-up, which pays where that CPU would be idle otherwise.
//! The scheduler does not tell modules which CPUs are idle. So a CPU is left alone where another
//! task had bios of the same device mapped just now: it has work, or soon will. What is known of
//! other CPUs need not be exact: a mistake makes a read slower, not wrong.

use super::{
    bindings,
    per_bio::Workqueue, //
};
use core::{
    array,
    mem::offset_of,
    ptr::{
        null,
        null_mut,
        NonNull, //
    },
};
use kernel::{
    cpu::{
        nr_cpu_ids,
        CpuId, //
    },
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed, //
        },
        rcu, //
    },
    types::Opaque,
};

/// Parts that wait at a time: enough that no CPU runs out of them while the task that reads works
/// on one, and few, as each has a buffer.
const WAITING: usize = 4;

/// So many other CPUs are looked at.
const CANDIDATES: u32 = 8;

/// One CPU, in a cache line of its own.
#[repr(align(64))]
struct Cpu<P: 'static> {
    /// When a bio was last mapped there, in ticks of the clock.
    mapped: Atomic<usize>,
    /// The address of the task that did it, only to be compared.
    task: Atomic<usize>,
    /// Parts of what was read there may wait.
    offers: Atomic<bool>,
    /// It was asked to help, and has not found yet that nothing waits.
    helps: Atomic<bool>,
    /// Runs on this CPU to work on a part.
    work: Opaque<bindings::work_struct>,
    /// Where the part comes from.
    spread: Atomic<*const Spread<P>>,
}

/// Ticks of the clock since some moment.
#[inline]
fn now() -> usize {
    // SAFETY: The variable always exists, and a word is read at once.
    unsafe { core::ptr::read_volatile(&raw const bindings::jiffies) }
}

/// The parts `P` of one instance's reads that wait for a CPU, and the CPUs.
///
/// # Invariants
///
/// - A pointer in `waiting` is to a part that nobody else uses. It belongs to whoever takes it out.
/// - While there is one, the work item of some CPU is queued or running, and will see it.
/// - `work` and `spread` of all CPUs are initialised.
pub(super) struct Spread<P: 'static> {
    // Dropped first, which waits for the work items.
    queue: Workqueue,
    cpus: KVVec<Cpu<P>>,
    waiting: [Atomic<*mut P>; WAITING],
    /// Where to look first, so that no part is passed over again and again.
    next: Atomic<usize>,
}

impl<P> Spread<P> {
    /// All CPUs are idle. `help` is a work function, which shall call [`Spread::help`].
    pub(super) fn new(
        help: unsafe extern "C" fn(*mut bindings::work_struct),
    ) -> Result<Pin<KBox<Self>>> {
        let long_ago = now().wrapping_sub(usize::MAX / 2);
        let mut cpus = KVVec::with_capacity(nr_cpu_ids() as usize, GFP_KERNEL)?;
        for _ in 0..nr_cpu_ids() {
            let idle = Cpu {
                mapped: Atomic::new(long_ago),
                task: Atomic::new(0),
                offers: Atomic::new(false),
                helps: Atomic::new(false),
                work: Opaque::uninit(),
                spread: Atomic::new(null()),
            };
            cpus.push(idle, GFP_KERNEL)?;
        }
        // INVARIANT: Nothing waits.
        let this = Self {
            queue: Workqueue::new(c"lower-read")?,
            cpus,
            waiting: array::from_fn(|_| Atomic::new(null_mut())),
            next: Atomic::new(0),
        };
        let this = KBox::pin(this, GFP_KERNEL)?;
        // INVARIANT: The vector does not grow, so these are where they stay.
        for cpu in this.cpus.iter() {
            // SAFETY: The memory is that of a work item, which nobody uses yet.
            unsafe { bindings::init_dm_work(cpu.work.get(), Some(help)) };
            cpu.spread.store(&raw const *this, Relaxed);
        }
        Ok(this)
    }

    /// The workqueue on which the CPUs help.
    pub(super) fn queue(&self) -> &Workqueue {
        &self.queue
    }

    /// `task` has a bio mapped on `cpu`.
    #[inline]
    pub(super) fn maps(&self, cpu: u32, task: *const bindings::task_struct) {
        if let Some(cpu) = self.cpus.get(cpu as usize) {
            cpu.mapped.store(now(), Relaxed);
            cpu.task.store(task.addr(), Relaxed);
        }
    }

    /// Returns another CPU than `here` that can help with what `task` reads, if there is any.
    fn another(&self, here: u32, task: *const bindings::task_struct) -> Option<u32> {
        // SAFETY: The function has no requirements.
        let online = unsafe { bindings::num_online_cpus_now() };
        let now = now();
        let mut chosen = None;
        for further in 1..online.min(CANDIDATES + 1) {
            // Where all possible CPUs are online, which is usual, this counts them.
            let number = here.wrapping_add(further) % online;
            let cpu = self.cpus.get(number as usize)?;
            // The tick may have come between the bio there and the one here.
            let recent = now.wrapping_sub(cpu.mapped.load(Relaxed)) <= 1;
            // A task that was there itself has moved.
            let busy = recent && cpu.task.load(Relaxed) != task.addr();
            // SAFETY: The function takes any number.
            if busy || !unsafe { bindings::cpu_is_online(number) } {
                continue;
            }
            if !cpu.helps.load(Relaxed) {
                return Some(number);
            }
            // It goes on when it has finished its part.
            chosen.get_or_insert(number);
        }
        chosen
    }

    /// Offers `part` of what `task` reads on the CPU `here` to other CPUs. Returns false if none
    /// can help, or enough waits already.
    ///
    /// # Safety
    ///
    /// Nobody else uses the part, and it stays valid until [`Spread::help`] or
    /// [`Spread::take_back`] has passed it on. If this returns true, the caller does not use it
    /// any more either.
    pub(super) unsafe fn offer(
        &self,
        part: *mut P,
        here: u32,
        task: *const bindings::task_struct,
    ) -> bool {
        let Some(other) = self.another(here, task) else {
            return false;
        };
        // Whoever takes the part may end the last bio of this instance. Device mapper destroys a
        // table only after a grace period (dm_sync_table()), so `self` exists until this is over.
        let _guard = rcu::read_lock();
        // INVARIANT: The part is handed over by the caller.
        let added = self
            .waiting
            .iter()
            .any(|place| place.cmpxchg(null_mut(), part, Full).is_ok());
        if added {
            if let Some(here) = self.cpus.get(here as usize) {
                here.offers.store(true, Relaxed);
            }
            // INVARIANT: If it was queued already then it starts after this and sees the part.
            self.ask(other);
        }
        added
    }

    /// Has the work item of a CPU run once more.
    fn ask(&self, number: u32) {
        if let Some(cpu) = self.cpus.get(number as usize) {
            cpu.helps.store(true, Relaxed);
            // SAFETY: By the type invariant. The CPU was online; if it is not any more then the
            // workqueue takes another.
            unsafe {
                bindings::queue_work_on(
                    number as c_int,
                    self.queue.as_raw().as_ptr(),
                    cpu.work.get(),
                )
            };
        }
    }

    /// Takes out a part that waits. It belongs to the caller.
    fn take(&self) -> Option<NonNull<P>> {
        let from = self.next.fetch_add(1, Relaxed);
        (0..WAITING).find_map(|further| {
            let place = self.waiting.get(from.wrapping_add(further) % WAITING)?;
            if place.load(Relaxed).is_null() {
                return None;
            }
            NonNull::new(place.xchg(null_mut(), Acquire))
        })
    }

    /// Calls `work` with parts that wait, if there may be some of what was read on the CPU `here`:
    /// at most as many as can wait at a time.
    #[inline]
    pub(super) fn take_back(&self, here: u32, mut work: impl FnMut(NonNull<P>)) {
        let Some(cpu) = self.cpus.get(here as usize) else {
            return;
        };
        if cpu.offers.load(Relaxed) {
            cpu.offers.store(false, Relaxed);
            for part in (0..WAITING).map_while(|_| self.take()) {
                work(part);
            }
        }
    }

    /// Calls `work` with one part that waits, if there is any, and has the CPU come back if there
    /// are more.
    ///
    /// # Safety
    ///
    /// `item` must be what the work function was called with that [`Spread::new`] was given.
    pub(super) unsafe fn help(item: *mut bindings::work_struct, work: impl FnOnce(NonNull<P>)) {
        // SAFETY: The work item is in a `Cpu`, whose `spread` is initialised. It exists at least
        // until the work function has returned, as the workqueue is destroyed before the rest.
        let (cpu, this) = unsafe {
            let cpu = &*item.byte_sub(offset_of!(Cpu<P>, work)).cast::<Cpu<P>>();
            (cpu, &*cpu.spread.load(Relaxed))
        };
        if let Some(part) = this.take() {
            work(part);
        }
        let waits = |place: &Atomic<*mut P>| !place.load(Relaxed).is_null();
        if this.waiting.iter().any(waits) {
            this.ask(CpuId::current().as_u32());
        } else {
            cpu.helps.store(false, Relaxed);
        }
    }
}
