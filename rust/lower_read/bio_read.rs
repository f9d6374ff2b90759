// SPDX-License-Identifier: GPL-2.0

//! Reads from a lower device on behalf of a bio.
//!
//! A target that cannot pass a bio on, because what the lower device stores is not what the bio
//! wants, reads into memory of its own and computes the data of the bio from that:
//!
//! ```text
//!   map(Bio) -- read_lower() --> lower device --> lower_read_done(FinishedRead) -> BlkStatus
//! ```
//!
//! # Progress
//!
//! Nothing on this way fails for lack of memory. The lower bio and its work item lie in the data
//! that comes with each bio. Where no buffer can be had at once the bio is made as short as the
//! target can read, and if there is none for that either then it waits for the reserve of the
//! device, one buffer.
//!
//! That wait ends, also where such devices are stacked. Who holds the reserve waits for the lower
//! device only, never for memory, another buffer or this device: so each device depends on those
//! below it, of which there are finitely many. What the waiting task has submitted before it has
//! been given to its driver, since `submit_bio_noacct()` maps one bio completely, with all that
//! follows from it below, before the next, and a task that sleeps first submits what it has
//! plugged. When the lower read has completed, a work item may be needed to finish the bio. Work
//! items wait for nothing but each other's turn with a lock: they allocate nothing that they could
//! wait for and submit nothing. So the one workqueue of the module, and its one rescuer where no
//! worker can be created, serve a stack of any height: an item of a lower device ends the read of
//! the device above, which queues another item, and returns.
//!
//! # Where the work is done
//!
//! [`LowerReader::lower_read_done`] runs in process context. If a read completes while its task is
//! submitting it, as with RAM disks, then the task does the work itself: no thread is woken. Of a
//! request in several pieces it leaves all but the last to an unbound workqueue, as long as not too
//! many wait there, and when it has finished the last it takes back those that nobody has begun. So
//! all CPUs that the scheduler gives to the workers help, and none is waited for that has something
//! else to do. Where as many tasks read as there are CPUs, none leaves work to others: with two on
//! two CPUs the switches between threads took 15 % of the time (`make bench LENS=wall B=scaling`).
//! A read that completes elsewhere, as most do in an interrupt, goes to the workqueue.
//!
//! `bio_complete_in_task()` would do for the latter, but it binds the work to the CPU of the
//! interrupt, behind whatever that has to do, and Linux 7.2 does not have it.

use super::{
    bindings,
    buffers::{
        online_cpus,
        Buffer,
        Buffers,
        MARGIN,
        MAX_READ, //
    },
    shared::{
        Shared,
        SharedRef, //
    },
};
use crate::device_mapper::{
    Bio,
    BioRef,
    BlkStatus,
    Constructor,
    DeferredBio,
    Mapped,
    PerBioArea,
    Target,
    TargetDevice,
    SECTOR_SHIFT, //
};
use core::{
    array,
    mem::{
        offset_of,
        MaybeUninit, //
    },
    ops::Deref,
    ptr::{
        null_mut,
        NonNull, //
    },
};
use kernel::{
    new_condvar,
    new_mutex,
    new_spinlock,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        CondVar,
        Mutex,
        SpinLock, //
    },
    task::Task,
    types::Opaque, //
};

/// Pieces of one device that wait at most for a worker to begin, however many CPUs there are. Each
/// has a buffer.
const MAX_QUEUED: usize = 16;

/// How many tasks now finish a piece of what they read themselves, and have more to do for that
/// request: so many CPUs are not free for workers. Whom to leave work need not be exact.
static FINISHING: Atomic<i32> = Atomic::new(0);

/// When there were last as many of those as CPUs, in ticks of the clock: tasks that read one request
/// after the other are not always seen at it.
static ALL_BUSY: Atomic<usize> = Atomic::new(0);

/// Ticks of the clock since some moment.
fn jiffies() -> usize {
    // SAFETY: The function has no requirements.
    unsafe { bindings::jiffies_now() }
}

/// A target that reads from its lower device and ends bios itself.
///
/// Its constructor makes [`LowerReads`], which it keeps.
pub trait LowerReader: Target<PerBio = LowerRead> {
    /// Returns what the constructor made.
    fn lower_reads(&self) -> &LowerReads;

    /// Fills a bio from what was read for it, and returns how the bio ends.
    ///
    /// Runs in process context. It must not wait for I/O or for memory.
    fn lower_read_done(&self, read: &FinishedRead<'_, Self>) -> BlkStatus;
}

/// Bytes of the lower device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first byte.
    pub offset: u64,
    /// How many.
    pub len: usize,
}

/// Which piece of a request a bio is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// One that others follow.
    Inner,
    /// The last, or the only one.
    Last,
}

/// What the target got: the bio, and the data that was read for it.
pub struct FinishedRead<'a, T: Target> {
    bio: BioRef<T>,
    data: Result<&'a [u8], BlkStatus>,
}

impl<T: Target> Deref for FinishedRead<'_, T> {
    type Target = BioRef<T>;

    #[inline]
    fn deref(&self) -> &BioRef<T> {
        &self.bio
    }
}

impl<T: Target> FinishedRead<'_, T> {
    /// Returns the bytes that were asked for, followed by [`MARGIN`] bytes that say nothing; or how
    /// the lower read failed.
    ///
    /// They are private memory: nobody changes them.
    #[inline]
    pub fn data(&self) -> Result<&[u8], BlkStatus> {
        self.data
    }
}

/// The lower read of one bio.
struct State {
    bio: bindings::bio,
    vec: bindings::bio_vec,
    work: Opaque<bindings::work_struct>,
    upper: NonNull<bindings::bio>,
    ti: NonNull<bindings::dm_target>,
    reads: NonNull<Inner>,
    buffer: Buffer,
    /// The bytes that are read, and the wanted ones among them.
    bytes: usize,
    skip: usize,
    len: usize,
    /// The task which may go on with the read where it completes.
    submitter: *mut bindings::task_struct,
    piece: Piece,
    /// Whether it is one of those in [`Inner::queued`].
    listed: bool,
    /// [`finish`] for the bio's target.
    finish: unsafe fn(*mut State),
}

/// What comes with each bio of a [`LowerReader`].
///
/// # Invariants
///
/// The state is initialised from when [`read_lower`] has submitted a read until that has finished;
/// nothing else uses it.
#[repr(transparent)]
pub struct LowerRead {
    state: MaybeUninit<State>,
}

// SAFETY: Everything in the state may be used on any thread, and is used by one at a time.
unsafe impl Send for LowerRead {}

impl Default for LowerRead {
    #[inline]
    fn default() -> Self {
        Self {
            state: MaybeUninit::uninit(),
        }
    }
}

/// What all devices of the module share.
///
/// # Invariants
///
/// `queue` is a workqueue that nobody else destroys.
struct Common {
    queue: NonNull<bindings::workqueue_struct>,
    buffers: Buffers,
}

// SAFETY: A workqueue can be used from any thread.
unsafe impl Send for Common {}
// SAFETY: As above.
unsafe impl Sync for Common {}

static COMMON: Shared<Common> = Shared::new();

impl Common {
    fn new() -> Result<Self> {
        let buffers = Buffers::new()?;
        // SAFETY: The function has no requirements.
        let queue = NonNull::new(unsafe { bindings::alloc_lower_read_workqueue() });
        // INVARIANT: The workqueue was just allocated.
        Ok(Self {
            queue: queue.ok_or(ENOMEM)?,
            buffers,
        })
    }
}

impl Drop for Common {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. No bio is left that could queue anything. This waits for
        // work functions that have ended their bio and are about to return.
        unsafe { bindings::destroy_workqueue(self.queue.as_ptr()) };
    }
}

/// What a [`LowerReader`] needs to read from one device.
pub struct LowerReads(Pin<KBox<Inner>>);

/// # Invariants
///
/// - `device` was opened by the instance that this was made for.
/// - What is in `queued` are states whose read has completed and whose work item was queued. They
///   stay valid while they are there: both who takes one out and its work item hold the lock for
///   that before they finish the bio.
#[pin_data]
struct Inner {
    common: SharedRef<Common>,
    device: NonNull<bindings::block_device>,
    /// The bytes that the reserve can hold.
    reserved: usize,
    #[pin]
    reserve: Mutex<Option<Buffer>>,
    #[pin]
    reserve_returned: CondVar,
    #[pin]
    queued: SpinLock<[*mut State; MAX_QUEUED]>,
}

// SAFETY: States, work items and device may be used by any thread.
unsafe impl Send for Inner {}
// SAFETY: As above, by several at a time.
unsafe impl Sync for Inner {}

impl LowerReads {
    /// Makes ready for reads from `device`.
    ///
    /// `step` is the number of bytes that the target must be able to read at once for any progress.
    /// That much memory, and what blocks of the device add to it, is reserved. Fails if it is more
    /// than [`LowerReads::max_len`].
    pub fn new(ctx: &Constructor<'_>, device: &TargetDevice, step: usize) -> Result<Self> {
        if step > Self::max_len(ctx, device)? {
            return Err(E2BIG);
        }
        let added = Self::added_by_blocks(ctx, device)?;
        let reserve = Buffer::reserve(step + added).ok_or(ENOMEM)?;
        let common = COMMON.get(Common::new)?;
        let device = ctx.bdev(device)?;
        // INVARIANT: The device was opened by this instance, and nothing is queued.
        let inner = KBox::pin_init(
            pin_init!(Inner {
                common,
                device,
                reserved: reserve.capacity(),
                reserve <- new_mutex!(Some(reserve)),
                reserve_returned <- new_condvar!(),
                queued <- new_spinlock!(array::from_fn(|_| null_mut())),
            }),
            GFP_KERNEL,
        )?;
        Ok(Self(inner))
    }

    /// Returns how many bytes of `device` can be read at once.
    pub fn max_len(ctx: &Constructor<'_>, device: &TargetDevice) -> Result<usize> {
        Ok(MAX_READ.saturating_sub(Self::added_by_blocks(ctx, device)?))
    }

    /// Bytes by which a read can grow when both ends are moved to the next boundary of a block.
    fn added_by_blocks(ctx: &Constructor<'_>, device: &TargetDevice) -> Result<usize> {
        let block = ctx.logical_block_size(device)? as usize;
        Ok(block.saturating_sub(1).saturating_mul(2))
    }
}

impl Inner {
    /// Returns the blocks of the device that hold `extent`, as bytes, if those are not too many.
    #[inline]
    fn blocks_around(&self, extent: Extent) -> Option<Extent> {
        // SAFETY: The device is open as long as the instance exists.
        let block = unsafe { bindings::bdev_logical_block_size(self.device.as_ptr()) };
        let mask = u64::from(block).wrapping_sub(1);
        let end = extent.offset.checked_add(extent.len as u64)?;
        let end = end.checked_add(mask)? & !mask;
        let offset = extent.offset & !mask;
        let len = usize::try_from(end - offset).ok()?;
        (len != 0 && len <= MAX_READ).then_some(Extent { offset, len })
    }

    /// Returns the reserve. May sleep, until another read has finished.
    #[cold]
    fn wait_for_reserve(&self) -> Buffer {
        let mut reserve = self.reserve.lock();
        loop {
            if let Some(buffer) = reserve.take() {
                return buffer;
            }
            self.reserve_returned.wait(&mut reserve);
        }
    }

    /// Gives a buffer back.
    #[inline]
    fn give_back(&self, buffer: Buffer) {
        if Buffers::owns(&buffer) {
            self.common.buffers.put(buffer);
        } else {
            *self.reserve.lock() = Some(buffer);
            self.reserve_returned.notify_one();
        }
    }

    /// Queues a state whose read has completed, where [`Inner::take_back`] finds it. Returns false
    /// if enough wait already for the CPUs that may be free.
    ///
    /// # Safety
    ///
    /// As [`queue`], and the work function must be [`run`]. If this returns true then neither the
    /// state nor `self` may be used any more.
    unsafe fn queue_listed(&self, state: *mut State) -> bool {
        let cpus = online_cpus();
        if cpus < 2 {
            return false;
        }
        let busy = usize::try_from(FINISHING.load(Relaxed)).unwrap_or(0);
        let free = (cpus - 1).saturating_sub(busy);
        let now = jiffies();
        if free == 0 {
            ALL_BUSY.store(now, Relaxed);
        }
        if now.wrapping_sub(ALL_BUSY.load(Relaxed)) <= 1 {
            return false;
        }
        let wanted = free.saturating_mul(2).min(MAX_QUEUED);
        let mut queued = self.queued.lock();
        let Some(place) = queued.iter_mut().take(wanted).find(|place| place.is_null()) else {
            return false;
        };
        *place = state;
        // INVARIANT: The item is queued before the lock is released.
        // SAFETY: As required from the caller. The work function waits for the lock, so `self`
        // exists until that is released.
        unsafe {
            (*state).listed = true;
            queue(state, self.common.queue);
        }
        true
    }

    /// Takes `state`, which was queued, out of the list.
    fn remove(&self, state: *mut State) {
        let mut queued = self.queued.lock();
        if let Some(place) = queued.iter_mut().find(|place| **place == state) {
            *place = null_mut();
        }
    }

    /// Returns a state that `submitter` has queued and no worker has begun with. It belongs to the
    /// caller.
    fn take_back(&self, submitter: *mut bindings::task_struct) -> Option<NonNull<State>> {
        let mut queued = self.queued.lock();
        for place in queued.iter_mut() {
            let Some(state) = NonNull::new(*place) else {
                continue;
            };
            // SAFETY: By the type invariant the state is valid while the lock is held, and its work
            // item was initialised. If the item was taken from the workqueue then nobody but the
            // caller knows the state.
            let taken = unsafe {
                (*state.as_ptr()).submitter == submitter
                    && bindings::cancel_work((*state.as_ptr()).work.get())
            };
            if taken {
                *place = null_mut();
                return Some(state);
            }
        }
        None
    }
}

/// Reads `extent` of the lower device and has [`LowerReader::lower_read_done`] called with it.
///
/// Where memory is short, `shorten` is called: it shortens the bio to its smallest step and returns
/// the extent of that, which must be no longer than the step that [`LowerReads::new`] was told. The
/// bio fails if it cannot, or if the extent is longer than [`LowerReads::max_len`].
///
/// May sleep, until another read has finished.
#[inline]
pub fn read_lower<'a, T: LowerReader>(
    mut bio: Bio<'a, T>,
    extent: Extent,
    piece: Piece,
    shorten: impl FnOnce(&mut Bio<'a, T>) -> Option<Extent>,
) -> Mapped<'a> {
    let reads = NonNull::from(&*bio.target().lower_reads().0);
    // SAFETY: The target is not changed or dropped before the bio has ended, so neither is what it
    // lends.
    let inner = unsafe { reads.as_ref() };
    let Some(around) = inner.blocks_around(extent) else {
        return bio.kill();
    };
    if let Some(buffer) = inner.common.buffers.get(around.len) {
        let (mapped, bio) = bio.defer();
        submit(bio, reads, (extent, around), buffer, piece);
        return mapped;
    }

    let Some(extent) = shorten(&mut bio) else {
        return bio.kill();
    };
    let Some(around) = inner
        .blocks_around(extent)
        .filter(|around| around.len <= inner.reserved)
    else {
        return bio.kill();
    };
    let buffer = inner.common.buffers.get(around.len);
    let buffer = buffer.unwrap_or_else(|| inner.wait_for_reserve());
    let (mapped, bio) = bio.defer();
    submit(bio, reads, (extent, around), buffer, Piece::Last);
    mapped
}

/// Starts the read of `around`, in which `extent` is wanted.
///
/// `reads` are those of the bio's target, and `buffer` has room for `around`.
#[inline]
fn submit<T: LowerReader>(
    bio: DeferredBio<T>,
    reads: NonNull<Inner>,
    (extent, around): (Extent, Extent),
    buffer: Buffer,
    piece: Piece,
) {
    // What a bio says about its urgency holds for the read too.
    const INHERITED: bindings::blk_opf_t = bindings::REQ_SYNC
        | bindings::REQ_META
        | bindings::REQ_PRIO
        | bindings::REQ_IDLE
        | bindings::REQ_RAHEAD;

    // SAFETY: The reads exist until the bio has ended.
    let device = unsafe { reads.as_ref() }.device;
    let upper = bio.into_inner();
    let (raw, ti) = (upper.as_raw(), upper.ti());
    let state = PerBioArea::<T>::data(raw).cast::<State>().as_ptr();
    // SAFETY: The memory belongs to the bio, and no read is under way in it: so it is written
    // without being read. The lower bio has no memory yet, and everything it refers to stays until
    // it has completed: the upper bio ends after that. The latter belongs to the target, for which
    // `map` returns `DM_MAPIO_SUBMITTED`.
    unsafe {
        (&raw mut (*state).upper).write(raw);
        (&raw mut (*state).ti).write(ti);
        (&raw mut (*state).reads).write(reads);
        (&raw mut (*state).bytes).write(around.len);
        (&raw mut (*state).skip).write((extent.offset - around.offset) as usize);
        (&raw mut (*state).len).write(extent.len);
        (&raw mut (*state).submitter).write(Task::current_raw());
        (&raw mut (*state).piece).write(piece);
        (&raw mut (*state).listed).write(false);
        (&raw mut (*state).finish).write(finish::<T>);

        let lower = &raw mut (*state).bio;
        let opf = bindings::req_op_REQ_OP_READ | ((*raw.as_ptr()).bi_opf & INHERITED);
        bindings::bio_init(lower, device.as_ptr(), null_mut(), 0, opf);
        (*lower).bi_ioprio = (*raw.as_ptr()).bi_ioprio;
        (*lower).bi_iter.bi_sector = around.offset >> SECTOR_SHIFT;
        (*lower).bi_end_io = Some(end_io);
        buffer.add_to(lower, &raw mut (*state).vec, around.len);
        (&raw mut (*state).buffer).write(buffer);
        // Accounts the upper bio, and has the cgroup of its reader pay for the lower.
        bindings::dm_submit_bio_remap(raw.as_ptr(), lower);
    }
}

/// Called when the lower bio has completed, in any context.
///
/// # Safety
///
/// `bio` must be in a `State` whose read was submitted.
unsafe extern "C" fn end_io(bio: *mut bindings::bio) {
    // SAFETY: As required from the caller. The state is initialised while the read is under way,
    // and the reads exist until the upper bio has ended.
    let (state, reads, present) = unsafe {
        let state = bio.byte_sub(offset_of!(State, bio)).cast::<State>();
        (
            state,
            (*state).reads.as_ref(),
            // This only compares the pointer.
            bindings::task_may_work_here((*state).submitter),
        )
    };
    // SAFETY: The read has completed, so this is the only user of the state. Where it is finished
    // here, this is process context.
    unsafe {
        if !present {
            queue(state, reads.common.queue);
        } else if (*state).piece == Piece::Last {
            finish_with_queued(state);
        // The reserve is to come back soon.
        } else if !Buffers::owns(&(*state).buffer) || !reads.queue_listed(state) {
            FINISHING.add(1, Relaxed);
            ((*state).finish)(state);
            FINISHING.add(-1, Relaxed);
        }
    }
}

/// Has a worker finish a bio.
///
/// # Safety
///
/// Nobody else uses the state, whose read has completed, and the caller does not use it any more.
/// `queue` must be the workqueue of its reads.
unsafe fn queue(state: *mut State, queue: NonNull<bindings::workqueue_struct>) {
    // SAFETY: The work item is not in use. It stays valid until its function was called, and so
    // does the workqueue.
    unsafe {
        let work = (*state).work.get();
        bindings::init_dm_work(work, Some(run));
        bindings::queue_work_on(
            bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
            queue.as_ptr(),
            work,
        );
    }
}

/// The work function of a bio.
///
/// # Safety
///
/// Only to be called by the workqueue, for a work item queued by [`queue`].
unsafe extern "C" fn run(work: *mut bindings::work_struct) {
    // SAFETY: The work item is in a `State` whose read has completed, and the reads exist until the
    // bio has ended. This is process context.
    unsafe {
        let state = work.byte_sub(offset_of!(State, work)).cast::<State>();
        if (*state).listed {
            (*state).reads.as_ref().remove(state);
        }
        ((*state).finish)(state);
    }
}

/// Finishes the last piece of a request, and those before it that no worker has begun with.
///
/// # Safety
///
/// As [`finish`], by the task that has submitted the read.
unsafe fn finish_with_queued(state: *mut State) {
    // SAFETY: The state is initialised.
    let (submitter, reads) = unsafe { ((*state).submitter, (*state).reads) };
    // The pieces before it come first, as the reads are only known to exist until this one ends.
    // SAFETY: The reads exist until then.
    while let Some(other) = unsafe { reads.as_ref() }.take_back(submitter) {
        // A task may end what it has submitted itself. Of another's bio it does not know which locks
        // are wanted there.
        // SAFETY: The state was taken back, so nobody else uses it. This is process context.
        unsafe { (other.as_ref().finish)(other.as_ptr()) };
    }
    // SAFETY: As required from the caller.
    unsafe { ((*state).finish)(state) };
}

/// Finishes a bio.
///
/// # Safety
///
/// Called once for a `State` of a target of type `T` whose read has completed, in process context.
/// Nobody else uses the state, and the caller does not use it any more.
unsafe fn finish<T: LowerReader>(state: *mut State) {
    // SAFETY: The state is initialised, and nobody else uses it.
    let (upper, ti, reads, buffer, bytes, skip, len, status) = unsafe {
        let status = BlkStatus::from_raw((*state).bio.bi_status);
        bindings::bio_uninit(&raw mut (*state).bio);
        (
            (*state).upper,
            (*state).ti,
            (*state).reads,
            (&raw const (*state).buffer).read(),
            (*state).bytes,
            (*state).skip,
            (*state).len,
            status,
        )
    };
    // SAFETY: `submit` took this bio apart, and nobody has used it since. The other `BioRef` is
    // not used after the bio was ended.
    let (bio, view) = unsafe {
        (
            DeferredBio::<T>::from_inner(BioRef::from_raw(upper, ti)),
            BioRef::<T>::from_raw(upper, ti),
        )
    };
    buffer.completed(bytes);
    let data = if status.is_ok() {
        // SAFETY: The lower device has filled `bytes` bytes of the buffer, among which these are,
        // and `MARGIN` bytes follow the buffer's last.
        Ok(unsafe { core::slice::from_raw_parts(buffer.as_ptr().add(skip), len + MARGIN) })
    } else {
        Err(status)
    };
    let status = bio
        .target()
        .lower_read_done(&FinishedRead { bio: view, data });
    // SAFETY: The bio has not ended, so the reads exist. Nothing refers to the buffer any more.
    unsafe { reads.as_ref() }.give_back(buffer);
    bio.end(status);
}
