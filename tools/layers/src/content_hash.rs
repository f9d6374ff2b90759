// SPDX-License-Identifier: GPL-2.0

//! UUIDs of layers, derived from what a layer changes.
//!
//! The same change of the same parent gives the same UUID, whether it was found by comparing images or in a COW
//! store, whatever the chunks of the store, and however the layer is stored. So a change is hashed in units that are
//! the same everywhere: aligned blocks of 4 KiB, of which the last may be shorter, in ascending order.

use ovbd_image::lsmt::{UuidText, SECTOR_BYTES};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;

use crate::zeros::GRANULE_BYTES;

/// Marks the number of a block that became zero.
const ZEROED: u64 = 1 << 63;

/// What identifies some changed blocks. Those of different parts can be made at once.
#[derive(Clone, Debug, Default)]
pub struct Summary(Vec<u8>);

impl Summary {
    /// The whole block, at sector `start`, now holds `data`; or zeros, where there is none.
    pub fn add(&mut self, start: u64, data: Option<&[u8]>) {
        let block = start / (GRANULE_BYTES as u64 / SECTOR_BYTES);
        match data {
            // The hash only has to tell contents apart, at a fraction of the cost of compressing them.
            Some(data) => {
                self.0.extend_from_slice(&block.to_le_bytes());
                self.0.extend_from_slice(&xxh3_128(data).to_le_bytes());
            }
            None => self.0.extend_from_slice(&(block | ZEROED).to_le_bytes()),
        }
    }
}

/// The hash of all that a layer changes.
#[derive(Clone, Debug, Default)]
pub struct ContentHash(Sha256);

impl ContentHash {
    /// Adds changes, which follow all earlier ones.
    pub fn add(&mut self, summary: &Summary) {
        self.0.update(&summary.0);
    }

    /// The UUID, of version 8 (custom), of a layer of `virtual_size` bytes over `parent`.
    pub fn uuid(mut self, virtual_size: u64, parent: UuidText) -> UuidText {
        self.0
            .update(virtual_size.next_multiple_of(SECTOR_BYTES).to_le_bytes());
        self.0.update(parent.as_str().to_ascii_uppercase());
        let hash = self.0.finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash[..16]);
        uuid_text(uuid::Uuid::new_v8(bytes))
    }
}

/// A UUID as the original writes it: in upper case.
pub fn uuid_text(uuid: uuid::Uuid) -> UuidText {
    let mut buffer = uuid::Uuid::encode_buffer();
    let text = uuid.hyphenated().encode_upper(&mut buffer);
    UuidText::new(text.as_bytes()).unwrap_or(UuidText::NIL)
}
