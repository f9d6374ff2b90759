// SPDX-License-Identifier: GPL-2.0

//! Memory that comes with each bio.
//!
//! Device mapper allocates `per_io_data_size` bytes in front of every bio it clones. They hold
//! the target's [`PerBio`](super::Target::PerBio) and, only if the target implements
//! [`process`](super::Target::process), the work item by which a bio gets to a worker thread.
//! For a target which wants neither the size is zero and nothing is done at all.

use super::bindings;
use core::{
    marker::PhantomData,
    mem::{
        align_of,
        needs_drop,
        offset_of,
        size_of, //
    },
    ptr::NonNull,
};
use kernel::{prelude::*, types::Opaque};

/// A type of target, as far as its bios need to know it. Every [`Target`](super::Target) is one.
pub trait BioOwner: Sized + Send + Sync + 'static {
    /// See [`Target::PerBio`](super::Target::PerBio).
    type PerBio: Default + Send + 'static;

    /// Whether there is a work item for each bio.
    const HAS_WORK: bool;
}

/// What is needed to find the bio again when its work item runs.
struct WorkArea {
    work: Opaque<bindings::work_struct>,
    bio: NonNull<bindings::bio>,
    ti: NonNull<bindings::dm_target>,
}

/// The layout of the memory that comes with each bio of a target.
pub(crate) struct PerBioArea<T: BioOwner>(PhantomData<T>);

impl<T: BioOwner> PerBioArea<T> {
    /// The alignment that the start of the area is known to have.
    const ALIGN: usize = align_of::<*mut c_void>();

    /// The offset of the [`WorkArea`], which is there if the target has a `process` function.
    const WORK_OFFSET: usize = size_of::<T::PerBio>().next_multiple_of(align_of::<WorkArea>());

    /// The size of the area in bytes.
    pub(super) const SIZE: usize = {
        assert!(align_of::<T::PerBio>() <= Self::ALIGN);
        assert!(align_of::<WorkArea>() <= Self::ALIGN);
        let size = if T::HAS_WORK {
            Self::WORK_OFFSET + size_of::<WorkArea>()
        } else {
            size_of::<T::PerBio>()
        };
        // The area ends where a structure of device mapper begins, so its size decides where it
        // starts.
        size.next_multiple_of(Self::ALIGN)
    };

    /// Whether anything has to be done when a bio ends.
    pub(super) const NEEDS_DROP: bool = needs_drop::<T::PerBio>();

    /// Returns the area of `bio`.
    #[inline]
    fn area(bio: NonNull<bindings::bio>) -> NonNull<u8> {
        if Self::SIZE == 0 {
            return NonNull::<usize>::dangling().cast();
        }
        // SAFETY: All callers have a bio that device mapper cloned for a target of type `T`, so
        // there are `SIZE` bytes in front of it, at an address that is not null.
        unsafe {
            NonNull::new_unchecked(bindings::dm_per_bio_data(bio.as_ptr(), Self::SIZE).cast())
        }
    }

    /// Returns the target's data for `bio`, a clone made for a target of type `T`.
    #[inline]
    pub(crate) fn data(bio: NonNull<bindings::bio>) -> NonNull<T::PerBio> {
        Self::area(bio).cast()
    }

    /// Initialises the target's data.
    ///
    /// # Safety
    ///
    /// `bio` must be a clone made for a target of type `T` which has not been mapped yet.
    #[inline]
    pub(super) unsafe fn init(bio: NonNull<bindings::bio>) {
        if size_of::<T::PerBio>() != 0 {
            // SAFETY: The memory belongs to this bio, and nobody can know it yet.
            unsafe { Self::data(bio).write(T::PerBio::default()) };
        }
    }

    /// Drops the target's data.
    ///
    /// # Safety
    ///
    /// `bio` must be a clone made for a target of type `T` for which [`PerBioArea::init`] was
    /// called, and which nobody but the caller uses any more.
    #[inline]
    pub(super) unsafe fn drop_data(bio: NonNull<bindings::bio>) {
        if Self::NEEDS_DROP {
            // SAFETY: As required from the caller.
            unsafe { Self::data(bio).drop_in_place() };
        }
    }

    /// Queues the work item of `bio`, for whose function [`PerBioArea::queued`] returns the
    /// arguments.
    ///
    /// # Safety
    ///
    /// `T::HAS_WORK` must be true, `bio` a clone made for the target `ti` of type `T`, and `queue`
    /// the workqueue of that target. Nobody but the work function uses the bio from here on.
    pub(super) unsafe fn queue(
        bio: NonNull<bindings::bio>,
        ti: NonNull<bindings::dm_target>,
        queue: &Workqueue,
    ) {
        // SAFETY: With `HAS_WORK` there is a `WorkArea` at this offset of the area.
        let area = unsafe { Self::area(bio).add(Self::WORK_OFFSET) }.cast::<WorkArea>();
        let (raw, run) = (queue.queue.as_ptr(), queue.run);
        // SAFETY: The memory belongs to the bio, and the work item is not in use, since the work
        // function has given up a bio that it got before it can be queued again. The workqueue
        // exists until the bio has ended; `queue` is not used after the item was queued.
        unsafe {
            area.write(WorkArea {
                work: Opaque::uninit(),
                bio,
                ti,
            });
            let work = (*area.as_ptr()).work.get();
            bindings::init_dm_work(work, Some(run));
            bindings::queue_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                raw,
                work,
            );
        }
    }

    /// Returns the bio of a work item and its target.
    ///
    /// # Safety
    ///
    /// Only to be called by the function of a work item that [`PerBioArea::queue`] has queued.
    pub(super) unsafe fn queued(
        work: *mut bindings::work_struct,
    ) -> (NonNull<bindings::bio>, NonNull<bindings::dm_target>) {
        // SAFETY: The work item is a field of a `WorkArea`, which `queue()` has written.
        unsafe {
            let area = work.byte_sub(offset_of!(WorkArea, work)).cast::<WorkArea>();
            ((*area).bio, (*area).ti)
        }
    }
}

/// The function of a work item.
type WorkFn = unsafe extern "C" fn(*mut bindings::work_struct);

/// The workqueue of an instance, and what its work items call.
///
/// # Invariants
///
/// `queue` is a workqueue that nobody else destroys.
pub(super) struct Workqueue {
    queue: NonNull<bindings::workqueue_struct>,
    run: WorkFn,
}

// SAFETY: A workqueue can be used from any thread.
unsafe impl Send for Workqueue {}
// SAFETY: As above.
unsafe impl Sync for Workqueue {}

impl Workqueue {
    /// Allocates a workqueue that makes progress even when memory is short.
    pub(super) fn new(name: &'static CStr, run: WorkFn) -> Result<Self> {
        // SAFETY: `name` is a string.
        let queue = unsafe { bindings::alloc_dm_workqueue(name.as_char_ptr()) };
        // INVARIANT: The workqueue was just allocated.
        let queue = NonNull::new(queue).ok_or(ENOMEM)?;
        Ok(Self { queue, run })
    }
}

impl Drop for Workqueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Work items that are queued or run are waited for.
        unsafe { bindings::destroy_workqueue(self.queue.as_ptr()) };
    }
}
