// SPDX-License-Identifier: GPL-2.0

//! Memory that the lower device reads into.
//!
//! Buffers are those of the module: what one read gives back serves the next, of whatever device,
//! so that nothing is allocated and cleared for each read. A buffer is contiguous in the address
//! space of the kernel. Up to [`CONTIGUOUS`] bytes it is also in memory, and each CPU keeps a few.
//! Larger ones are made of single pages, which can be had however fragmented memory is, and carry
//! the list of their pages for the bio. Of those as many are kept as are in use at the time, and one
//! for each CPU.
//!
//! A free buffer is linked by its first bytes, so keeping it takes no memory.

use super::bindings;
use core::{
    array,
    mem::{
        size_of,
        ManuallyDrop, //
    },
    ptr::{
        null_mut,
        NonNull, //
    },
};
use kernel::{
    cpu::{
        nr_cpu_ids,
        CpuId, //
    },
    new_spinlock,
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::SpinLock, //
};

/// Returns how many CPUs work now.
#[inline]
pub fn online_cpus() -> usize {
    // SAFETY: The function has no requirements.
    unsafe { bindings::num_online_cpus_now() as usize }
}

/// Bytes behind the data of a read that may be read as well: they are initialised, and say nothing.
///
/// Decompressors that look ahead need not check for the end of the input so often.
pub const MARGIN: usize = 64;

/// Bytes of the largest buffer that is contiguous in memory.
const CONTIGUOUS: usize = 32 << 10;

/// The kinds of buffers that are kept, by their bytes for data: a block or two, some blocks, a
/// piece, and what a device with large sectors takes for a piece.
const CLASSES: [usize; 4] = [
    (8 << 10) - MARGIN,
    CONTIGUOUS - MARGIN,
    128 << 10,
    256 << 10,
];

/// How many of each class a CPU keeps. Those that are not contiguous are kept for all CPUs.
const KEPT: [usize; CLASSES.len()] = [8, 2, 0, 0];

/// Bytes that the largest buffer has for data.
pub(super) const MAX_READ: usize = CLASSES[CLASSES.len() - 1];

/// A buffer, to be given back to where it came from.
///
/// # Invariants
///
/// `memory` is valid for reads and writes of `capacity + MARGIN` bytes, which are initialised, and
/// nobody else uses it. If [`Buffer::pages`] is not zero then `memory` comes from `vmalloc()` and
/// `capacity + MARGIN` bytes are followed, at the next multiple of the alignment, by as many
/// `bio_vec`s, one for each page.
pub(super) struct Buffer {
    memory: NonNull<u8>,
    capacity: usize,
    /// Its number in [`CLASSES`], if it is one of those that are kept.
    class: Option<usize>,
}

// SAFETY: The memory belongs to the buffer, wherever that is.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Allocates a buffer with room for `capacity` bytes.
    ///
    /// Without `wait` at once or not at all.
    fn new(capacity: usize, wait: bool) -> Option<Self> {
        // The alignment of contiguous memory then suits any device.
        let capacity = match capacity.checked_add(MARGIN)?.checked_next_power_of_two()? {
            size if size <= CONTIGUOUS => size - MARGIN,
            _ => capacity,
        };
        let table = Self::pages_of(capacity) * size_of::<bindings::bio_vec>();
        let size = Self::table_offset(capacity) + table;
        // SAFETY: The function has no requirements, except that it may sleep with `wait`.
        let memory = unsafe { bindings::alloc_read_buffer(size, table == 0, wait) };
        let memory = NonNull::new(memory.cast())?;
        // INVARIANT: The memory is new, and zeroed. It comes from `vmalloc()` if it is as large as
        // to have a table, which is made here.
        let this = Self {
            memory,
            capacity,
            class: None,
        };
        for page in 0..this.pages() {
            // SAFETY: The table has so many entries, and so many pages come before its end.
            unsafe {
                let address = memory.as_ptr().add(page << PAGE_SHIFT);
                this.table().add(page).write(bindings::bio_vec {
                    bv_page: bindings::vmalloc_to_page(address.cast()),
                    bv_len: PAGE_SIZE as c_uint,
                    bv_offset: 0,
                });
            }
        }
        Some(this)
    }

    /// Allocates a buffer with room for `capacity` bytes at least, and waits for it.
    ///
    /// Where contiguous memory is short, that is a larger one than needed, made of pages.
    pub(super) fn reserve(capacity: usize) -> Option<Self> {
        Self::new(capacity, true).or_else(|| Self::new(capacity.max(CONTIGUOUS), true))
    }

    /// Bytes for data.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Where the data begins. What is said of the buffer holds for this pointer.
    #[inline]
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Entries of the table.
    fn pages(&self) -> usize {
        Self::pages_of(self.capacity)
    }

    const fn pages_of(capacity: usize) -> usize {
        if capacity + MARGIN <= CONTIGUOUS {
            0
        } else {
            capacity.div_ceil(PAGE_SIZE)
        }
    }

    const fn table_offset(capacity: usize) -> usize {
        (capacity + MARGIN).next_multiple_of(align_of::<bindings::bio_vec>())
    }

    fn table(&self) -> *mut bindings::bio_vec {
        self.memory
            .as_ptr()
            .wrapping_add(Self::table_offset(self.capacity))
            .cast()
    }

    /// Makes `bio`, which has no memory yet, one that reads `len` bytes to the beginning of the
    /// buffer. `vec` is for its use.
    ///
    /// # Safety
    ///
    /// `bio` must be valid and have nothing but its operation, and `vec` valid for writes; the
    /// buffer and `vec` must not be used otherwise until the bio has completed. `len` must be not
    /// zero and at most the capacity.
    #[inline]
    pub(super) unsafe fn add_to(
        &self,
        bio: *mut bindings::bio,
        vec: *mut bindings::bio_vec,
        len: usize,
    ) {
        if self.pages() == 0 {
            // SAFETY: The memory is contiguous, and there is one `bio_vec` for it.
            unsafe {
                (*bio).bi_io_vec = vec;
                (*bio).bi_max_vecs = 1;
                bindings::bio_add_virt_nofail(bio, self.memory.as_ptr().cast(), len as c_uint);
            }
            return;
        }
        let pages = len.div_ceil(PAGE_SIZE);
        // SAFETY: The table has an entry for each page, `pages` is at least one and at most their
        // number, and by the type invariant nobody else uses the table.
        unsafe {
            let last = self.table().add(pages - 1);
            (*last).bv_len = (len - ((pages - 1) << PAGE_SHIFT)) as c_uint;
            (*bio).bi_io_vec = self.table();
            (*bio).bi_max_vecs = pages as u16;
            (*bio).bi_vcnt = pages as u16;
            (*bio).bi_iter.bi_size = len as c_uint;
        }
    }

    /// Has the CPU see what the device has written, after a bio of `len` bytes has completed.
    #[inline]
    pub(super) fn completed(&self, len: usize) {
        if self.pages() == 0 {
            return;
        }
        // SAFETY: The entry is that which `add_to()` has changed, and there is no bio any more.
        unsafe {
            (*self.table().add(len.div_ceil(PAGE_SIZE) - 1)).bv_len = PAGE_SIZE as c_uint;
            bindings::invalidate_read_buffer(self.memory.as_ptr().cast(), len as c_int);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: The memory came from `alloc_read_buffer()`, and nobody uses it any more.
        unsafe { bindings::kvfree(self.memory.as_ptr().cast()) };
    }
}

/// Free buffers of one class.
struct FreeList {
    first: *mut u8,
    count: usize,
    /// How many were taken out and not put back, where that is counted.
    in_use: usize,
}

/// Free buffers of all classes, linked by their first bytes.
///
/// # Invariants
///
/// What is linked are buffers of the class that nobody uses.
struct FreeLists([FreeList; CLASSES.len()]);

// SAFETY: The buffers belong to the lists, wherever those are.
unsafe impl Send for FreeLists {}

impl FreeLists {
    const fn new() -> Self {
        const EMPTY: FreeList = FreeList {
            first: null_mut(),
            count: 0,
            in_use: 0,
        };
        // INVARIANT: Nothing is linked.
        Self([EMPTY; CLASSES.len()])
    }

    #[inline]
    fn pop(&mut self, class: usize) -> Option<Buffer> {
        let list = self.0.get_mut(class)?;
        let memory = NonNull::new(list.first)?;
        // SAFETY: By the type invariant this is a free buffer, which starts with the link.
        list.first = unsafe { memory.cast::<*mut u8>().read() };
        list.count -= 1;
        // INVARIANT: The memory was a buffer of this class and is not linked any more.
        Some(Buffer {
            memory,
            capacity: *CLASSES.get(class)?,
            class: Some(class),
        })
    }

    #[inline]
    fn push(&mut self, class: usize, buffer: Buffer) {
        if let Some(list) = self.0.get_mut(class) {
            let buffer = ManuallyDrop::new(buffer);
            // SAFETY: Nobody uses the buffer. It is larger and more aligned than the link.
            unsafe { buffer.memory.cast::<*mut u8>().write(list.first) };
            // INVARIANT: The buffer is passed on.
            list.first = buffer.memory.as_ptr();
            list.count += 1;
        }
    }
}

impl Drop for FreeLists {
    fn drop(&mut self) {
        for class in 0..CLASSES.len() {
            while self.pop(class).is_some() {}
        }
    }
}

/// Free lists in cache lines of their own.
#[repr(align(64))]
#[pin_data]
struct Shelf {
    #[pin]
    free: SpinLock<FreeLists>,
}

impl Shelf {
    fn new() -> Result<Pin<KBox<Self>>> {
        KBox::pin_init(
            pin_init!(Self {
                free <- new_spinlock!(FreeLists::new()),
            }),
            GFP_KERNEL,
        )
    }
}

/// The buffers of the module that nobody uses now.
pub(super) struct Buffers {
    cpus: KVec<Pin<KBox<Shelf>>>,
    common: Pin<KBox<Shelf>>,
}

impl Buffers {
    /// Has none yet.
    pub(super) fn new() -> Result<Self> {
        let mut cpus = KVec::new();
        for _ in 0..nr_cpu_ids() {
            cpus.push(Shelf::new()?, GFP_KERNEL)?;
        }
        Ok(Self {
            cpus,
            common: Shelf::new()?,
        })
    }

    /// The lists of this CPU, or of the one that this was a moment ago; and how many they keep.
    #[inline]
    fn here(&self, class: usize) -> Option<(&Shelf, usize)> {
        let kept = *KEPT.get(class).filter(|kept| **kept != 0)?;
        let shelf = self.cpus.get(CpuId::current().as_u32() as usize)?;
        Some((shelf, kept))
    }

    /// Returns a buffer with room for `len` bytes, if one can be had at once.
    ///
    /// Where contiguous memory is short, that is a larger one than needed, made of pages.
    #[inline]
    pub(super) fn get(&self, len: usize) -> Option<Buffer> {
        let smallest = CLASSES.iter().position(|capacity| *capacity >= len)?;
        (smallest..CLASSES.len()).find_map(|class| self.get_of_class(class))
    }

    #[inline]
    fn get_of_class(&self, class: usize) -> Option<Buffer> {
        let kept = if let Some((shelf, _)) = self.here(class) {
            shelf.free.lock().pop(class)
        } else {
            let mut free = self.common.free.lock();
            free.0.get_mut(class)?.in_use += 1;
            free.pop(class)
        };
        let buffer = kept.or_else(|| {
            let mut buffer = Buffer::new(*CLASSES.get(class)?, false)?;
            buffer.class = Some(class);
            Some(buffer)
        });
        if buffer.is_none() && self.here(class).is_none() {
            self.common.free.lock().0.get_mut(class)?.in_use -= 1;
        }
        buffer
    }

    /// Keeps `buffer`, or frees it where there are enough. One that did not come from here is freed.
    #[inline]
    pub(super) fn put(&self, buffer: Buffer) {
        let Some(class) = buffer.class else {
            return;
        };
        if let Some((shelf, kept)) = self.here(class) {
            let mut free = shelf.free.lock();
            if free.0.get(class).is_some_and(|list| list.count < kept) {
                free.push(class, buffer);
            }
            return;
        }
        let mut free = self.common.free.lock();
        free.push(class, buffer);
        let Some(list) = free.0.get_mut(class) else {
            return;
        };
        list.in_use -= 1;
        // One more is free and one less in use, so there may be two too many.
        let wanted = list.in_use + online_cpus();
        let surplus = list.count.saturating_sub(wanted).min(2);
        let surplus: [_; 2] = array::from_fn(|number| (number < surplus).then(|| free.pop(class)));
        // What is freed here is freed without the lock.
        drop(free);
        drop(surplus);
    }

    /// Whether `buffer` is one of those, not the reserve of a device.
    #[inline]
    pub(super) fn owns(buffer: &Buffer) -> bool {
        buffer.class.is_some()
    }
}
