// SPDX-License-Identifier: GPL-2.0

//! What the stores of frozen generations hold: which chunks were written, and what they are now.

use std::{ops::Range, path::Path};

use ovbd_image::lsmt::SECTOR_BYTES;

use crate::{
    block_writer::{self, Blocks, Origin},
    exceptions::{read_exceptions, read_header, Exception, Header},
    generations::Generation,
};
use ovbd_layers::{
    direct::{Aligned, DirectFile, ALIGNMENT},
    error::{Error, Result},
    layer_writer::MAX_SEGMENTS,
    pipeline::Pool,
    zeros::GRANULE_BYTES,
};

/// Bytes of the chunks of a part. Larger ones are taken for several.
const READ_BYTES: u64 = 1 << 20;

/// Bytes of a block of a layer.
const BLOCK_BYTES: u64 = GRANULE_BYTES as u64;

/// Exception stores, read past the page cache: the kernel does not write through it.
pub struct FrozenStores {
    /// Newest first.
    stores: Vec<DirectFile>,
    /// Sectors of the origin.
    sectors: u64,
    /// At most [`READ_BYTES`].
    chunk_bytes: u64,
    /// In the order of the origin.
    chunks: Vec<Chunk>,
    buffers: Pool<Aligned>,
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
            buffers: Pool::default(),
        };
        let origin_bytes = origin_sectors.saturating_mul(SECTOR_BYTES);
        let mut store_chunk_bytes = 0;
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
            if store > 0 && chunk_bytes != store_chunk_bytes {
                let what = "its chunks are not as large as those of the generation above";
                return Err(Error::new(&path, what));
            }
            store_chunk_bytes = chunk_bytes;
            let exceptions = read_exceptions(&device, sectors, origin_sectors)?;
            // Several parts are in memory at once, so what is large is several chunks here.
            found.chunk_bytes = chunk_bytes.min(READ_BYTES);
            let pieces = pieces(exceptions, chunk_bytes / found.chunk_bytes);
            let origin_pieces = origin_bytes.div_ceil(found.chunk_bytes);
            let pieces = pieces.filter(|piece| piece.origin < origin_pieces);
            found
                .chunks
                .extend(pieces.map(|exception| Chunk { exception, store }));
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
        let runs = block_writer::runs(self.ranges(&self.chunks), self.sectors);
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

    /// All chunks in parts, which begin and end with a block and are in the order of the origin.
    pub fn parts(&self) -> impl Iterator<Item = Part<'_>> + Send {
        let most = (READ_BYTES / self.chunk_bytes) as usize;
        let block = move |chunk: &Chunk| chunk.exception.origin * self.chunk_bytes / BLOCK_BYTES;
        let mut rest = self.chunks.as_slice();
        std::iter::from_fn(move || {
            let last = rest.get(most.min(rest.len()).checked_sub(1)?)?;
            let more = &rest[most.min(rest.len())..];
            let more = more.iter().take_while(|next| block(next) == block(last));
            let (part, later) = rest.split_at(most.min(rest.len()) + more.count());
            rest = later;
            Some(Part(part))
        })
    }

    /// Reads the blocks of a part into `memory`: what was written, and for what was not written of them what is
    /// `below`.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn read(&self, part: &Part<'_>, below: &Origin<'_>, memory: Aligned) -> Result<Blocks> {
        let chunk_bytes = self.chunk_bytes as usize;
        let chunk_sectors = self.chunk_bytes / SECTOR_BYTES;
        let runs = block_writer::runs(self.ranges(part.0), self.sectors);
        let below = (self.chunk_bytes < BLOCK_BYTES).then_some(below);
        let mut blocks = Blocks::new(runs, below, memory)?;
        // In the order of the store, where chunks that were written together are next to each other.
        let mut chunks = part.0.to_vec();
        chunks.sort_unstable_by_key(|chunk| (chunk.store, chunk.exception.stored));
        let follows = |one: &Chunk, next: &Chunk| {
            next.store == one.store && next.exception.stored == one.exception.stored + 1
        };
        let read = |buffer: &mut Aligned| {
            chunks.chunk_by(follows).try_for_each(|group| {
                let bytes = group.len() * chunk_bytes;
                let at = group[0].exception.stored * self.chunk_bytes;
                let store = &self.stores[group[0].store];
                // What was written one after the other goes where it belongs.
                let origin = group[0].exception.origin;
                let mut origins = (origin..).zip(group);
                if chunk_bytes >= ALIGNMENT && origins.all(|(n, chunk)| chunk.exception.origin == n)
                {
                    let place = blocks.place(origin * chunk_sectors, bytes);
                    if place.len() == bytes {
                        return store.read(place, at);
                    }
                }
                let all = buffer.bytes(bytes);
                store.read(all, at)?;
                for (chunk, content) in group.iter().zip(all.chunks_exact(chunk_bytes)) {
                    let sector = chunk.exception.origin * chunk_sectors;
                    let place = blocks.place(sector, chunk_bytes);
                    place.copy_from_slice(&content[..place.len()]);
                }
                Ok(())
            })
        };
        self.buffers.with(|| Ok(Aligned::default()), read)?;
        Ok(blocks)
    }

    /// The sectors of chunks.
    fn ranges<'a>(&self, chunks: &'a [Chunk]) -> impl Iterator<Item = Range<u64>> + 'a {
        let sectors = self.chunk_bytes / SECTOR_BYTES;
        let origins = chunks.iter().map(|chunk| chunk.exception.origin);
        origins.map(move |origin| origin * sectors..(origin + 1) * sectors)
    }
}

/// Each chunk as `count` that follow each other.
fn pieces(exceptions: Vec<Exception>, count: u64) -> impl Iterator<Item = Exception> {
    exceptions.into_iter().flat_map(move |exception| {
        (0..count).map(move |number| Exception {
            origin: exception.origin * count + number,
            stored: exception.stored * count + number,
        })
    })
}

/// Some of the chunks that were written.
pub struct Part<'a>(&'a [Chunk]);

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
            buffers: Pool::default(),
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

    #[test]
    fn large_chunks_are_several() {
        let exceptions = vec![(0, 7), (3, 2)].into_iter();
        let exceptions = exceptions.map(|(origin, stored)| Exception { origin, stored });
        let found = pieces(exceptions.collect(), 2);
        let found: Vec<_> = found.map(|piece| (piece.origin, piece.stored)).collect();
        assert_eq!(found, [(0, 14), (1, 15), (6, 4), (7, 5)]);
    }

    #[test]
    fn parts_have_what_was_written_and_whole_blocks() {
        const SECTORS: u64 = 9003;
        let folder = tempfile::tempdir().unwrap();
        let below_path = folder.path().join("below");
        std::fs::write(&below_path, vec![1; (SECTORS * SECTOR_BYTES) as usize]).unwrap();
        let below = Origin::device(&below_path).unwrap();
        for chunk_sectors in [1, 4, 8, 32, 2048] {
            let chunk_bytes = chunk_sectors * SECTOR_BYTES;
            let chunks_of_origin = SECTORS.div_ceil(chunk_sectors);
            let mut wanted = vec![1; (chunks_of_origin * chunk_bytes) as usize];
            let mut written = vec![false; SECTORS.div_ceil(8) as usize];
            let mut contents = [Vec::new(), Vec::new()];
            let mut chunks = Vec::new();
            // Two stores, in which some follow each other, some backwards, and some are alone.
            for origin in (0..chunks_of_origin).filter(|origin| origin % 7 != 3) {
                let store = usize::from(origin % 50 > 30);
                let backwards = 2 * chunks_of_origin - origin;
                let stored = if origin % 90 > 60 { backwards } else { origin };
                let content: &mut Vec<u8> = &mut contents[store];
                content.resize(((2 * chunks_of_origin + 1) * chunk_bytes) as usize, 2);
                let bytes = [(origin % 251) as u8 + 3].repeat(chunk_bytes as usize);
                content[(stored * chunk_bytes) as usize..][..bytes.len()].copy_from_slice(&bytes);
                wanted[(origin * chunk_bytes) as usize..][..bytes.len()].copy_from_slice(&bytes);
                let exception = Exception { origin, stored };
                chunks.push(Chunk { exception, store });
                let end = ((origin + 1) * chunk_sectors).min(SECTORS);
                for sector in origin * chunk_sectors..end {
                    written[(sector / 8) as usize] = true;
                }
            }
            let stores = contents.iter().enumerate().map(|(number, content)| {
                let path = folder.path().join(format!("store{number}"));
                std::fs::write(&path, content).unwrap();
                DirectFile::open(&path).unwrap()
            });
            let found = FrozenStores {
                stores: stores.collect(),
                sectors: SECTORS,
                chunk_bytes,
                chunks,
                buffers: Pool::default(),
            };
            let mut end = 0;
            for part in found.parts() {
                let blocks = found.read(&part, &below, Aligned::default()).unwrap();
                for (run, data) in blocks.each() {
                    assert!(run.start >= end && run.start % 8 == 0);
                    let at = (run.start * SECTOR_BYTES) as usize;
                    assert!(
                        data == &wanted[at..][..data.len()],
                        "{chunk_sectors}: {run:?}"
                    );
                    for sector in run.clone() {
                        written[(sector / 8) as usize] = false;
                    }
                    end = run.end;
                }
            }
            assert!(written.iter().all(|written| !written), "{chunk_sectors}");
            assert!(found.parts().count() > 1);
        }
    }
}
