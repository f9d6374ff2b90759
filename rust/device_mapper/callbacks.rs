// SPDX-License-Identifier: GPL-2.0

//! The callbacks of `struct target_type`, which call those of a [`Target`].

use super::{
    args::Args,
    bindings,
    bio::{
        Bio,
        BioRef,
        BlkStatus,
        DeferredBio,
        EndIo,
        EndedBio, //
    },
    constructor::Constructor,
    dax::PAGE_SECTORS,
    device::DeviceIterator,
    error::{
        CtrContext,
        CtrError, //
    },
    instance::Instance,
    limits::QueueLimits,
    per_bio::{
        PerBioArea,
        Workqueue, //
    },
    status::{
        StatusType,
        StatusWriter, //
    },
    target::Target,
};
use core::{
    fmt::Write,
    marker::PhantomData,
    ops::ControlFlow,
    ptr::{
        null_mut,
        NonNull, //
    },
};
use kernel::{
    error::from_result,
    prelude::*,
    str::as_char_ptr_in_const_context, //
};

/// Defines callbacks that call the function of the target and do nothing else.
macro_rules! pass_on {
    ($($name:ident),*) => {$(
        #[doc = concat!("See [`Target::", stringify!($name), "`].")]
        ///
        /// # Safety
        ///
        /// Only device mapper calls this, between `ctr` and `dtr`.
        unsafe extern "C" fn $name(ti: *mut bindings::dm_target) {
            // SAFETY: Device mapper calls this between `ctr` and `dtr`.
            unsafe { Self::instance(ti) }.target.$name();
        }
    )*};
}

/// Returns the callback if the target implements it.
const fn present<F: Copy>(implemented: bool, callback: F) -> Option<F> {
    if implemented {
        Some(callback)
    } else {
        None
    }
}

/// The callbacks of `struct target_type` for a [`Target`].
///
/// All of them are called by device mapper only, with a valid `ti`. Except for [`Callbacks::ctr`]
/// they are called only between a successful `ctr` and the `dtr` for this `ti`.
pub(super) struct Callbacks<T: Target>(PhantomData<T>);

impl<T: Target> Callbacks<T> {
    /// Returns the target.
    ///
    /// # Safety
    ///
    /// `ti` must be as described for the type, and the result must be used only until the
    /// callback returns.
    #[inline]
    unsafe fn instance<'a>(ti: *mut bindings::dm_target) -> Pin<&'a Instance<T>> {
        // SAFETY: `private` was set by `ctr` and is valid until `dtr`, during which no other
        // callback runs. The instance is pinned, as that is how it was made.
        unsafe { Pin::new_unchecked(&*(*ti).private.cast::<Instance<T>>()) }
    }

    fn construct(
        ti: NonNull<bindings::dm_target>,
        args: Args<'_>,
    ) -> Result<Pin<KBox<Instance<T>>>, CtrError> {
        // SAFETY: `ti` is valid, and not used by others while it is being constructed. The list
        // of devices is dropped either with `ctx` or with the instance.
        let mut ctx = unsafe { Constructor::from_raw(ti) };
        let workqueue = if T::HAS_PROCESS {
            let queue = Workqueue::new(T::NAME, Self::process);
            Some(queue.context(c"Cannot allocate workqueue")?)
        } else {
            None
        };
        KBox::try_pin_init(
            try_pin_init!(Instance {
                id: ctx.id(),
                workqueue,
                target <- T::new(&mut ctx, args),
                devices: ctx.into_devices(),
            }? CtrError),
            GFP_KERNEL,
        )
    }

    /// Constructs the target.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, with `argc` strings in `argv`.
    unsafe extern "C" fn ctr(
        ti: *mut bindings::dm_target,
        argc: c_uint,
        argv: *mut *mut c_char,
    ) -> c_int {
        let Some(ti) = NonNull::new(ti) else {
            return EINVAL.to_errno();
        };
        // SAFETY: Device mapper passes `argc` strings which exist until the constructor returns.
        let args = unsafe { Args::from_raw(argc, argv) };
        match Self::construct(ti, args) {
            Ok(instance) => {
                // SAFETY: The instance stays where it is until it is dropped by `dtr`.
                let instance = KBox::into_raw(unsafe { Pin::into_inner_unchecked(instance) });
                // SAFETY: `ti` is valid, and its user is this constructor.
                unsafe {
                    (*ti.as_ptr()).private = instance.cast();
                    (*ti.as_ptr()).per_io_data_size = PerBioArea::<T>::SIZE as c_uint;
                }
                0
            }
            Err(err) => {
                // SAFETY: As above. The message is static and device mapper only prints it.
                unsafe { (*ti.as_ptr()).error = err.message().as_char_ptr().cast_mut() };
                err.errno().to_errno()
            }
        }
    }

    /// Drops the target.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, after all other callbacks have returned.
    unsafe extern "C" fn dtr(ti: *mut bindings::dm_target) {
        // SAFETY: `private` was set by `ctr` to a pinned box, and this is the last callback.
        unsafe {
            let instance = KBox::from_raw((*ti).private.cast::<Instance<T>>());
            (*ti).private = null_mut();
            drop(Pin::new_unchecked(instance));
        }
    }

    /// Maps a bio.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`, with a clone made for this target.
    unsafe extern "C" fn map(ti: *mut bindings::dm_target, bio: *mut bindings::bio) -> c_int {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`, with a clone for this target.
        let (instance, ti, bio) = unsafe {
            (
                Self::instance(ti),
                NonNull::new_unchecked(ti),
                NonNull::new_unchecked(bio),
            )
        };
        // SAFETY: The bio has not been mapped yet.
        unsafe { PerBioArea::<T>::init(bio) };
        // SAFETY: The bio belongs to the target now, and its data is initialised.
        let to_map = Bio::new(unsafe { BioRef::from_raw(bio, ti) });
        let ret = instance.target.map(to_map).into_raw();
        if PerBioArea::<T>::NEEDS_DROP
            && matches!(
                ret as c_uint,
                bindings::DM_MAPIO_KILL | bindings::DM_MAPIO_REQUEUE
            )
        {
            // SAFETY: With these results the bio was given back, without `end_io`.
            unsafe { PerBioArea::<T>::drop_data(bio) };
        }
        ret
    }

    /// Passes a bio to [`Target::process`].
    ///
    /// # Safety
    ///
    /// Only to be called by a workqueue, for a work item that [`PerBioArea::queue`] has queued for
    /// a target of type `T`.
    unsafe extern "C" fn process(work: *mut bindings::work_struct) {
        // SAFETY: As required from the caller.
        let (bio, ti) = unsafe { PerBioArea::<T>::queued(work) };
        // SAFETY: The bio has not ended, so the target it was mapped by exists.
        let instance = unsafe { Self::instance(ti.as_ptr()) };
        // SAFETY: A `BioRef` was queued, and nobody has used it since.
        let bio = DeferredBio::from_inner(unsafe { BioRef::from_raw(bio, ti) });
        instance.target.process(bio);
    }

    /// Looks at a bio that has ended.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`, for a bio that was mapped, with a
    /// valid `error`.
    unsafe extern "C" fn end_io(
        ti: *mut bindings::dm_target,
        bio: *mut bindings::bio,
        error: *mut bindings::blk_status_t,
    ) -> c_int {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`, with a clone for this target.
        let (instance, bio) = unsafe { (Self::instance(ti), NonNull::new_unchecked(bio)) };
        // SAFETY: `error` is valid, and the bio has been mapped.
        let mut ended = unsafe { EndedBio::from_raw(bio, BlkStatus::from_raw(*error)) };
        let ret = if T::HAS_END_IO {
            instance.target.end_io(&mut ended)
        } else {
            EndIo::Done
        };
        // SAFETY: The bio has ended, so nobody else uses it, and device mapper will free it.
        unsafe { PerBioArea::<T>::drop_data(bio) };
        match ret {
            EndIo::Done => bindings::DM_ENDIO_DONE as c_int,
            EndIo::Requeue => bindings::DM_ENDIO_REQUEUE as c_int,
        }
    }

    pass_on!(presuspend, presuspend_undo, postsuspend, resume);

    /// See [`Target::preresume`].
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`.
    unsafe extern "C" fn preresume(ti: *mut bindings::dm_target) -> c_int {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`.
        let instance = unsafe { Self::instance(ti) };
        from_result(|| instance.target.preresume().map(|()| 0))
    }

    /// Writes a status.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`, with `maxlen` bytes at `result`.
    unsafe extern "C" fn status(
        ti: *mut bindings::dm_target,
        kind: bindings::status_type_t,
        _flags: c_uint,
        result: *mut c_char,
        maxlen: c_uint,
    ) {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`.
        let instance = unsafe { Self::instance(ti) };
        // SAFETY: `result` has room for `maxlen` bytes, and is the caller's alone.
        let mut out = unsafe { StatusWriter::from_raw(result, maxlen) };
        let kind = match kind {
            bindings::status_type_t_STATUSTYPE_INFO => StatusType::Info,
            bindings::status_type_t_STATUSTYPE_TABLE => StatusType::Table,
            bindings::status_type_t_STATUSTYPE_IMA => {
                let [major, minor, patch] = T::VERSION;
                let _ = out.write_fmt(fmt!(
                    "target_name={},target_version={major}.{minor}.{patch}",
                    T::NAME
                ));
                StatusType::Ima
            }
            _ => return,
        };
        // The writer does not fail; a target that stops early has said what it wanted.
        let _ = instance.target.status(kind, &mut out);
    }

    /// Acts on a message.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`, with `argc` strings in `argv` and
    /// `maxlen` bytes at `result`.
    unsafe extern "C" fn message(
        ti: *mut bindings::dm_target,
        argc: c_uint,
        argv: *mut *mut c_char,
        result: *mut c_char,
        maxlen: c_uint,
    ) -> c_int {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`.
        let instance = unsafe { Self::instance(ti) };
        // SAFETY: Device mapper passes `argc` strings which exist until this returns.
        let args = unsafe { Args::from_raw(argc, argv) };
        // SAFETY: `result` has room for `maxlen` bytes, and is the caller's alone.
        let mut reply = unsafe { StatusWriter::from_raw(result, maxlen) };
        from_result(|| {
            instance.target.message(args, &mut reply)?;
            // One tells device mapper that there is a reply.
            Ok(c_int::from(!reply.is_empty()))
        })
    }

    /// Shows the devices.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`, with a function and the data to call
    /// it with.
    unsafe extern "C" fn iterate_devices(
        ti: *mut bindings::dm_target,
        callout: bindings::iterate_devices_callout_fn,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`.
        let instance = unsafe { Self::instance(ti) };
        // SAFETY: `ti` is not null, and these are the arguments for this instance.
        let Some(mut devices) = (unsafe {
            DeviceIterator::from_raw(NonNull::new_unchecked(ti), instance.id, callout, data)
        }) else {
            return 0;
        };
        match instance.target.iterate_devices(&mut devices) {
            ControlFlow::Continue(()) => 0,
            ControlFlow::Break(stop) => stop.into_raw(),
        }
    }

    /// Finds the memory behind pages.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`, for pages of the target, on behalf of a
    /// caller that holds `dax_read_lock()`. `kaddr` and `pfn` are null or can be written to.
    unsafe extern "C" fn direct_access(
        ti: *mut bindings::dm_target,
        pgoff: c_ulong,
        nr_pages: c_long,
        mode: bindings::dax_access_mode,
        kaddr: *mut *mut c_void,
        pfn: *mut c_ulong,
    ) -> c_long {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`.
        let (instance, begin) = unsafe { (Self::instance(ti), (*ti).begin) };
        // Pages count from the beginning of the mapped device.
        let sector = (pgoff as u64)
            .wrapping_mul(PAGE_SECTORS)
            .wrapping_sub(begin);
        let pages = u64::try_from(nr_pages).unwrap_or(0);
        let sectors = pages.wrapping_mul(PAGE_SECTORS);
        let range = match instance.target.direct_access(sector, sectors) {
            Ok(range) => range,
            Err(error) => return error.to_errno() as c_long,
        };
        let (page, run) = (range.sector / PAGE_SECTORS, range.sectors / PAGE_SECTORS);
        // SAFETY: The last arguments are those of this callback.
        unsafe {
            range
                .device
                .direct_access(page, run.min(pages), mode, kaddr, pfn)
        }
    }

    /// Refuses to make a page zero.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this. It warns where a type has `direct_access` and not this.
    unsafe extern "C" fn dax_zero_page_range(
        _ti: *mut bindings::dm_target,
        _pgoff: c_ulong,
        _nr_pages: usize,
    ) -> c_int {
        EROFS.to_errno()
    }

    /// Adjusts limits.
    ///
    /// # Safety
    ///
    /// Only device mapper calls this, between `ctr` and `dtr`, with valid limits.
    unsafe extern "C" fn io_hints(
        ti: *mut bindings::dm_target,
        limits: *mut bindings::queue_limits,
    ) {
        // SAFETY: Device mapper calls this between `ctr` and `dtr`.
        let instance = unsafe { Self::instance(ti) };
        // SAFETY: `limits` is valid, and only this callback uses it now.
        let limits = unsafe { QueueLimits::from_raw(limits) };
        instance.target.io_hints(limits);
    }

    /// The target type, complete but for the module.
    pub(super) const TARGET_TYPE: bindings::target_type = bindings::target_type {
        features: T::FEATURES.into_raw(),
        name: as_char_ptr_in_const_context(T::NAME),
        version: T::VERSION,
        ctr: Some(Self::ctr),
        dtr: Some(Self::dtr),
        map: Some(Self::map),
        end_io: present(T::HAS_END_IO || PerBioArea::<T>::NEEDS_DROP, Self::end_io),
        presuspend: present(T::HAS_PRESUSPEND, Self::presuspend),
        presuspend_undo: present(T::HAS_PRESUSPEND_UNDO, Self::presuspend_undo),
        postsuspend: present(T::HAS_POSTSUSPEND, Self::postsuspend),
        preresume: present(T::HAS_PRERESUME, Self::preresume),
        resume: present(T::HAS_RESUME, Self::resume),
        status: present(T::HAS_STATUS, Self::status),
        message: present(T::HAS_MESSAGE, Self::message),
        iterate_devices: present(T::HAS_ITERATE_DEVICES, Self::iterate_devices),
        io_hints: present(T::HAS_IO_HINTS, Self::io_hints),
        direct_access: present(T::HAS_DIRECT_ACCESS, Self::direct_access),
        dax_zero_page_range: present(T::HAS_DIRECT_ACCESS, Self::dax_zero_page_range),
        ..pin_init::zeroed()
    };
}
