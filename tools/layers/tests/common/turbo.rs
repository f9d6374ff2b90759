// SPDX-License-Identifier: GPL-2.0

//! TurboOCI layers, entry by entry.

#![allow(dead_code, missing_docs)]

use ovbd_image::lsmt::{Entry, Identity, UuidText};

pub const VIRTUAL_BYTES: u64 = 1 << 20;

/// The blob of a layer as the original leaves it: header, `data`, as many entries as there are, and the trailer.
pub fn blob(data: &[u8], entries: &[Entry]) -> Vec<u8> {
    let identity = Identity {
        virtual_size: VIRTUAL_BYTES,
        uuid: UuidText::new(b"01234567-89ab-cdef-0123-456789abcdef").unwrap(),
        parent_uuid: UuidText::NIL,
    };
    let mut bytes = identity.header().to_vec();
    bytes.extend_from_slice(data);
    let index_offset = bytes.len() as u64;
    for entry in entries {
        bytes.extend_from_slice(&entry.encode());
    }
    bytes.extend_from_slice(&identity.trailer(index_offset, entries.len() as u64));
    bytes
}
