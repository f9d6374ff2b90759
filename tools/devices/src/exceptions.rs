// SPDX-License-Identifier: GPL-2.0

//! The exception store of a persistent dm-snapshot: which chunks of the origin were written, and where in
//! the store they are.
//!
//! Chunk 0 is the header. An area follows, one chunk of exceptions, then as many chunks of data as the area
//! has room for exceptions, then the next area. The first exception with a new chunk of 0 is the end. All
//! numbers are little-endian.

use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_layers::{
    direct::{Aligned, DirectFile, ALIGNMENT},
    error::{Error, Result as LayersResult},
};

/// Bytes of the header that matter.
pub const HEADER_BYTES: usize = 16;

/// First field of the header.
pub const MAGIC: u32 = u32::from_le_bytes(*b"SnAp");
/// Its second field, as long as nothing was lost.
pub const VALID: u32 = 1;
/// Its third field.
pub const VERSION: u32 = 1;
const EXCEPTION_BYTES: u64 = 16;

/// Largest chunk that is accepted, 32 MiB: one area is in memory at a time.
const MAX_CHUNK_SECTORS: u32 = 1 << 16;

/// What the header of a store says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// All zeros: dm-snapshot will make a new store.
    New,
    /// A store with this chunk size in sectors.
    Store(u32),
}

/// Why a header cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It is that of a store, with this wrong.
    Store(&'static str),
    /// It is something else.
    Other,
}

impl Unusable {
    /// What is wrong.
    pub fn what(self) -> &'static str {
        match self {
            Unusable::Store(what) => what,
            Unusable::Other => "holds something else than an exception store",
        }
    }
}

/// Reads the header.
///
/// # Errors
///
/// What is wrong with it.
pub fn header(block: &[u8; HEADER_BYTES]) -> Result<Header, Unusable> {
    let mut fields = block.chunks_exact(4).map(|field| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(field);
        u32::from_le_bytes(bytes)
    });
    let mut next = || fields.next().unwrap_or(0);
    let (magic, valid, version, chunk) = (next(), next(), next(), next());
    match magic {
        0 => Ok(Header::New),
        MAGIC if version != VERSION => {
            Err(Unusable::Store("an exception store of an unknown version"))
        }
        MAGIC if valid != VALID => Err(Unusable::Store(
            "the snapshot is invalid: its COW device was full or failed",
        )),
        MAGIC if !chunk.is_power_of_two() || chunk > MAX_CHUNK_SECTORS => {
            Err(Unusable::Store("an exception store with a bad chunk size"))
        }
        MAGIC => Ok(Header::Store(chunk)),
        _ => Err(Unusable::Other),
    }
}

/// Reads the header of a store past the page cache, which the kernel does not write through.
///
/// # Errors
///
/// The system's, and what is wrong with the header.
pub fn read_header(store: &DirectFile) -> LayersResult<Header> {
    let mut buffer = Aligned::new(ALIGNMENT);
    let first = buffer.bytes(ALIGNMENT);
    store.read(first, 0)?;
    let mut block = [0; HEADER_BYTES];
    block.copy_from_slice(&first[..HEADER_BYTES]);
    header(&block).map_err(|e| Error::new(store.path(), e.what()).at_byte(0))
}

/// Reads all exceptions as [`exceptions`] does, past the page cache.
///
/// # Errors
///
/// The system's, and defects of the store.
pub fn read_exceptions(
    store: &DirectFile,
    chunk_sectors: u32,
    origin_sectors: u64,
) -> LayersResult<Vec<Exception>> {
    let mut area = Aligned::default();
    exceptions(
        chunk_sectors,
        store.bytes(),
        origin_sectors,
        |to, byte| {
            let from = area.bytes(to.len());
            store.read(from, byte)?;
            to.copy_from_slice(from);
            Ok(())
        },
        |what, byte| Error::new(store.path(), what).at_byte(byte),
    )
}

/// A written chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its number on the origin.
    pub origin: u64,
    /// Its number in the store.
    pub stored: u64,
}

/// Reads all exceptions of a store of `bytes` and sorts them by their place on an origin of
/// `origin_sectors`. `read` fills a buffer from a byte of the store.
///
/// # Errors
///
/// Those of `read`, and what `refuse` makes of a defect and its byte.
pub fn exceptions<E>(
    chunk_sectors: u32,
    bytes: u64,
    origin_sectors: u64,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
    refuse: impl Fn(&'static str, u64) -> E,
) -> Result<Vec<Exception>, E> {
    let chunk_bytes = u64::from(chunk_sectors) * SECTOR_BYTES;
    let chunks = bytes / chunk_bytes;
    let origin_chunks = origin_sectors.div_ceil(u64::from(chunk_sectors));
    let per_area = chunk_bytes / EXCEPTION_BYTES;
    // The chunk with number 1 is the first area, and every one that lies this far behind another.
    let stride = per_area + 1;
    let is_area = |chunk: u64| chunk % stride == 1;
    let mut found = Vec::new();
    let mut area = vec![0; chunk_bytes as usize];
    'areas: for at in (1..chunks).step_by(stride as usize) {
        read(&mut area, at * chunk_bytes)?;
        for (i, entry) in area.chunks_exact(EXCEPTION_BYTES as usize).enumerate() {
            let byte = at * chunk_bytes + i as u64 * EXCEPTION_BYTES;
            let (origin, stored) = entry.split_at(8);
            let exception = Exception {
                origin: number(origin),
                stored: number(stored),
            };
            if exception.stored == 0 {
                break 'areas;
            }
            if exception.stored >= chunks || is_area(exception.stored) {
                return Err(refuse("an exception outside the data of the store", byte));
            }
            if exception.origin >= origin_chunks {
                return Err(refuse("an exception outside the origin", byte));
            }
            found.push(exception);
        }
    }
    found.sort_unstable_by_key(|exception| exception.origin);
    if found
        .windows(2)
        .any(|pair| pair[0].origin == pair[1].origin)
    {
        return Err(refuse("two exceptions for one chunk", 0));
    }
    Ok(found)
}

fn number(bytes: &[u8]) -> u64 {
    let mut array = [0; 8];
    array.copy_from_slice(bytes);
    u64::from_le_bytes(array)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: usize = 4096;
    /// Exceptions of an area.
    const AREA: u64 = 256;

    /// A store with chunks 0, 2, 4, ... of the origin, written in the order of dm-snapshot.
    fn store(count: u64) -> Vec<u8> {
        let areas = count / AREA + 1;
        let mut bytes = vec![0; CHUNK * (1 + areas * (AREA + 1)) as usize];
        for i in 0..count {
            let area = 1 + i / AREA * (AREA + 1);
            let at = area as usize * CHUNK + (i % AREA * 16) as usize;
            bytes[at..at + 8].copy_from_slice(&((count - 1 - i) * 2).to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&(area + 1 + i % AREA).to_le_bytes());
        }
        bytes
    }

    fn read(bytes: &[u8], origin_sectors: u64) -> Result<Vec<Exception>, (&'static str, u64)> {
        exceptions(
            8,
            bytes.len() as u64,
            origin_sectors,
            |buffer, at| {
                buffer.copy_from_slice(&bytes[at as usize..][..buffer.len()]);
                Ok(())
            },
            |what, at| (what, at),
        )
    }

    #[test]
    fn areas_of_every_fill() {
        for count in [0, 1, 255, 256, 257, 511, 512, 1000] {
            let bytes = store(count);
            let found = read(&bytes, 1 << 20).unwrap();
            let wanted: Vec<_> = (0..count).map(|i| i * 2).collect();
            let origins: Vec<_> = found.iter().map(|exception| exception.origin).collect();
            assert_eq!(origins, wanted, "{count}");
            if let Some(last) = found.last() {
                assert_eq!(last.stored, 2);
            }
        }
    }

    #[test]
    fn a_full_last_area_ends_with_the_store() {
        let mut bytes = store(256);
        bytes.truncate(CHUNK * 258);
        assert_eq!(read(&bytes, 1 << 20).unwrap().len(), 256);
    }

    #[test]
    fn damage_is_refused() {
        let set = |at: usize, value: u64| {
            let mut bytes = store(10);
            bytes[CHUNK + at..CHUNK + at + 8].copy_from_slice(&value.to_le_bytes());
            read(&bytes, 1 << 20)
        };
        let outside = "an exception outside the data of the store";
        assert_eq!(set(8, 1 << 40), Err((outside, 4096)));
        assert_eq!(set(16 + 8, u64::MAX), Err((outside, 4112)));
        assert_eq!(set(16 + 8, 1), Err((outside, 4112)));
        assert_eq!(set(16 + 8, 258), Err((outside, 4112)));
        assert_eq!(
            set(0, u64::MAX),
            Err(("an exception outside the origin", 4096))
        );
        assert_eq!(set(0, 16), Err(("two exceptions for one chunk", 0)));
        assert!(read(&store(10), 8 * 18 + 1).is_ok());
        assert!(read(&store(10), 8 * 18).is_err());
    }

    #[test]
    fn headers() {
        let block = |fields: [u32; 4]| {
            let mut block = [0; HEADER_BYTES];
            for (place, field) in block.chunks_exact_mut(4).zip(fields) {
                place.copy_from_slice(&field.to_le_bytes());
            }
            header(&block)
        };
        assert_eq!(block([0, 0, 0, 0]), Ok(Header::New));
        assert_eq!(block([MAGIC, 1, 1, 8]), Ok(Header::Store(8)));
        for bad in [
            [1, 1, 1, 8],
            [MAGIC, 0, 1, 8],
            [MAGIC, 1, 2, 8],
            [MAGIC, 1, 1, 0],
            [MAGIC, 1, 1, 12],
            [MAGIC, 1, 1, 1 << 17],
        ] {
            assert!(block(bad).is_err(), "{bad:?}");
        }
    }
}
