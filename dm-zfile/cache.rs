// SPDX-License-Identifier: GPL-2.0

//! Blocks of which only a part was wanted.
//!
//! Whoever reads a file in small steps wants the next part of the same block soon, so a block that
//! was not read as a whole is decompressed into memory of the cache and stays there until the
//! place is needed. A block which is asked for again gets a second chance when the search for a
//! place comes by.
//!
//! One lock protects the list of places and is held for nothing but a look at it: blocks are
//! decompressed and copied without. Who misses a block that somebody else is decompressing waits
//! for that. A place gets its memory when it is first used.

use kernel::{
    new_condvar, new_spinlock,
    prelude::*,
    sync::{
        Arc,
        CondVar,
        SpinLock,
        UniqueArc, //
    },
};

/// The bytes of a block, which stay while somebody copies from them.
type Bytes = Arc<KVVec<u8>>;

/// What a place holds.
enum Content {
    /// No block.
    Nothing,
    /// This block, which is being decompressed.
    Pending(u64),
    /// This block.
    Block(u64, Bytes),
}

impl Content {
    fn is_of(&self, block: u64) -> bool {
        matches!(self, Content::Pending(number) | Content::Block(number, _) if *number == block)
    }

    fn bytes(&self) -> Option<&Bytes> {
        match self {
            Content::Block(_, bytes) => Some(bytes),
            _ => None,
        }
    }
}

/// A place for a block.
struct Place {
    content: Content,
    /// Whether the block was asked for again.
    used: bool,
}

/// The places, of which as many are in use as blocks were wanted, and the one to be looked at next.
struct Places {
    list: KVec<Place>,
    hand: usize,
}

impl Places {
    fn of(&mut self, block: u64) -> Option<&mut Place> {
        self.list
            .iter_mut()
            .find(|place| place.content.is_of(block))
    }

    /// Chooses the place for another block, and returns its number and content.
    fn replace(&mut self, block: u64) -> Option<(usize, Content)> {
        let pending = Place {
            content: Content::Pending(block),
            used: false,
        };
        let pending = match self.list.push_within_capacity(pending) {
            Ok(()) => return Some((self.list.len() - 1, Content::Nothing)),
            Err(error) => error.0,
        };
        // Twice around, everything has had its second chance.
        for _ in 0..self.list.len().saturating_mul(2) {
            let number = self.hand.checked_rem(self.list.len())?;
            self.hand = number + 1;
            let place = self.list.get_mut(number)?;
            if matches!(place.content, Content::Pending(_)) {
                continue;
            }
            if !core::mem::take(&mut place.used) {
                return Some((number, core::mem::replace(place, pending).content));
            }
        }
        None
    }
}

/// What the threads that use a cache share.
#[pin_data]
struct Shared {
    #[pin]
    places: SpinLock<Places>,
    /// Notified when a block is not pending any more.
    #[pin]
    decided: CondVar,
}

/// The cache of a target.
pub(super) struct Cache {
    shared: Pin<KBox<Shared>>,
    block_bytes: usize,
}

impl Cache {
    /// Creates a cache for `count` blocks, which has none yet.
    pub(super) fn new(count: usize, block_bytes: usize) -> Result<Self> {
        let places = Places {
            list: KVec::with_capacity(count, GFP_KERNEL)?,
            hand: 0,
        };
        Ok(Self {
            shared: KBox::pin_init(
                pin_init!(Shared {
                    places <- new_spinlock!(places),
                    decided <- new_condvar!(),
                }),
                GFP_KERNEL,
            )?,
            block_bytes,
        })
    }

    /// Shows the content of `block` to `found`, or returns [`None`] if it is not there.
    pub(super) fn find<R>(&self, block: u64, found: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let bytes = {
            let mut places = self.shared.places.lock();
            let place = places.of(block)?;
            let bytes = place.content.bytes()?.clone();
            place.used = true;
            bytes
        };
        Some(found(&bytes))
    }

    /// Has `fill` write the content of `block`, unless somebody else has meanwhile, and shows it to
    /// `found`.
    ///
    /// Returns [`None`], and calls neither, if there is no place for it.
    pub(super) fn fill<R, E>(
        &self,
        block: u64,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
        found: impl FnOnce(&[u8]) -> R,
    ) -> Option<Result<R, E>> {
        let (number, before) = {
            let mut places = self.shared.places.lock();
            loop {
                match places.of(block).map(|place| place.content.bytes().cloned()) {
                    Some(Some(bytes)) => {
                        drop(places);
                        return Some(Ok(found(&bytes)));
                    }
                    Some(None) => self.shared.decided.wait(&mut places),
                    None => break,
                }
            }
            places.replace(block)?
        };
        let (content, result) = match self.memory(before) {
            None => (Content::Nothing, None),
            Some(mut memory) => match fill(&mut memory) {
                Err(error) => (Content::Nothing, Some(Err(error))),
                Ok(()) => {
                    let bytes = Bytes::from(memory);
                    (Content::Block(block, bytes.clone()), Some(Ok(bytes)))
                }
            },
        };
        if let Some(place) = self.shared.places.lock().list.get_mut(number) {
            place.content = content;
        }
        self.shared.decided.notify_all();
        result.map(|result| result.map(|bytes| found(&bytes)))
    }

    /// The memory of what was in a place, unless somebody still copies from it, or else new memory.
    fn memory(&self, content: Content) -> Option<UniqueArc<KVVec<u8>>> {
        // This must not wait for memory.
        const FLAGS: kernel::alloc::Flags = GFP_NOWAIT;

        if let Content::Block(_, bytes) = content {
            if let Some(memory) = Arc::into_unique_or_drop(bytes) {
                return Some(Pin::into_inner(memory));
            }
        }
        let memory = KVVec::from_elem(0u8, self.block_bytes, FLAGS | __GFP_NOWARN).ok()?;
        UniqueArc::new(memory, FLAGS | __GFP_NOWARN).ok()
    }
}
