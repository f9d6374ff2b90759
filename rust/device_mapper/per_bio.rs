// SPDX-License-Identifier: GPL-2.0

//! Memory that comes with each bio.
//!
//! Device mapper allocates `per_io_data_size` bytes in front of every bio it clones. They hold
//! the target's [`PerBio`](super::Target::PerBio) and, only if the target implements
//! [`process`](super::Target::process), the work item by which a bio gets to a worker thread.
//! For a target which wants neither the size is zero and nothing is done at all.

use super::{
    bindings,
    bio::{
        BioRef,
        DeferredBio, //
    },
    instance::Instance,
    target::Target,
};
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

/// What is needed to find the bio again when its work item runs.
struct WorkArea {
    work: Opaque<bindings::work_struct>,
    bio: NonNull<bindings::bio>,
    ti: NonNull<bindings::dm_target>,
}

/// The layout of the memory that comes with each bio of a target.
pub(crate) struct PerBioArea<T: Target>(PhantomData<T>);

impl<T: Target> PerBioArea<T> {
    /// The alignment that the start of the area is known to have.
    const ALIGN: usize = align_of::<*mut c_void>();

    /// The offset of the [`WorkArea`], which is there if the target has a `process` function.
    const WORK_OFFSET: usize = size_of::<T::PerBio>().next_multiple_of(align_of::<WorkArea>());

    /// The size of the area in bytes.
    pub(super) const SIZE: usize = {
        assert!(align_of::<T::PerBio>() <= Self::ALIGN);
        assert!(align_of::<WorkArea>() <= Self::ALIGN);
        let size = if T::HAS_PROCESS {
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

    /// Queues the work item of `bio`, which calls [`Target::process`].
    ///
    /// # Safety
    ///
    /// `T::HAS_PROCESS` must be true, and `queue` be the workqueue of the instance.
    pub(super) unsafe fn queue(bio: BioRef<T>, queue: NonNull<bindings::workqueue_struct>) {
        let area = Self::area(bio.as_raw());
        // SAFETY: With a `process` function there is a `WorkArea` at this offset of the area.
        let work = unsafe { area.add(Self::WORK_OFFSET) }.cast::<WorkArea>();

        // SAFETY: The memory belongs to the bio, and the work item is not in use, since the work
        // function has given up a bio that it got before it can be queued again.
        unsafe {
            work.write(WorkArea {
                work: Opaque::uninit(),
                bio: bio.as_raw(),
                ti: bio.ti(),
            });
            bindings::init_dm_work(Self::work_ptr(work), Some(Self::run));
            bindings::queue_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                queue.as_ptr(),
                Self::work_ptr(work),
            );
        }
    }

    fn work_ptr(area: NonNull<WorkArea>) -> *mut bindings::work_struct {
        // SAFETY: Callers pass a pointer to an allocated area.
        let work = unsafe { &raw const (*area.as_ptr()).work };
        Opaque::cast_into(work)
    }

    /// The work function.
    ///
    /// # Safety
    ///
    /// Only to be called by the workqueue, for a work item queued by [`PerBioArea::queue`].
    unsafe extern "C" fn run(work: *mut bindings::work_struct) {
        // SAFETY: The work item is a field of a `WorkArea`, which was written by `queue()`.
        let (bio, ti) = unsafe {
            let area = work.byte_sub(offset_of!(WorkArea, work)).cast::<WorkArea>();
            ((*area).bio, (*area).ti)
        };
        // SAFETY: The bio has not ended, so its target is constructed. The instance is not
        // dropped before all work functions have returned.
        let instance = unsafe { &*(*ti.as_ptr()).private.cast::<Instance<T>>() };
        // SAFETY: `queue()` was given a bio that fulfils the invariants, and nobody has used it
        // since.
        let bio = DeferredBio::from_inner(unsafe { BioRef::from_raw(bio, ti) });
        instance.target.process(bio);
    }
}

/// The workqueue of an instance.
///
/// # Invariants
///
/// The pointer is a workqueue that nobody else destroys.
pub(crate) struct Workqueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue can be used from any thread.
unsafe impl Send for Workqueue {}
// SAFETY: As above.
unsafe impl Sync for Workqueue {}

impl Workqueue {
    /// Allocates a workqueue that makes progress even when memory is short.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is a string.
        let queue = unsafe { bindings::alloc_dm_workqueue(name.as_char_ptr()) };
        // INVARIANT: The workqueue was just allocated.
        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    pub(super) fn as_raw(&self) -> NonNull<bindings::workqueue_struct> {
        self.0
    }

    /// Queues a work item on `cpu`. If that is not online then the workqueue takes another.
    ///
    /// # Safety
    ///
    /// `work` must be initialised, and stay valid until its function was called.
    pub(crate) unsafe fn queue_on(&self, cpu: u32, work: *mut bindings::work_struct) {
        // SAFETY: By the type invariant, and as required from the caller.
        unsafe { bindings::queue_work_on(cpu as c_int, self.0.as_ptr(), work) };
    }
}

impl Drop for Workqueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. Work items that are queued or run are waited for.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}
