// SPDX-License-Identifier: GPL-2.0

//! Acceleration layers of the original: what is read of an image first, as its tools have recorded it.
//!
//! The layer is a tar with a file `trace`, whose numbers are those of the machine, little-endian here:
//!
//! ```text
//! 0   4   3270449184
//! 8   8   bytes of the records
//! 16  4   CRC-32C of the records, without inversions
//! 24      the records, of 24 bytes each:
//!         0   1   'R'
//!         4   4   number of the layer, from the bottom
//!         8   8   bytes that were read
//!         16  8   first byte, of the layer without its tar and its compression
//! ```

use std::{collections::HashSet, fs, path::Path};

use anyhow::{Context as _, Result};
use ovbd_fetch::Layout;
use ovbd_layers::{blob::Blob, crc::crc32c, tar::unpack::unpack_files};
use ovbd_oci::{Error, Image, Kind, LayerKind, Registry, CHUNK_BYTES};

use crate::tar_layers::scratch_folder;

const MAGIC: u32 = 3_270_449_184;
const RECORD_BYTES: usize = 24;
/// Largest tar that is unpacked.
const MAX_BYTES: u64 = 16 << 20;

/// A read of a layer. Numbers are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Number of the layer, from the bottom.
    pub layer: u32,
    /// First byte, of the layer without its tar and its compression.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// What the file `trace` says; nothing where it is none.
pub fn parse(file: &[u8]) -> Option<Vec<Read>> {
    let (head, records) = file.split_at_checked(RECORD_BYTES)?;
    let word = |bytes: &[u8]| Some(u32::from_le_bytes(bytes.try_into().ok()?));
    let long = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?));
    let right = word(head.get(..4)?)? == MAGIC
        && long(head.get(8..16)?)? == records.len() as u64
        && records.len() % RECORD_BYTES == 0
        && word(head.get(16..20)?)? == crc32c(0, records);
    if !right {
        return None;
    }
    let mut reads = Vec::new();
    for record in records.chunks_exact(RECORD_BYTES) {
        if record.first() == Some(&b'R') {
            reads.push(Read {
                layer: word(record.get(4..8)?)?,
                bytes: long(record.get(8..16)?)?,
                offset: long(record.get(16..24)?)?,
            });
        }
    }
    Some(reads)
}

/// The reads that the acceleration layer of an image has. Without one, or with one that is none, there are none.
pub fn fetch(registry: &Registry, image: &Image) -> Vec<Read> {
    let find = || -> Result<Vec<Read>> {
        let mut layers = image.layers();
        let Some(layer) = layers.find(|layer| layer.kind == LayerKind::Acceleration) else {
            return Ok(Vec::new());
        };
        let folder = scratch_folder()?;
        let tar = folder.path().join("tar");
        fs::write(&tar, registry.small_blob(layer.descriptor)?)?;
        let found = unpack_files(&tar, &["trace"], folder.path(), MAX_BYTES, &())?;
        let none = || {
            Error::invalid(
                &layer.descriptor.digest,
                "an acceleration layer without a trace",
            )
        };
        let path = found.into_iter().flatten().next().ok_or_else(none)?;
        let file = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        let what = "a trace that cannot be understood";
        Ok(
            parse(&file)
                .ok_or_else(|| Error::new(Kind::Invalid, &layer.descriptor.digest, what))?,
        )
    };
    find().unwrap_or_else(|error| {
        tracing::warn!("pulling without the acceleration layer: {error:#}");
        Vec::new()
    })
}

/// The chunks of blobs that reads need, each once, in their order. The blobs are on `device`; what says where they have what is
/// read of it.
pub fn chunks(reads: &[Read], device: &Path, layout: &Layout) -> Vec<(usize, u64)> {
    let (mut seen, mut chunks) = (HashSet::new(), Vec::new());
    let mut blobs: Vec<Option<Option<Blob>>> = Vec::new();
    for read in reads {
        let number = read.layer as usize;
        let Some((start, bytes)) = layout.place(number) else {
            continue;
        };
        if blobs.len() <= number {
            blobs.resize(number + 1, None);
        }
        let blob = blobs[number].get_or_insert_with(|| {
            let opened = Blob::open_part(device, start, bytes);
            opened
                .inspect_err(|error| tracing::warn!(%error, "its reads are not fetched first"))
                .ok()
        });
        let stored = blob
            .as_ref()
            .and_then(|blob| blob.stored(read.offset, read.bytes));
        let Some((from, to)) = stored else {
            continue;
        };
        let (from, to) = (
            from.saturating_sub(start),
            to.saturating_sub(start).min(bytes),
        );
        for chunk in from / CHUNK_BYTES..to.div_ceil(CHUNK_BYTES) {
            if seen.insert((number, chunk)) {
                chunks.push((number, chunk));
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(records: &[[u8; RECORD_BYTES]]) -> Vec<u8> {
        let records = records.concat();
        let mut file = MAGIC.to_le_bytes().to_vec();
        file.extend([0; 4]);
        file.extend((records.len() as u64).to_le_bytes());
        file.extend(crc32c(0, &records).to_le_bytes());
        file.extend([0; 4]);
        file.extend(records);
        file
    }

    fn record(op: u8, layer: u32, bytes: u64, offset: u64) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[0] = op;
        record[4..8].copy_from_slice(&layer.to_le_bytes());
        record[8..16].copy_from_slice(&bytes.to_le_bytes());
        record[16..].copy_from_slice(&offset.to_le_bytes());
        record
    }

    #[test]
    fn traces() {
        let whole = file(&[
            record(b'R', 2, 4096, 8192),
            record(b'X', 1, 1, 1),
            record(b'R', 0, 1, 2),
        ]);
        let read = |layer, bytes, offset| Read {
            layer,
            offset,
            bytes,
        };
        assert_eq!(
            parse(&whole),
            Some(vec![read(2, 4096, 8192), read(0, 1, 2)])
        );
        assert_eq!(parse(&file(&[])), Some(Vec::new()));
        for at in (0..4).chain(8..20).chain(24..whole.len()) {
            let mut other = whole.clone();
            other[at] ^= 1;
            assert_eq!(parse(&other), None, "{at}");
        }
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), None, "{end}");
        }
    }
}
