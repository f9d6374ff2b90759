// SPDX-License-Identifier: GPL-2.0

//! What all devices of a module share: it exists while there is one.

use super::bindings;
use core::{
    cell::UnsafeCell,
    ops::Deref,
    ptr::NonNull, //
};
use kernel::prelude::*;

/// A static that is made by its first user and dropped with the last.
///
/// # Invariants
///
/// `users` is accessed only while the lock of `lower_read_lock()` is held.
pub struct Shared<T: 'static> {
    users: UnsafeCell<Option<Users<T>>>,
}

/// The value, and how many [`SharedRef`]s there are.
struct Users<T> {
    count: usize,
    value: KBox<T>,
}

// SAFETY: By the type invariant `users` is accessed by one thread at a time. The value is lent to
// several threads, and dropped on any.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

/// Holds the lock of all [`Shared`]s of this module.
struct Guard;

impl Guard {
    fn new() -> Self {
        // SAFETY: Called where sleeping is allowed; no code that runs under the lock takes it.
        unsafe { bindings::lower_read_lock() };
        Self
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // SAFETY: `new()` has taken the lock.
        unsafe { bindings::lower_read_unlock() };
    }
}

impl<T: Send + Sync> Shared<T> {
    /// Creates a static without a value.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self {
            users: UnsafeCell::new(None),
        }
    }

    /// Returns the value, which `make` makes if nobody else uses it.
    ///
    /// `make` must not use another `Shared`. May sleep.
    pub fn get(&'static self, make: impl FnOnce() -> Result<T>) -> Result<SharedRef<T>> {
        let _guard = Guard::new();
        // SAFETY: The lock is held.
        let users = unsafe { &mut *self.users.get() };
        let users = match users {
            Some(users) => users,
            None => users.insert(Users {
                count: 0,
                value: KBox::new(make()?, GFP_KERNEL)?,
            }),
        };
        users.count += 1;
        // INVARIANT: This was just counted.
        Ok(SharedRef {
            shared: self,
            value: NonNull::from(&*users.value),
        })
    }
}

/// A user of a [`Shared`].
///
/// # Invariants
///
/// `value` is the value of `shared`, which counts this user.
pub struct SharedRef<T: Send + Sync + 'static> {
    shared: &'static Shared<T>,
    value: NonNull<T>,
}

// SAFETY: This is a reference to a `T`, which any thread may drop.
unsafe impl<T: Send + Sync> Send for SharedRef<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for SharedRef<T> {}

impl<T: Send + Sync> Deref for SharedRef<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: The value is in a box of its own and exists while this user is counted.
        unsafe { self.value.as_ref() }
    }
}

impl<T: Send + Sync> Drop for SharedRef<T> {
    fn drop(&mut self) {
        let unused = {
            let _guard = Guard::new();
            // SAFETY: The lock is held.
            let users = unsafe { &mut *self.shared.users.get() };
            match users {
                Some(users) if users.count > 1 => {
                    users.count -= 1;
                    None
                }
                _ => users.take(),
            }
        };
        drop(unused);
    }
}
