// SPDX-License-Identifier: GPL-2.0

//! The queue of a device: its thread takes requests from the kernel and gives back those that are answered, by io_uring. Who
//! answers writes the data to the character device, on any thread.

#![allow(unsafe_code)]

use std::{
    collections::VecDeque,
    fs::File,
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use io_uring::{opcode, types::Fd, IoUring};
use rustix::event::{eventfd, EventfdFlags};
use zerocopy::IntoBytes;

use crate::{
    abi::{data_offset, Descriptor, IoCommand, COMMIT_AND_FETCH, FETCH, OP_MASK, OP_READ},
    control::{DEPTH, MAX_IO_BYTES},
};

/// What waiting for the eventfd is known by; tags are less.
const WAKE: u64 = u64::MAX;
const SECTOR_SHIFT: u32 = 9;
/// Something can be read.
const POLLIN: u32 = libc::POLLIN as u32;

/// What requests share with the thread of the queue.
struct Shared {
    device: File,
    answered: Mutex<VecDeque<(u16, i32)>>,
    wake: OwnedFd,
}

/// A read that somebody waits for. One that is dropped is answered by an error.
pub struct Request {
    /// First byte.
    pub start: u64,
    /// Bytes, at least one sector.
    pub bytes: u32,
    tag: u16,
    /// None once it is answered.
    shared: Option<Arc<Shared>>,
}

impl Request {
    /// Gives `data`, which follows the first `at` bytes of it.
    ///
    /// # Errors
    ///
    /// The system's, and more bytes than were asked for.
    pub fn write(&self, data: &[u8], at: u32) -> io::Result<()> {
        let end = (at as usize).checked_add(data.len());
        if end.is_none_or(|end| end > self.bytes as usize) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match &self.shared {
            Some(shared) => shared
                .device
                .write_all_at(data, data_offset(self.tag, at.into())),
            None => Ok(()),
        }
    }

    /// Says that all of its data was written.
    pub fn complete(mut self) {
        self.answer(self.bytes as i32);
    }

    fn answer(&mut self, result: i32) {
        let Some(shared) = self.shared.take() else {
            return;
        };
        let mut answered = shared
            .answered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        answered.push_back((self.tag, result));
        drop(answered);
        // A counter that cannot be added to does wake the thread.
        let _ = rustix::io::write(&shared.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.answer(-libc::EIO);
    }
}

/// The descriptors of requests, which the kernel writes.
///
/// # Invariants
///
/// `start` is that of a mapping of `DEPTH` descriptors, which is unmapped when this is dropped.
struct Descriptors {
    start: NonNull<libc::c_void>,
}

impl Descriptors {
    fn bytes() -> usize {
        let page = rustix::param::page_size();
        (usize::from(DEPTH) * size_of::<Descriptor>()).next_multiple_of(page)
    }

    fn map(device: &File) -> io::Result<Self> {
        // SAFETY: A new mapping at an address that the kernel chooses touches nothing of this process.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::bytes(),
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                device.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(start).filter(|start| start.as_ptr() != libc::MAP_FAILED) {
            // INVARIANT: The driver maps the descriptors of queue 0 at offset 0, `DEPTH` of them (ublk_ch_mmap()).
            Some(start) => Ok(Self { start }),
            None => Err(io::Error::last_os_error()),
        }
    }

    /// That of a request which the kernel has given to this thread, and so does not write to.
    fn of(&self, tag: u16) -> Option<Descriptor> {
        if tag >= DEPTH {
            return None;
        }
        let first = self.start.cast::<Descriptor>();
        // SAFETY: By the invariant there are `DEPTH` descriptors from there on, and `tag` is less. They are aligned, as a
        // mapping is, and any bytes are a value of one. Nothing borrows them: the kernel may write to others meanwhile.
        Some(unsafe { first.add(usize::from(tag)).read_volatile() })
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: By the invariant this is a mapping of that size, and nothing else has a pointer into it.
        unsafe { libc::munmap(self.start.as_ptr(), Self::bytes()) };
    }
}

/// A queue that is not served yet.
pub struct Queue {
    shared: Arc<Shared>,
    descriptors: Descriptors,
}

// SAFETY: The mapping belongs to the process, not to the thread that made it, and only the owner of the queue reads it.
unsafe impl Send for Queue {}

impl Queue {
    /// That of a device, by its character device.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(device: File) -> io::Result<Self> {
        Ok(Self {
            descriptors: Descriptors::map(&device)?,
            shared: Arc::new(Shared {
                device,
                answered: Mutex::default(),
                wake: eventfd(0, EventfdFlags::CLOEXEC)?,
            }),
        })
    }

    /// Hands each read to `serve`, which must not wait, until the device is no more.
    ///
    /// # Errors
    ///
    /// The system's. Nobody serves the device then, and another process can.
    pub fn run(self, mut serve: impl FnMut(Request)) -> io::Result<()> {
        // As many as all requests at once, and the eventfd.
        let mut ring = IoUring::builder().build(2 * u32::from(DEPTH))?;
        for tag in 0..DEPTH {
            self.push(&mut ring, Entry::Command(FETCH, tag, 0))?;
        }
        // Tags that the kernel has or may get back: all of them may be with who serves at one moment.
        let mut tags = DEPTH;
        self.push(&mut ring, Entry::Wake)?;
        let mut done: Vec<(u64, i32)> = Vec::with_capacity(usize::from(DEPTH) + 1);
        while tags > 0 {
            match ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            done.extend(
                ring.completion()
                    .map(|entry| (entry.user_data(), entry.result())),
            );
            for (who, result) in done.drain(..) {
                if who == WAKE {
                    self.give_back(&mut ring)?;
                    continue;
                }
                match result {
                    0 => self.take(who as u16, &mut serve),
                    // The device is no more, or goes to another server.
                    _ => tags -= 1,
                }
            }
        }
        Ok(())
    }

    /// Tells the kernel which requests were answered.
    fn give_back(&self, ring: &mut IoUring) -> io::Result<()> {
        let mut counter = [0; 8];
        rustix::io::read(&self.shared.wake, &mut counter)?;
        let answered: Vec<_> = self
            .shared
            .answered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
            .collect();
        for (tag, result) in &answered {
            self.push(ring, Entry::Command(COMMIT_AND_FETCH, *tag, *result))?;
        }
        self.push(ring, Entry::Wake)
    }

    /// Hands over a request that the kernel has given.
    fn take(&self, tag: u16, serve: &mut impl FnMut(Request)) {
        // The kernel knows no other tags than it was given.
        let Some(descriptor) = self.descriptors.of(tag) else {
            return;
        };
        let bytes = u64::from(descriptor.sectors) << SECTOR_SHIFT;
        let is_read = descriptor.operation & OP_MASK == OP_READ && bytes <= MAX_IO_BYTES.into();
        let mut request = Request {
            start: descriptor.start.saturating_mul(1 << SECTOR_SHIFT),
            bytes: bytes as u32,
            tag,
            shared: Some(self.shared.clone()),
        };
        match is_read {
            true => serve(request),
            // The device is read-only: the kernel lets nothing else through.
            false => request.answer(-libc::EOPNOTSUPP),
        }
    }

    fn push(&self, ring: &mut IoUring, entry: Entry) -> io::Result<()> {
        let entry = match entry {
            Entry::Wake => opcode::PollAdd::new(Fd(self.shared.wake.as_raw_fd()), POLLIN)
                .build()
                .user_data(WAKE),
            Entry::Command(number, tag, result) => {
                let command = IoCommand {
                    queue: 0,
                    tag,
                    result,
                    address: 0,
                };
                let mut bytes = [0; 16];
                bytes.copy_from_slice(command.as_bytes());
                opcode::UringCmd16::new(Fd(self.shared.device.as_raw_fd()), number)
                    .cmd(bytes)
                    .build()
                    .user_data(tag.into())
            }
        };
        // SAFETY: Both kinds of entries have all that they are about in themselves: the kernel reads and writes no memory of
        // this process for them. The device was made to have its data copied by pwrite().
        let pushed = unsafe { ring.submission().push(&entry) };
        pushed.map_err(|_| io::ErrorKind::ResourceBusy.into())
    }
}

/// What is given to the ring.
enum Entry {
    /// Waits for the eventfd.
    Wake,
    /// To the driver: number, tag and result.
    Command(u32, u16, i32),
}
