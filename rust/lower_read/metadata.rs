// SPDX-License-Identifier: GPL-2.0

//! Reads of metadata by constructors.
//!
//! A constructor may have to read from hundreds of devices. [`read_metadata_batch`] takes
//! all that can be read at the same time and keeps a number of requests in flight over all
//! devices, so the whole takes about as long as the slowest device, not as long as all together.
//!
//! Ranges are arbitrary in bytes. What is sent to a device is extended to its logical blocks and
//! goes through buffers, whose memory is bounded by [`MAX_IN_FLIGHT`] times [`CHUNK`] bytes.

use super::bindings;
use crate::device_mapper::{
    Constructor,
    TargetDevice,
    SECTOR_SHIFT, //
};
use core::ptr::{
    null_mut,
    NonNull, //
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    sync::Completion, //
};

/// The largest request sent to a device, in bytes. A multiple of every logical block size.
const CHUNK: usize = 128 << 10;

/// The largest number of requests in flight.
const MAX_IN_FLIGHT: usize = 32;

/// A range of bytes to be read from a device into memory, and the outcome.
pub struct ReadRequest<'a> {
    device: &'a TargetDevice,
    offset: u64,
    buf: &'a mut [u8],
    result: Result,
}

impl<'a> ReadRequest<'a> {
    /// Creates a request to fill `buf` from byte `offset` of `device`.
    pub fn new(device: &'a TargetDevice, offset: u64, buf: &'a mut [u8]) -> Self {
        Self {
            device,
            offset,
            buf,
            result: Ok(()),
        }
    }

    /// Returns the outcome.
    ///
    /// The content of the buffer is unspecified unless this is [`Ok`].
    pub fn result(&self) -> Result {
        self.result
    }
}

/// The part of a request that one I/O covers.
struct Chunk {
    bdev: NonNull<bindings::block_device>,
    /// First sector and number of sectors of the I/O.
    sector: u64,
    sectors: u64,
    /// The index of the request.
    request: usize,
    /// The offset of the wanted bytes in the I/O and in the request, and how many they are.
    skip: usize,
    buf_offset: usize,
    len: usize,
}

impl Chunk {
    /// Returns the chunk that starts at byte `done` of request number `request`, not empty.
    ///
    /// Fails if the request leaves the device.
    fn new(
        ctx: &Constructor<'_>,
        request: usize,
        req: &ReadRequest<'_>,
        done: usize,
    ) -> Result<Self> {
        let bdev = ctx.bdev(req.device)?;
        let size = ctx.device_sectors(req.device)?;
        let block_sectors = u64::from(ctx.logical_block_size(req.device)? >> SECTOR_SHIFT).max(1);
        let block = block_sectors << SECTOR_SHIFT;

        let end = req.offset.checked_add(req.buf.len() as u64).ok_or(EINVAL)?;
        if end.div_ceil(1 << SECTOR_SHIFT) > size {
            return Err(EINVAL);
        }

        // Nothing overflows from here on, as everything is inside the device.
        let start = req.offset + done as u64;
        let skip = (start % block) as usize;
        let len = req.buf.len().saturating_sub(done).min(CHUNK - skip);
        let sectors = ((skip + len) as u64).div_ceil(block) * block_sectors;
        let sector = (start >> SECTOR_SHIFT) / block_sectors * block_sectors;
        Ok(Self {
            bdev,
            sector,
            sectors: sectors.min(size - sector),
            request,
            skip,
            buf_offset: done,
            len,
        })
    }
}

/// What the completion of an I/O needs.
#[pin_data]
struct IoState {
    #[pin]
    done: Completion,
    failed: Atomic<bool>,
}

impl IoState {
    fn new() -> Result<Pin<KBox<Self>>> {
        KBox::pin_init(
            pin_init!(Self {
                done <- Completion::new(),
                failed: Atomic::new(false),
            }),
            GFP_KERNEL,
        )
    }

    /// Called when the I/O has ended.
    ///
    /// # Safety
    ///
    /// `context` must be a valid `IoState` until `done` is completed.
    unsafe extern "C" fn notify(error: c_ulong, unsup: c_ulong, context: *mut c_void) {
        // SAFETY: As required from the caller.
        let this = unsafe { &*context.cast::<Self>() };
        if error != 0 || unsup != 0 {
            this.failed.store(true, Relaxed);
        }
        // `this` is not used after this.
        this.done.complete_all();
    }
}

/// A buffer with at most one I/O that fills it.
///
/// # Invariants
///
/// While `io` is something, an I/O has been submitted which writes to `buf` and uses the state until
/// it completes that.
struct Slot {
    buf: VVec<u8>,
    io: Option<(Chunk, Pin<KBox<IoState>>)>,
}

impl Slot {
    fn new() -> Self {
        Self {
            buf: VVec::new(),
            io: None,
        }
    }

    /// Starts to read `chunk`.
    fn start(&mut self, client: &Client, chunk: Chunk) -> Result {
        if self.io.is_some() {
            return Err(EBUSY);
        }
        let len = (chunk.sectors << SECTOR_SHIFT) as usize;
        if self.buf.len() < len {
            self.buf = VVec::from_elem(0u8, len, GFP_KERNEL)?;
        }
        let state = IoState::new()?;

        let mut region = bindings::dm_io_region {
            bdev: chunk.bdev.as_ptr(),
            sector: chunk.sector,
            count: chunk.sectors,
        };
        let mut request = bindings::dm_io_request {
            bi_opf: bindings::req_op_REQ_OP_READ | bindings::REQ_META,
            mem: bindings::dm_io_memory {
                type_: bindings::dm_io_mem_type_DM_IO_VMA,
                offset: 0,
                ptr: bindings::dm_io_memory__bindgen_ty_1 {
                    vma: self.buf.as_mut_ptr().cast(),
                },
            },
            notify: bindings::dm_io_notify {
                fn_: Some(IoState::notify),
                context: core::ptr::from_ref(&*state).cast_mut().cast(),
            },
            client: client.0.as_ptr(),
        };
        // SAFETY: The device is open, as its instance is under construction. The buffer is
        // vmalloc memory of at least `len` bytes. It and the state stay as they are until the
        // I/O has completed, since all that ends their life waits for it first. Requests and
        // regions are not used after the call.
        to_result(unsafe {
            bindings::dm_io(&mut request, 1, &mut region, null_mut(), null_mut(), 0)
        })?;
        // INVARIANT: The I/O was submitted.
        self.io = Some((chunk, state));
        Ok(())
    }

    /// Waits for the I/O, if there is one, and returns what was read or [`None`] if that failed.
    fn wait(&mut self) -> Option<(Chunk, Option<&[u8]>)> {
        // INVARIANT: It is waited for right away.
        let (chunk, state) = self.io.take()?;
        state.done.wait_for_completion();
        let data = if state.failed.load(Relaxed) {
            None
        } else {
            self.buf
                .get(chunk.skip..)
                .and_then(|data| data.get(..chunk.len))
        };
        Some((chunk, data))
    }

    /// Waits for the I/O, if there is one, and passes the result to its request.
    fn finish(&mut self, requests: &mut [ReadRequest<'_>]) {
        let Some((chunk, data)) = self.wait() else {
            return;
        };
        let Some(request) = requests.get_mut(chunk.request) else {
            return;
        };
        let dest = request
            .buf
            .get_mut(chunk.buf_offset..)
            .and_then(|dest| dest.get_mut(..chunk.len));
        match (dest, data) {
            (Some(dest), Some(data)) => dest.copy_from_slice(data),
            _ => request.result = Err(EIO),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}

/// A `struct dm_io_client`.
///
/// # Invariants
///
/// The pointer is a client that nobody else destroys.
struct Client(NonNull<bindings::dm_io_client>);

impl Client {
    fn new() -> Result<Self> {
        // SAFETY: The function has no requirements.
        let client = from_err_ptr(unsafe { bindings::dm_io_client_create() })?;
        // INVARIANT: The client was just created.
        NonNull::new(client).map(Self).ok_or(ENOMEM)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::dm_io_client_destroy(self.0.as_ptr()) };
    }
}

/// Reads the bytes from `offset` of `device` on into `buf`.
///
/// Fails with `EINVAL` if that is not all inside the device, and with `EIO` if it cannot be
/// read.
pub fn read_metadata(
    ctx: &Constructor<'_>,
    device: &TargetDevice,
    offset: u64,
    buf: &mut [u8],
) -> Result {
    let mut requests = [ReadRequest::new(device, offset, buf)];
    read_metadata_batch(ctx, &mut requests)?;
    requests[0].result()
}

/// Carries out all of `requests`, overlapping as many as possible, and returns when all of
/// them have ended.
///
/// Fails only if nothing could be done for lack of memory; then no result means anything.
/// Whether a range could be read is the [result](ReadRequest::result) of its request, as
/// with [`read_metadata`].
pub fn read_metadata_batch(ctx: &Constructor<'_>, requests: &mut [ReadRequest<'_>]) -> Result {
    // The slots wait for their I/O when they are dropped, so they must go before the client.
    let client = Client::new()?;
    let mut slots = KVec::<Slot>::new();
    let mut next = 0;

    for index in 0..requests.len() {
        let mut done = 0;
        while let Some(request) = requests.get_mut(index) {
            if done >= request.buf.len() || request.result.is_err() {
                break;
            }
            let chunk = match Chunk::new(ctx, index, request, done) {
                Ok(chunk) => chunk,
                Err(err) => {
                    request.result = Err(err);
                    break;
                }
            };
            done += chunk.len;

            if slots.len() < MAX_IN_FLIGHT {
                slots.push(Slot::new(), GFP_KERNEL)?;
                next = slots.len() - 1;
            } else {
                next = (next + 1) % MAX_IN_FLIGHT;
            }
            if let Some(slot) = slots.get_mut(next) {
                slot.finish(requests);
                slot.start(&client, chunk)?;
            }
        }
    }
    for slot in &mut slots {
        slot.finish(requests);
    }
    Ok(())
}
