// SPDX-License-Identifier: GPL-2.0

//! What the stores of frozen generations hold: which chunks were written, and what they are now.

use std::{ops::Range, path::Path};

use ovbd_image::lsmt::SECTOR_BYTES;

use crate::{
    block_writer,
    exceptions::{read_exceptions, read_header, Exception, Header},
    generations::Generation,
};
use ovbd_layers::{
    direct::{Aligned, DirectFile},
    error::{Error, Result},
    layer_writer::MAX_SEGMENTS,
};

/// Bytes that are read at once, if a chunk is not larger.
const READ_BYTES: u64 = 1 << 20;

/// Exception stores, read past the page cache: the kernel does not write through it.
pub struct FrozenStores {
    /// Newest first.
    stores: Vec<DirectFile>,
    /// Sectors of the origin.
    sectors: u64,
    chunk_bytes: u64,
    /// In the order of the origin.
    chunks: Vec<Chunk>,
}

/// A chunk that was written.
#[derive(Clone, Copy)]
struct Chunk {
    exception: Exception,
    /// Which store has it.
    store: usize,
}

impl FrozenStores {
    /// Reads the exceptions of generations that follow each other, newest first. Of a chunk that was written in several
    /// the newest counts.
    ///
    /// # Errors
    ///
    /// Those of reading, and defects of a store.
    pub fn open(generations: &[Generation], origin_sectors: u64) -> Result<Self> {
        let mut found = Self {
            stores: Vec::new(),
            sectors: origin_sectors,
            chunk_bytes: 0,
            chunks: Vec::new(),
        };
        for (store, generation) in generations.iter().enumerate() {
            let path = generation.store_node();
            let device = DirectFile::open(&path)?;
            let sectors = match read_header(&device)? {
                Header::New => {
                    return Err(Error::new(&path, "holds no exception store").at_byte(0));
                }
                Header::Store(sectors) => sectors,
            };
            let chunk_bytes = u64::from(sectors) * SECTOR_BYTES;
            if store > 0 && chunk_bytes != found.chunk_bytes {
                let what = "its chunks are not as large as those of the generation above";
                return Err(Error::new(&path, what));
            }
            found.chunk_bytes = chunk_bytes;
            let exceptions = read_exceptions(&device, sectors, origin_sectors)?;
            let chunks = exceptions.into_iter();
            found
                .chunks
                .extend(chunks.map(|exception| Chunk { exception, store }));
            found.stores.push(device);
        }
        if generations.len() > 1 {
            let place = |chunk: &Chunk| (chunk.exception.origin, chunk.store);
            found.chunks.sort_unstable_by_key(place);
            found.chunks.dedup_by_key(|chunk| chunk.exception.origin);
        }
        Ok(found)
    }

    /// The blocks that were written. More than a layer can have, each run stored whole, are refused.
    ///
    /// # Errors
    ///
    /// That one, about `out`.
    pub fn runs(&self, out: &Path) -> Result<Vec<Range<u64>>> {
        let chunk = self.chunk_bytes / SECTOR_BYTES;
        let chunks = self.chunks.iter().map(|chunk| chunk.exception.origin);
        let chunks = chunks.map(|origin| origin * chunk..(origin + 1) * chunk);
        let runs = block_writer::runs(chunks, self.sectors);
        let segments = block_writer::segments(&runs);
        if segments <= MAX_SEGMENTS {
            return Ok(runs);
        }
        let what = format!(
            "what was written takes {segments} segments, of at most {MAX_SEGMENTS} in a layer \
             (ovbd build --base makes one of a copy of the device)"
        );
        Err(Error::new(out, what))
    }

    /// Bytes of all chunks.
    pub fn bytes(&self) -> u64 {
        self.chunks.len() as u64 * self.chunk_bytes
    }

    /// Calls `work` with the content of all chunks, in the order of the origin, and the sector of the
    /// origin at which it belongs.
    ///
    /// # Errors
    ///
    /// Those of reading and of `work`.
    pub fn each(&self, mut work: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let most = (READ_BYTES / self.chunk_bytes).max(1) as usize;
        let mut buffer = Aligned::new(most * self.chunk_bytes as usize);
        let mut rest = self.chunks.as_slice();
        while let Some(first) = rest.first() {
            // Chunks that follow each other on both sides are one read.
            let count = (1..rest.len().min(most))
                .find(|i| {
                    let (next, far) = (&rest[*i], *i as u64);
                    next.store != first.store
                        || next.exception.origin != first.exception.origin + far
                        || next.exception.stored != first.exception.stored + far
                })
                .unwrap_or(rest.len().min(most));
            let bytes = buffer.bytes(count * self.chunk_bytes as usize);
            let at = first.exception.stored * self.chunk_bytes;
            self.stores[first.store].read(bytes, at)?;
            work(
                first.exception.origin * (self.chunk_bytes / SECTOR_BYTES),
                bytes,
            )?;
            rest = &rest[count..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_places_are_known_before_anything_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let store = |distance: u64, count: u64| FrozenStores {
            stores: vec![DirectFile::open(file.path()).unwrap()],
            sectors: 1 << 40,
            chunk_bytes: 65536,
            chunks: (0..count)
                .map(|i| Chunk {
                    exception: Exception {
                        origin: i * distance,
                        stored: i + 2,
                    },
                    store: 0,
                })
                .collect(),
        };
        let check = |distance, count| store(distance, count).runs(Path::new("out"));
        assert!(check(1, 0).is_ok());
        assert!(check(2, MAX_SEGMENTS).is_ok());
        // Those that follow each other are one segment.
        assert!(check(1, MAX_SEGMENTS + 1).is_ok());
        let error = check(2, MAX_SEGMENTS + 1).unwrap_err().to_string();
        let segments = format!("takes {} segments", MAX_SEGMENTS + 1);
        assert!(error.contains(&segments), "{error}");
    }
}
