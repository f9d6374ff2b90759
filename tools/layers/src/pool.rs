// SPDX-License-Identifier: GPL-2.0

//! Things that are expensive to make and that one thread at a time can use: readers, compressors, and
//! large buffers, whose pages the system would have to clear again and again.

use std::sync::{Mutex, PoisonError};

/// Keeps what no thread is using.
pub struct Pool<T> {
    idle: Mutex<Vec<T>>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self {
            idle: Mutex::default(),
        }
    }
}

impl<T> Pool<T> {
    /// An idle one, if there is any.
    pub fn take(&self) -> Option<T> {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
    }

    /// Keeps `item` for the next that needs one.
    pub fn put(&self, item: T) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(item);
    }

    /// Lets `work` use an idle one, or what `make` makes if there is none.
    ///
    /// # Errors
    ///
    /// Those of `make` and `work`.
    pub fn with<R, E>(
        &self,
        make: impl FnOnce() -> Result<T, E>,
        work: impl FnOnce(&mut T) -> Result<R, E>,
    ) -> Result<R, E> {
        let mut item = match self.take() {
            Some(item) => item,
            None => make()?,
        };
        let result = work(&mut item);
        self.put(item);
        result
    }
}
