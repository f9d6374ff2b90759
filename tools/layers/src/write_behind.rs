// SPDX-License-Identifier: GPL-2.0

//! Writing on a thread of its own, so that the threads that compress do not wait for the file.

use std::{
    sync::{
        mpsc::{sync_channel, Receiver, SyncSender},
        Arc,
    },
    thread::{self, JoinHandle},
};

use crate::{error::Result, output::Output, pool::Pool};

/// A buffer, and how many of its bytes count.
type Part = (Vec<u8>, usize);

/// Writes buffers one after the other to an [`Output`].
pub struct WriteBehind {
    /// Buffers on their way; the thread ends when this is gone.
    queue: Option<SyncSender<Part>>,
    thread: Option<JoinHandle<Result<()>>>,
    position: u64,
}

impl WriteBehind {
    /// Writes to `output` from byte `start` on, while at most `ahead` buffers wait; those that are written
    /// go to `written`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(
        output: &Output,
        start: u64,
        ahead: usize,
        written: Arc<Pool<Vec<u8>>>,
    ) -> Result<Self> {
        let output = output.duplicate()?;
        let (queue, parts) = sync_channel(ahead);
        let write = move |parts: Receiver<Part>| {
            let mut at = start;
            for (data, used) in parts {
                output.write_at(&data[..used], at)?;
                at += used as u64;
                written.put(data);
            }
            Ok(())
        };
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread::spawn(move || write(parts))),
            position: start,
        })
    }

    /// Byte at which the next buffer goes.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Writes the first `used` bytes of `data`.
    ///
    /// # Errors
    ///
    /// The system's, of this or an earlier write.
    pub fn write(&mut self, data: Vec<u8>, used: usize) -> Result<()> {
        self.position += used as u64;
        let queue = self.queue.as_ref();
        if queue.is_some_and(|queue| queue.send((data, used)).is_ok()) {
            return Ok(());
        }
        // The thread has ended, and it does so early only with an error.
        self.wait()
    }

    /// Waits until everything is written; returns the byte after the last.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn finish(mut self) -> Result<u64> {
        self.wait()?;
        Ok(self.position)
    }

    fn wait(&mut self) -> Result<()> {
        match self.join() {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }

    /// Ends the thread, if that was not done before.
    fn join(&mut self) -> Option<thread::Result<Result<()>>> {
        self.queue = None;
        self.thread.take().map(JoinHandle::join)
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        // Whoever did not finish has another error to report.
        let _ = self.join();
    }
}
