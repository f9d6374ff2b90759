// SPDX-License-Identifier: GPL-2.0

//! A read of the device, and the pieces of blobs that it waits for.

use std::{
    sync::{
        atomic::{AtomicUsize, Ordering},
        Mutex, PoisonError,
    },
    time::Instant,
};

use ovbd_oci::{chunk_range, CHUNK_BYTES};
use ovbd_ublk::Request;

use crate::layout::Layout;

/// Bytes of a chunk of a blob that a read wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which of the blobs.
    pub blob: usize,
    /// Which chunk of it.
    pub chunk: u64,
    /// First byte in the chunk.
    pub from: u64,
    /// Bytes.
    pub bytes: u64,
    /// Where in the read they go.
    pub to: u32,
}

/// The pieces of `bytes` from byte `start` of the device on. What is after the end of a blob is zeros, of which a read begins
/// with.
pub fn pieces(layout: &Layout, start: u64, bytes: u32) -> Vec<Piece> {
    let mut found = Vec::new();
    let end = start.saturating_add(bytes.into());
    let mut at = start;
    while at < end {
        let Some(blob) = layout.blob_at(at) else {
            break;
        };
        let (first, size) = layout.place(blob).unwrap_or_default();
        let inside = at - first;
        if inside >= size {
            // The zeros behind it.
            at = layout.place(blob + 1).map_or(end, |(next, _)| next);
            continue;
        }
        let chunk = inside / CHUNK_BYTES;
        let (chunk_start, chunk_bytes) = chunk_range(chunk, size);
        let from = inside - chunk_start;
        let bytes = (chunk_bytes - from).min(end - at);
        found.push(Piece {
            blob,
            chunk,
            from,
            bytes,
            to: (at - start) as u32,
        });
        at += bytes;
    }
    found
}

/// A read that waits for pieces.
pub struct Read {
    /// None once it is answered.
    request: Mutex<Option<Request>>,
    /// Pieces that are missing.
    missing: AtomicUsize,
    /// When it came.
    pub since: Instant,
}

impl Read {
    /// A read that waits for `missing` pieces.
    pub fn new(request: Request, missing: usize) -> Self {
        Self {
            request: Mutex::new(Some(request)),
            missing: AtomicUsize::new(missing),
            since: Instant::now(),
        }
    }

    /// Gives it a piece of `data`, the last one of which ends it.
    pub fn give(&self, piece: &Piece, data: &[u8]) {
        let mut request = self.request.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = request.as_ref() else {
            return;
        };
        if let Err(error) = open.write(data, piece.to) {
            // The device has gone, or will be told of an error.
            tracing::warn!(%error, "a read cannot be answered");
            request.take();
            return;
        }
        if self.missing.fetch_sub(1, Ordering::Relaxed) == 1 {
            if let Some(request) = request.take() {
                request.complete();
            }
        }
    }

    /// Answers it by an error; returns whether it was not answered yet.
    pub fn fail(&self) -> bool {
        self.request
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .is_some()
    }

    /// Whether it was answered.
    pub fn is_answered(&self) -> bool {
        self.request
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_cut_at_chunks_and_blobs() {
        let layout = Layout::new([CHUNK_BYTES + 100, 5000]).unwrap();
        let second = CHUNK_BYTES + 4096;
        let piece = |blob, chunk, from, bytes, to| Piece {
            blob,
            chunk,
            from,
            bytes,
            to,
        };
        assert_eq!(
            pieces(&layout, CHUNK_BYTES - 512, 4096),
            [
                piece(0, 0, CHUNK_BYTES - 512, 512, 0),
                piece(0, 1, 0, 100, 512)
            ]
        );
        // Zeros alone.
        assert_eq!(pieces(&layout, CHUNK_BYTES + 512, 512), []);
        // Over the end of a blob.
        assert_eq!(
            pieces(&layout, CHUNK_BYTES, 8192),
            [piece(0, 1, 0, 100, 0), piece(1, 0, 0, 4096, 4096)]
        );
        assert_eq!(
            pieces(&layout, second + 4096, 4096),
            [piece(1, 0, 4096, 904, 0)]
        );
        assert_eq!(pieces(&layout, u64::MAX - 511, 512), []);
    }
}
