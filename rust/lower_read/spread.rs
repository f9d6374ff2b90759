// SPDX-License-Identifier: GPL-2.0

//! Which CPU works on a part of a large request.
//!
//! The task that reads offers the parts of a request to other CPUs, works itself when enough of
//! them wait, and takes back those that nobody has begun when it comes to the last. So all CPUs
//! finish at about the same time, however fast each is.
//!
//! To hand work to another CPU costs a wake-up, which pays where that CPU would be idle otherwise.
//! The scheduler does not tell modules which CPUs are idle. So a CPU is left alone where another
//! task had bios of the same device mapped just now: it has work, or soon will. What is known of
//! other CPUs need not be exact: a mistake makes a read slower, not wrong.

use super::bindings;
use crate::device_mapper::Workqueue;
use core::{
    array,
    marker::PhantomPinned,
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
            Relaxed,
            Release, //
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

/// A place for a part that waits.
///
/// # Invariants
///
/// - The pointer in `part`, if it is not null, is to a part that nobody else uses. It belongs to
///   whoever takes it out.
/// - While `task` is zero, so is `part`, and only who changes `task` from zero writes to `part`.
struct Place<P: 'static> {
    part: Atomic<*mut P>,
    /// The address of the task that reads, only to be compared; zero if the place is free.
    task: Atomic<usize>,
}

impl<P> Place<P> {
    /// Puts `part` there, if the place is free.
    fn put(&self, part: *mut P, task: usize) -> bool {
        let free = self.task.cmpxchg(0, task, Acquire).is_ok();
        if free {
            self.part.store(part, Release);
        }
        free
    }

    /// Takes out the part that is there.
    fn take(&self) -> Option<NonNull<P>> {
        if !self.waits() {
            return None;
        }
        let part = NonNull::new(self.part.xchg(null_mut(), Acquire))?;
        self.task.store(0, Release);
        Some(part)
    }

    fn waits(&self) -> bool {
        !self.part.load(Relaxed).is_null()
    }
}

/// The parts `P` of one instance's reads that wait for a CPU, and the CPUs.
///
/// # Invariants
///
/// - While a part waits, the work item of some CPU will see it, as it is queued, or is running and
///   has not looked for the last time, or will be queued by whoever offers the part.
/// - `work` and `spread` of all CPUs are initialised, except in [`Spread::new`].
pub(super) struct Spread<P: 'static> {
    // Dropped first, which waits for the work items.
    queue: Workqueue,
    cpus: KVVec<Cpu<P>>,
    waiting: [Place<P>; WAITING],
    /// Where to look first, so that no part is passed over again and again.
    next: Atomic<usize>,
    // The CPUs point to this.
    _pin: PhantomPinned,
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
                helps: Atomic::new(false),
                work: Opaque::uninit(),
                spread: Atomic::new(null()),
            };
            cpus.push(idle, GFP_KERNEL)?;
        }
        // INVARIANT: Nothing waits.
        let this = Self {
            queue: Workqueue::new(c"lower-read", help)?,
            cpus,
            waiting: array::from_fn(|_| Place {
                part: Atomic::new(null_mut()),
                task: Atomic::new(0),
            }),
            next: Atomic::new(0),
            _pin: PhantomPinned,
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

    /// Returns another CPU than `here` that can help with what `task` reads, if there is any, and
    /// whether it helps already.
    fn another(&self, here: u32, task: *const bindings::task_struct) -> Option<(u32, bool)> {
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
                return Some((number, false));
            }
            chosen.get_or_insert((number, true));
        }
        chosen
    }

    /// Offers `part` of what `task` reads on the CPU `here` to other CPUs. Returns false if none
    /// can help, or enough waits already.
    ///
    /// `present` says that this is the task, which will come and [take back](Spread::take_back)
    /// what waits. Else a worker on its CPU does, if all others work already.
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
        present: bool,
    ) -> bool {
        let Some((other, helps)) = self.another(here, task) else {
            return false;
        };
        // Whoever takes the part may end the last bio of this instance. Device mapper destroys a
        // table only after a grace period (dm_sync_table()), so `self` exists until this is over.
        let _guard = rcu::read_lock();
        // INVARIANT: The part is handed over by the caller.
        let added = self
            .waiting
            .iter()
            .any(|place| place.put(part, task.addr()));
        if added {
            // INVARIANT: If it was queued already then it starts after this and sees the part.
            self.ask(if helps && !present { here } else { other });
        }
        added
    }

    /// Has the work item of a CPU run once more.
    fn ask(&self, number: u32) {
        if let Some(cpu) = self.cpus.get(number as usize) {
            cpu.helps.store(true, Relaxed);
            // SAFETY: By the type invariant. The item exists until the workqueue was destroyed.
            unsafe { self.queue.queue_on(number, cpu.work.get()) };
        }
    }

    /// Takes out a part that waits. It belongs to the caller.
    fn take(&self) -> Option<NonNull<P>> {
        let from = self.next.fetch_add(1, Relaxed);
        (0..WAITING).find_map(|further| {
            let place = self.waiting.get(from.wrapping_add(further) % WAITING)?;
            place.take()
        })
    }

    /// Calls `work` with the parts that wait of what `task` reads.
    ///
    /// Seldom it is called with a part of what another task reads, put there just now.
    #[inline]
    pub(super) fn take_back(
        &self,
        task: *const bindings::task_struct,
        mut work: impl FnMut(NonNull<P>),
    ) {
        for place in &self.waiting {
            if place.task.load(Relaxed) == task.addr() {
                if let Some(part) = place.take() {
                    work(part);
                }
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
        if this.waiting.iter().any(Place::waits) {
            // INVARIANT: This work item looks once more.
            this.ask(CpuId::current().as_u32());
        } else {
            cpu.helps.store(false, Relaxed);
        }
    }
}
