// SPDX-License-Identifier: GPL-2.0

//! Work in order on many threads: one reads ahead, all of them work on a batch, and results are taken in order, by
//! the caller or by a thread of their own. Whatever is in memory is bounded by the batch.

use std::{
    sync::{
        mpsc::{sync_channel, Receiver, SyncSender},
        Mutex, PoisonError,
    },
    thread::{self, JoinHandle},
};

use rayon::prelude::*;

use crate::error::Result;

/// Items of a batch per thread.
const ITEMS_PER_THREAD: usize = 2;

/// Items of a batch; as many are read ahead.
fn batch_items() -> usize {
    ITEMS_PER_THREAD * rayon::current_num_threads()
}

/// Calls `read` for every item on a thread of its own, `work` for what was read on all threads, and `take` for every
/// result in order.
///
/// # Errors
///
/// The first of them, in the order of the items.
pub fn run<I: Send, R: Send, T: Send>(
    items: impl Iterator<Item = I> + Send,
    read: impl Fn(I) -> Result<R> + Send,
    work: impl Fn(R) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let size = batch_items();
    let (queue, ready) = sync_channel(size);
    // The closure owns `ready`: once it returns, with an error or not, the thread cannot go on reading.
    thread::scope(move |scope| {
        scope.spawn(move || {
            for item in items {
                if queue.send(read(item)).is_err() {
                    break;
                }
            }
        });
        loop {
            let batch: Vec<Result<R>> = ready.iter().take(size).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let done: Vec<Result<T>> = batch.into_par_iter().map(|item| work(item?)).collect();
            done.into_iter().try_for_each(|item| take(item?))?;
        }
    })
}

/// As [`run`], with `take` on a thread of its own, so that no thread that works waits for it.
///
/// # Errors
///
/// As [`run`].
pub fn run_and_take_behind<I: Send, R: Send, T: Send>(
    items: impl Iterator<Item = I> + Send,
    read: impl Fn(I) -> Result<R> + Send,
    work: impl Fn(R) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()> + Send,
) -> Result<()> {
    thread::scope(|scope| {
        let (queue, done) = sync_channel(batch_items());
        let taker = scope.spawn(move || done.into_iter().try_for_each(&mut take));
        let mut gone = false;
        let result = run(items, read, work, |item| {
            // The taker ends early only with an error.
            gone = gone || queue.send(item).is_err();
            match gone {
                true => Err(crate::Error::new(
                    std::path::Path::new("-"),
                    "nobody takes results",
                )),
                false => Ok(()),
            }
        });
        drop(queue);
        match taker.join() {
            Ok(Err(e)) => Err(e),
            Ok(Ok(())) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// A thread that takes items in order, so that whoever makes them does not wait.
pub struct Behind<T> {
    /// Items on their way; the thread ends when this is gone.
    queue: Option<SyncSender<T>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl<T: Send + 'static> Behind<T> {
    /// Calls `take` for every item, while at most `ahead` wait.
    pub fn new(ahead: usize, mut take: impl FnMut(T) -> Result<()> + Send + 'static) -> Self {
        let (queue, items): (_, Receiver<T>) = sync_channel(ahead);
        Self {
            queue: Some(queue),
            thread: Some(thread::spawn(move || {
                items.into_iter().try_for_each(&mut take)
            })),
        }
    }

    /// Hands an item over.
    ///
    /// # Errors
    ///
    /// That of taking this or an earlier item.
    pub fn put(&mut self, item: T) -> Result<()> {
        let queue = self.queue.as_ref();
        if queue.is_some_and(|queue| queue.send(item).is_ok()) {
            return Ok(());
        }
        // The thread has ended, and it does so early only with an error.
        self.finish()
    }

    /// Waits until everything is taken.
    ///
    /// # Errors
    ///
    /// That of taking any item.
    pub fn finish(&mut self) -> Result<()> {
        match self.join() {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl<T> Behind<T> {
    /// Ends the thread, if that was not done before.
    fn join(&mut self) -> Option<thread::Result<Result<()>>> {
        self.queue = None;
        self.thread.take().map(JoinHandle::join)
    }
}

impl<T> Drop for Behind<T> {
    fn drop(&mut self) {
        // Whoever did not finish has another error to report.
        let _ = self.join();
    }
}

/// Things that are expensive to make and that one thread at a time can use: readers, compressors, and large buffers,
/// whose pages the system would have to clear again and again. Keeps what no thread is using.
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
        make: impl FnOnce() -> std::result::Result<T, E>,
        work: impl FnOnce(&mut T) -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        let mut item = match self.take() {
            Some(item) => item,
            None => make()?,
        };
        let result = work(&mut item);
        self.put(item);
        result
    }
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        sync::atomic::{AtomicU64, Ordering},
    };

    use super::*;
    use crate::Error;

    fn error(n: u64) -> Error {
        Error::new(Path::new("x"), n.to_string())
    }

    #[test]
    fn results_come_in_order_and_the_first_error_ends_it() {
        for behind in [false, true] {
            for bad in [None, Some(0), Some(63), Some(700)] {
                let mut taken = Vec::new();
                let read_items = AtomicU64::new(0);
                let read = |n| {
                    read_items.fetch_add(1, Ordering::Relaxed);
                    Ok(n)
                };
                let work = |n: u64| match bad {
                    Some(bad) if n >= bad => Err(error(n)),
                    _ => Ok(n),
                };
                let take = |n| {
                    taken.push(n);
                    Ok(())
                };
                let result = match behind {
                    false => run(0..1000, read, work, take),
                    true => run_and_take_behind(0..1000, read, work, take),
                };
                let wanted: Vec<u64> = (0..bad.unwrap_or(1000)).collect();
                assert_eq!(taken, wanted);
                match bad {
                    None => result.unwrap(),
                    Some(bad) => {
                        assert_eq!(result.unwrap_err().what(), bad.to_string());
                        let most = bad + 3 * batch_items() as u64 + 2;
                        assert!(read_items.load(Ordering::Relaxed) <= most);
                    }
                }
            }
        }
    }

    #[test]
    fn an_error_of_taking_ends_it() {
        let take = |n| if n == 5 { Err(error(n)) } else { Ok(()) };
        let result = run_and_take_behind(0..1000, Ok, Ok, take);
        assert_eq!(result.unwrap_err().what(), "5");
        let mut behind = Behind::new(2, take);
        let result = (0..1000).try_for_each(|n| behind.put(n));
        assert_eq!(result.unwrap_err().what(), "5");
    }
}
