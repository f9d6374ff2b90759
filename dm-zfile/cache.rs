// SPDX-License-Identifier: GPL-2.0

//! Blocks of which only a part was wanted.
//!
//! Whoever reads a file in small steps wants the next part of the same block soon, so a block that
//! was not read as a whole is decompressed into memory of the cache and stays there until the
//! place is needed. A block which is asked for again gets a second chance when the search for a
//! place comes by.

use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Mutex, //
    },
};

/// No block has this number.
const NOTHING: u64 = u64::MAX;

/// What a place holds.
///
/// # Invariants
///
/// If `block` is not [`NOTHING`] then `bytes` starts with the content of that block.
struct Content {
    block: u64,
    bytes: KVVec<u8>,
}

/// A place for a block.
#[pin_data]
struct Place {
    /// The number of the block, as a hint: it is read without the lock.
    hint: Atomic<u64>,
    /// Whether the block was asked for again.
    used: Atomic<bool>,
    #[pin]
    content: Mutex<Content>,
}

impl Place {
    fn new(block_bytes: usize) -> Result<Pin<KBox<Self>>> {
        // INVARIANT: There is no block in it.
        let content = Content {
            block: NOTHING,
            bytes: KVVec::from_elem(0u8, block_bytes, GFP_KERNEL)?,
        };
        KBox::pin_init(
            try_pin_init!(Self {
                hint: Atomic::new(NOTHING),
                used: Atomic::new(false),
                content <- new_mutex!(content),
            }),
            GFP_KERNEL,
        )
    }
}

/// The cache of a target.
pub(super) struct Cache {
    places: KVec<Pin<KBox<Place>>>,
    hand: Atomic<usize>,
}

impl Cache {
    /// Allocates a cache of `count` blocks.
    pub(super) fn new(count: usize, block_bytes: usize) -> Result<Self> {
        let mut places = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            places.push(Place::new(block_bytes)?, GFP_KERNEL)?;
        }
        Ok(Self {
            places,
            hand: Atomic::new(0),
        })
    }

    /// Shows the content of `block` to `found`, or returns [`None`] if it is not there.
    pub(super) fn find<R>(&self, block: u64, found: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let place = self
            .places
            .iter()
            .find(|place| place.hint.load(Relaxed) == block)?;
        let content = place.content.lock();
        if content.block != block {
            return None;
        }
        place.used.store(true, Relaxed);
        Some(found(&content.bytes))
    }

    /// Has `fill` write the content of `block`, and shows it to `found`.
    ///
    /// Returns [`None`], and calls neither, if there are no places.
    pub(super) fn fill<R, E>(
        &self,
        block: u64,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
        found: impl FnOnce(&[u8]) -> R,
    ) -> Option<Result<R, E>> {
        let place = self.place()?;
        let mut content = place.content.lock();
        let content = &mut *content;
        // INVARIANT: The block is forgotten before its bytes change.
        content.block = NOTHING;
        place.hint.store(NOTHING, Relaxed);
        if let Err(error) = fill(&mut content.bytes) {
            return Some(Err(error));
        }
        // INVARIANT: The block is there.
        content.block = block;
        place.used.store(false, Relaxed);
        place.hint.store(block, Relaxed);
        Some(Ok(found(&content.bytes)))
    }

    /// Returns the place to be used next.
    fn place(&self) -> Option<&Place> {
        let mut last = None;
        // Twice around, everything has had its second chance.
        for _ in 0..self.places.len().saturating_mul(2) {
            let hand = self.hand.fetch_add(1, Relaxed) % self.places.len();
            let place = self.places.get(hand)?;
            last = Some(&**place);
            if !place.used.load(Relaxed) {
                break;
            }
            place.used.store(false, Relaxed);
        }
        last
    }
}
