// SPDX-License-Identifier: GPL-2.0

//! Registration of target types.

use super::{
    bindings,
    callbacks::Callbacks,
    target::Target, //
};
use core::{cell::UnsafeCell, marker::PhantomData};
use kernel::{
    error::to_result,
    module_param::ModuleParamAccess,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// A `struct target_type` for the target type `T`.
///
/// Targets refer to their type for as long as they exist, which may be longer than it is
/// registered. So this is put into a static, where it lasts until the module is unloaded; and
/// device mapper keeps the module while there are targets.
///
/// # Invariants
///
/// `raw` is written only by the one registration that can set `taken`, before it registers, and
/// by device mapper.
pub struct TargetType<T: Target> {
    raw: UnsafeCell<bindings::target_type>,
    taken: Atomic<bool>,
    _type: PhantomData<fn() -> T>,
}

// SAFETY: `raw` is written only as the type invariant says.
unsafe impl<T: Target> Sync for TargetType<T> {}

impl<T: Target> TargetType<T> {
    /// Creates a target type that is not registered.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self {
            raw: UnsafeCell::new(Callbacks::<T>::TARGET_TYPE),
            taken: Atomic::new(false),
            _type: PhantomData,
        }
    }
}

/// The registration of a target type, which ends when this is dropped.
///
/// # Invariants
///
/// `target_type` is registered.
pub struct Registration<T: Target> {
    target_type: &'static TargetType<T>,
}

impl<T: Target> Registration<T> {
    /// Registers a target type, so that tables can have targets of it.
    ///
    /// Fails with `EBUSY` if there is a target type of this name. A [`TargetType`] can be
    /// registered only once in its life.
    pub fn new(target_type: &'static TargetType<T>, module: &'static ThisModule) -> Result<Self> {
        if target_type.taken.xchg(true, Relaxed) {
            return Err(EBUSY);
        }
        let raw = target_type.raw.get();
        // SAFETY: By the type invariant nobody else writes, as `taken` was not set before, and
        // nobody reads before it is registered. It stays where it is, being static. If this fails
        // then device mapper has not kept the pointer.
        to_result(unsafe {
            (*raw).module = module.as_ptr();
            bindings::dm_register_target(raw)
        })?;
        // INVARIANT: It was just registered.
        Ok(Self { target_type })
    }
}

impl<T: Target> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dm_unregister_target(self.target_type.raw.get()) };
    }
}

/// Declares a module that registers one target type and does nothing else.
///
/// `target:` names the type. After it come the fields of [`module!`](kernel::prelude::module),
/// without `type`.
macro_rules! module_dm {
    (target: $target:ty, $($info:tt)*) => {
        ::kernel::prelude::module! {
            type: DmModule,
            $($info)*
        }

        /// The module, which is its registration.
        struct DmModule {
            _registration: $crate::device_mapper::Registration<$target>,
        }

        impl ::kernel::Module for DmModule {
            fn init(module: &'static ::kernel::ThisModule) -> ::kernel::error::Result<Self> {
                static TARGET_TYPE: $crate::device_mapper::TargetType<$target> =
                    $crate::device_mapper::TargetType::new();

                Ok(Self {
                    _registration: $crate::device_mapper::Registration::new(&TARGET_TYPE, module)?,
                })
            }
        }
    };
}

pub(crate) use module_dm;

/// Returns the value of a module parameter, which are in `module_parameters` of a module's crate.
pub fn module_param<T: Copy>(param: &ModuleParamAccess<T>) -> T {
    #[cfg(kernel_since_7_3)]
    {
        param.value()
    }
    #[cfg(not(kernel_since_7_3))]
    {
        *param.value()
    }
}
