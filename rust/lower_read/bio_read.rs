// SPDX-License-Identifier: GPL-2.0

//! Reads from a lower device on behalf of a bio.
//!
//! A target that cannot pass a bio on, because what the lower device stores is not what the bio
//! wants, reads into memory of its own and computes the answer from that:
//!
//! ```text
//!   map(Bio) -- read_lower() --> lower device --> lower_read_done(FinishedRead) -> BlkStatus
//! ```
//!
//! Nothing on this way can fail for lack of memory. The lower bio and its work item lie in the
//! data that comes with each bio; the buffer is allocated if that is possible at once, else it
//! comes from a reserve, for which [`read_lower`] waits. That wait ends, since whoever holds
//! a buffer of the reserve only waits for the lower device and its own CPU: reads which the same
//! task has submitted before have been given to their driver when another bio is mapped.
//!
//! [`LowerReader::lower_read_done`] runs in process context, on the CPU on which the bio was
//! mapped or, if the [`Placement`] allows, on another. If the read completes while it is being
//! submitted, as with RAM disks, and stays on this CPU, then it is called right there and no
//! thread has to be woken.

use super::{
    bindings,
    spread::Spread, //
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
    SECTOR_SHIFT,
    SECTOR_SIZE, //
};
use core::{
    mem::{
        offset_of,
        MaybeUninit, //
    },
    ops::Deref,
    ptr::NonNull,
};
use kernel::{
    cpu::CpuId,
    prelude::*,
    types::Opaque, //
};

/// Buffers that are kept for when no other memory is available.
const RESERVED: c_int = 2;

/// A target that reads from its lower device and answers bios itself.
///
/// Its constructor makes [`LowerReads`], which it keeps.
pub trait LowerReader: Target<PerBio = LowerRead> {
    /// Returns what the constructor made.
    fn lower_reads(&self) -> &LowerReads;

    /// Fills a bio from what was read for it, and returns how the bio ends.
    ///
    /// Runs in process context. It must not wait for other I/O or for memory.
    fn lower_read_done(&self, read: &FinishedRead<'_, Self>) -> BlkStatus;
}

/// Where [`LowerReader::lower_read_done`] is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// On the CPU that the bio was mapped on.
    Here,
    /// On the first CPU that gets to it, of those that have nothing else to do for this instance.
    ///
    /// For the parts of a large request but the last, so that they are worked on at the same time.
    Spread,
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
    /// Returns exactly the bytes that were asked for, or how the lower read failed.
    ///
    /// They are private memory: nobody changes them.
    #[inline]
    pub fn data(&self) -> Result<&[u8], BlkStatus> {
        self.data
    }
}

/// A buffer, to be given back with [`LowerReads::free`].
struct Buffer {
    ptr: NonNull<u8>,
    reserved: bool,
}

/// The lower read of one bio.
struct State {
    bio: bindings::bio,
    vec: bindings::bio_vec,
    work: Opaque<bindings::work_struct>,
    upper: NonNull<bindings::bio>,
    ti: NonNull<bindings::dm_target>,
    reads: NonNull<LowerReads>,
    buffer: Buffer,
    /// The wanted bytes in the buffer.
    skip: usize,
    len: usize,
    /// The task which may go on with the read where it completes.
    submitter: *mut bindings::task_struct,
    placement: Placement,
    /// The CPU that the bio was mapped on.
    cpu: u32,
    /// [`finish`] for the bio's target.
    finish: unsafe fn(*mut State),
}

/// What comes with each bio of a [`LowerReader`].
///
/// # Invariants
///
/// The state is initialised from when [`read_lower`] has submitted a read until that has
/// finished; nothing else uses it.
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

/// What a [`LowerReader`] needs to read from one device.
///
/// # Invariants
///
/// `reserve` is a pool of buffers of `max` bytes from `kmalloc()`, which nobody else destroys.
/// `device` was opened by the instance that this was made for.
pub struct LowerReads {
    spread: Pin<KBox<Spread<State>>>,
    device: NonNull<bindings::block_device>,
    reserve: NonNull<bindings::mempool>,
    max: usize,
}

// SAFETY: Parts, work items, device and pool may be used by any thread.
unsafe impl Send for LowerReads {}
// SAFETY: As above, by several at a time.
unsafe impl Sync for LowerReads {}

impl LowerReads {
    /// Makes ready for reads from `device` of at most `max` bytes each.
    ///
    /// Allocates a reserve of buffers of about that size in contiguous memory, so it may fail for
    /// more than a few pages.
    pub fn new(ctx: &Constructor<'_>, device: &TargetDevice, max: usize) -> Result<Self> {
        let bdev = ctx.bdev(device)?;
        // Both ends of a read are moved to the next boundary of a block.
        let block = ctx.logical_block_size(device)?.max(SECTOR_SIZE) as usize;
        let max = max
            .checked_add(block.saturating_mul(2))
            .and_then(usize::checked_next_power_of_two)
            .ok_or(E2BIG)?;
        let spread = Spread::new(help)?;
        // SAFETY: The function has no requirements.
        let reserve = unsafe { bindings::mempool_create_kmalloc_pool(RESERVED, max) };
        // INVARIANT: The pool was just created, and the device was opened by this instance.
        Ok(Self {
            spread,
            device: bdev,
            reserve: NonNull::new(reserve).ok_or(ENOMEM)?,
            max,
        })
    }

    /// Returns a buffer of at least `len` bytes, which must be at most `max`.
    ///
    /// Its alignment suits any logical block size. May sleep.
    #[inline]
    fn buffer(&self, len: usize) -> Buffer {
        // SAFETY: The function has no requirements.
        let ptr = unsafe { bindings::kmalloc_nowait(len.next_power_of_two()) };
        if let Some(ptr) = NonNull::new(ptr.cast()) {
            return Buffer {
                ptr,
                reserved: false,
            };
        }
        // SAFETY: By the type invariant. With its flags the allocation does not fail.
        let ptr = unsafe {
            NonNull::new_unchecked(bindings::mempool_alloc_noio(self.reserve.as_ptr()).cast())
        };
        Buffer {
            ptr,
            reserved: true,
        }
    }

    /// Gives a buffer back.
    ///
    /// # Safety
    ///
    /// The buffer must be one of this instance's that is not used any more.
    #[inline]
    unsafe fn free(&self, buffer: Buffer) {
        // SAFETY: The buffer came from where it goes, and is not used any more.
        unsafe {
            if buffer.reserved {
                bindings::mempool_free(buffer.ptr.as_ptr().cast(), self.reserve.as_ptr());
            } else {
                bindings::kfree(buffer.ptr.as_ptr().cast());
            }
        }
    }
}

impl Drop for LowerReads {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. All buffers are back, since a bio ends after its buffer
        // was freed and an instance is dropped after its last bio has ended. Workers that are still
        // to run find no part.
        unsafe { bindings::mempool_destroy(self.reserve.as_ptr()) };
    }
}

/// Reads `len` bytes from byte `offset` of the lower device on, any bytes, and has
/// [`LowerReader::lower_read_done`] called with them.
///
/// If that is more than [`LowerReads::new`] was told then the bio fails. May sleep, until another
/// read has finished.
#[inline]
pub fn read_lower<'a, T: LowerReader>(
    bio: Bio<'a, T>,
    offset: u64,
    len: usize,
    placement: Placement,
) -> Mapped<'a> {
    let (mapped, bio) = bio.defer();
    submit(bio, offset, len, placement);
    mapped
}

/// Starts the read, or drops `bio`, which ends it with an error.
fn submit<T: LowerReader>(bio: DeferredBio<T>, offset: u64, len: usize, placement: Placement) {
    // What a bio says about its urgency holds for the read too.
    const INHERITED: bindings::blk_opf_t = bindings::REQ_SYNC
        | bindings::REQ_META
        | bindings::REQ_PRIO
        | bindings::REQ_IDLE
        | bindings::REQ_RAHEAD;

    // The target exists, shared and pinned, until the bio has ended.
    let reads_ptr = NonNull::from(bio.target().lower_reads());
    // SAFETY: So do the reads, which the target has lent.
    let reads = unsafe { reads_ptr.as_ref() };
    // SAFETY: The device is open as long as the instance exists.
    let mask = u64::from(unsafe { bindings::bdev_logical_block_size(reads.device.as_ptr()) }) - 1;
    let start = offset & !mask;
    let Some(bytes) = offset
        .checked_add(len as u64)
        .and_then(|end| end.checked_add(mask))
        .map(|end| ((end & !mask) - start) as usize)
        .filter(|bytes| *bytes <= reads.max && *bytes != 0)
    else {
        return;
    };
    let cpu = CpuId::current().as_u32();
    // SAFETY: The function has no requirements.
    let submitter = unsafe { bindings::current_task() };
    reads.spread.maps(cpu, submitter);
    let buffer = reads.buffer(bytes);
    let address = buffer.ptr;

    let upper = bio.into_inner();
    let state = PerBioArea::<T>::data(upper.as_raw())
        .cast::<State>()
        .as_ptr();
    // SAFETY: The memory belongs to the bio, and no read is under way in it. The lower bio has
    // room for one piece of memory, which the buffer is, and everything it refers to stays until
    // it has completed: the upper bio ends after that.
    unsafe {
        (&raw mut (*state).upper).write(upper.as_raw());
        (&raw mut (*state).ti).write(upper.ti());
        (&raw mut (*state).reads).write(reads_ptr);
        (&raw mut (*state).buffer).write(buffer);
        (&raw mut (*state).skip).write((offset - start) as usize);
        (&raw mut (*state).len).write(len);
        (&raw mut (*state).submitter).write(submitter);
        (&raw mut (*state).placement).write(placement);
        (&raw mut (*state).cpu).write(cpu);
        (&raw mut (*state).finish).write(finish::<T>);

        let lower = &raw mut (*state).bio;
        let upper = upper.as_raw().as_ptr();
        bindings::bio_init(
            lower,
            reads.device.as_ptr(),
            &raw mut (*state).vec,
            1,
            bindings::req_op_REQ_OP_READ | ((*upper).bi_opf & INHERITED),
        );
        (*lower).bi_ioprio = (*upper).bi_ioprio;
        (*lower).bi_iter.bi_sector = start >> SECTOR_SHIFT;
        (*lower).bi_end_io = Some(end_io::<T>);
        bindings::bio_add_virt_nofail(lower, address.as_ptr().cast(), bytes as c_uint);
        bindings::submit_bio_noacct(lower);
    }
}

/// Called when the lower bio has completed, in any context.
///
/// # Safety
///
/// `bio` must be in a `State` whose read was submitted for a target of type `T`.
unsafe extern "C" fn end_io<T: LowerReader>(bio: *mut bindings::bio) {
    // SAFETY: As required from the caller.
    let state = unsafe { bio.byte_sub(offset_of!(State, bio)) }.cast::<State>();
    // SAFETY: The state is initialised while the read is under way. The target exists until the
    // upper bio has ended.
    let (placement, here, submitter, reads) = unsafe {
        (
            (*state).placement,
            (*state).cpu,
            (*state).submitter,
            (*state).reads.as_ref(),
        )
    };
    // SAFETY: The function only compares the pointer.
    let present = unsafe { bindings::task_may_work_here(submitter) };
    // A buffer of the reserve is to come back soon, whatever other CPUs do.
    // SAFETY: The read has completed, and the state is not used any more if it was handed over.
    let handed_over = unsafe {
        placement == Placement::Spread
            && !(*state).buffer.reserved
            && reads.spread.offer(state, here, submitter, present)
    };
    if handed_over {
        return;
    }
    if present {
        // SAFETY: The read has completed, and this is process context.
        unsafe {
            match placement {
                // The next part is to be read now.
                Placement::Spread => finish::<T>(state),
                Placement::Here => finish_with_others::<T>(state),
            }
        }
        return;
    }
    // SAFETY: The read has completed.
    unsafe { queue::<T>(state, reads) };
}

/// Has a worker finish a bio.
///
/// # Safety
///
/// Called once for a `State` of a target of type `T` whose read has completed, which belongs to the
/// instance of `reads`.
unsafe fn queue<T: LowerReader>(state: *mut State, reads: &LowerReads) {
    // SAFETY: Nobody else uses the state, and the work item is not in use.
    unsafe {
        let work = Opaque::cast_into(&raw const (*state).work);
        bindings::init_dm_work(work, Some(run::<T>));
        reads.spread.queue().queue_on((*state).cpu, work);
    }
}

/// The work function of a bio.
///
/// # Safety
///
/// Only to be called by the workqueue, for a work item queued by [`queue`].
unsafe extern "C" fn run<T: LowerReader>(work: *mut bindings::work_struct) {
    // SAFETY: The work item is in a `State`, whose read has completed.
    unsafe { finish_with_others::<T>(work.byte_sub(offset_of!(State, work)).cast::<State>()) };
}

/// The work function of a CPU that helps another.
///
/// # Safety
///
/// Only to be called by the workqueue, for a work item of a [`Spread`].
unsafe extern "C" fn help(work: *mut bindings::work_struct) {
    // SAFETY: As required from the caller. All parts are `State`s that [`end_io`] has offered.
    unsafe { Spread::<State>::help(work, |part| (part.as_ref().finish)(part.as_ptr())) };
}

/// Finishes a bio, and parts that nobody has begun of what the same task reads.
///
/// # Safety
///
/// As [`answer`].
unsafe fn finish_with_others<T: LowerReader>(state: *mut State) {
    // SAFETY: The state is initialised. The reads exist until the bio has ended.
    let (submitter, reads) = unsafe { ((*state).submitter, (*state).reads.as_ref()) };
    // SAFETY: As required from the caller.
    let (bio, status) = unsafe { answer::<T>(state) };
    // This bio ends after the others, as the target is only known to exist until then.
    reads.spread.take_back(submitter, |part| {
        let part = part.as_ptr();
        // Who has submitted something may end it. For the bio of another it could hold a lock that
        // is wanted there.
        // SAFETY: All parts are `State`s that [`end_io`] has offered, for the same instance. This
        // is process context.
        unsafe {
            if (*part).submitter == submitter {
                finish::<T>(part);
            } else {
                queue::<T>(part, reads);
            }
        }
    });
    bio.end(status);
}

/// Finishes a bio.
///
/// # Safety
///
/// As [`answer`].
unsafe fn finish<T: LowerReader>(state: *mut State) {
    // SAFETY: As required from the caller.
    let (bio, status) = unsafe { answer::<T>(state) };
    bio.end(status);
}

/// Hands what was read to the target, and returns the bio and how it shall end.
///
/// # Safety
///
/// Called once for a `State` of a target of type `T` whose read has completed, in process context.
unsafe fn answer<T: LowerReader>(state: *mut State) -> (DeferredBio<T>, BlkStatus) {
    // SAFETY: The state is initialised, and nobody else uses it.
    let (upper, ti, reads, buffer, skip, len, status) = unsafe {
        let status = BlkStatus::from_raw((*state).bio.bi_status);
        bindings::bio_uninit(&raw mut (*state).bio);
        (
            (*state).upper,
            (*state).ti,
            (*state).reads,
            (&raw const (*state).buffer).read(),
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
    let data = if status.is_ok() {
        // SAFETY: The lower device has filled the buffer, in which these bytes are.
        Ok(unsafe { core::slice::from_raw_parts(buffer.ptr.as_ptr().add(skip), len) })
    } else {
        Err(status)
    };
    let status = bio
        .target()
        .lower_read_done(&FinishedRead { bio: view, data });

    // SAFETY: The bio has not ended, so the reads exist. The buffer came from there, and nothing
    // refers to it any more.
    unsafe { reads.as_ref().free(buffer) };
    (bio, status)
}
