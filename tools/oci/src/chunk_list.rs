// SPDX-License-Identifier: GPL-2.0

//! The digests of the chunks of a blob, so that a part of it can be checked before all of it is there.
//!
//! ```text
//! 0    8   "ovbdchk" 1
//! 8    8   bytes of a chunk, little-endian
//! 16   8   bytes of the blob, little-endian
//! 24  32   SHA-256 of each chunk, in order; the last one may be shorter
//! ```
//!
//! The list is a blob of its own, [`CHUNK_LIST`] on a layer has its digest: who trusts the digest of the image trusts the
//! list. An artifact that refers to the image has the list, so that a registry keeps it.
//!
//! [`CHUNK_LIST`]: crate::annotations::CHUNK_LIST

use std::{io, sync::OnceLock};

use sha2::{Digest as _, Sha256};

use crate::{
    blob::BlobSource,
    digest::Digest,
    document::Descriptor,
    error::{Error, Result},
    scattered::CHUNK_BYTES,
};

/// Media type of a list, and of the artifact that has lists.
pub const CHUNK_LIST_TYPE: &str = "application/vnd.dm-overlaybd.chunk-list.v1";

const MAGIC: &[u8; 8] = b"ovbdchk\x01";
const HEAD_BYTES: usize = 24;
const HASH_BYTES: usize = 32;
/// Largest list that is read: that of a blob of 512 GiB.
const MAX_BYTES: u64 = 64 << 20;

/// The digests of the chunks of a blob.
///
/// # Invariants
///
/// `bytes` is a list as it is written above, with as many digests as a blob of the size in it has chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkList {
    bytes: Vec<u8>,
}

impl ChunkList {
    /// Bytes of the list of a blob of `size` bytes; nothing where that is more than is read.
    pub fn size(size: u64) -> Option<u64> {
        let hashes = size.div_ceil(CHUNK_BYTES).checked_mul(HASH_BYTES as u64)?;
        hashes
            .checked_add(HEAD_BYTES as u64)
            .filter(|bytes| *bytes <= MAX_BYTES)
    }

    /// Describes the list of `blob` that has this digest; nothing where it would be more than is read.
    pub fn descriptor(blob: &Descriptor, digest: Digest) -> Option<Descriptor> {
        Some(Descriptor::new(
            CHUNK_LIST_TYPE,
            digest,
            Self::size(blob.size)?,
        ))
    }

    /// Takes the bytes of the list of `blob`.
    ///
    /// # Errors
    ///
    /// They are no such list.
    pub fn parse(bytes: Vec<u8>, blob: &Descriptor) -> Result<Self> {
        let right = bytes.starts_with(&head(blob.size))
            && Self::size(blob.size) == Some(bytes.len() as u64);
        match right {
            true => Ok(Self { bytes }),
            false => Err(Error::invalid(
                &blob.digest,
                "its chunk list is none, or of another blob",
            )),
        }
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The digest of a chunk.
    pub fn hash(&self, chunk: u64) -> Option<&[u8]> {
        let at = usize::try_from(chunk).ok()?.checked_mul(HASH_BYTES)?;
        self.bytes.get(HEAD_BYTES..)?.get(at..)?.get(..HASH_BYTES)
    }

    /// Whether `data` is the chunk of this number.
    pub fn fits(&self, chunk: u64, data: &[u8]) -> bool {
        self.hash(chunk) == Some(Sha256::digest(data).as_slice())
    }
}

fn head(size: u64) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(CHUNK_BYTES.to_le_bytes());
    head.extend(size.to_le_bytes());
    head
}

/// Makes the list of a blob whose bytes come in order.
pub struct ChunkLister {
    list: Vec<u8>,
    chunk: Sha256,
    /// Bytes in `chunk`.
    have: u64,
}

impl ChunkLister {
    /// Of a blob of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            list: head(size),
            chunk: Sha256::new(),
            have: 0,
        }
    }

    /// Adds the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = (CHUNK_BYTES - self.have) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.chunk.update(now);
            self.have += now.len() as u64;
            bytes = later;
            if self.have == CHUNK_BYTES {
                self.end_chunk();
            }
        }
    }

    fn end_chunk(&mut self) {
        self.list.extend(self.chunk.finalize_reset());
        self.have = 0;
    }

    /// The list.
    pub fn finish(mut self) -> ChunkList {
        if self.have > 0 {
            self.end_chunk();
        }
        ChunkList { bytes: self.list }
    }
}

/// The list of a blob as something to send: made when it is read, which is only where the registry does not have it.
pub struct ListSource<S> {
    blob: S,
    list: OnceLock<io::Result<ChunkList>>,
}

impl<S: BlobSource> ListSource<S> {
    /// The list of `blob`.
    pub fn new(blob: S) -> Self {
        Self {
            blob,
            list: OnceLock::new(),
        }
    }
}

impl<S: BlobSource> BlobSource for ListSource<S> {
    fn size(&self) -> u64 {
        // What is larger than is read is not sent.
        ChunkList::size(self.blob.size()).unwrap_or(0)
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let make = || {
            let blob: &dyn BlobSource = &self.blob;
            Ok(blob.digests(|_| ())?.1)
        };
        match self.list.get_or_init(make) {
            Ok(list) => {
                let rest = usize::try_from(at).ok();
                let rest = rest.and_then(|at| list.bytes.get(at..)).unwrap_or_default();
                let count = rest.len().min(buffer.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                Ok(count)
            }
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(bytes: &[u8]) -> Descriptor {
        Descriptor::new("application/x", Digest::of(bytes), bytes.len() as u64)
    }

    fn content() -> Vec<u8> {
        (0..2 * CHUNK_BYTES + 77)
            .map(|at| ((at * at) >> 13) as u8)
            .collect()
    }

    fn list_of(bytes: &[u8], step: usize) -> ChunkList {
        let mut lister = ChunkLister::new(bytes.len() as u64);
        bytes.chunks(step).for_each(|piece| lister.update(piece));
        lister.finish()
    }

    #[test]
    fn a_list_knows_its_chunks_and_no_others() {
        let bytes = content();
        let list = list_of(&bytes, 1000);
        assert_eq!(list, list_of(&bytes, bytes.len()));
        assert_eq!(
            Some(list.as_bytes().len() as u64),
            ChunkList::size(bytes.len() as u64)
        );
        let pieces: Vec<_> = bytes.chunks(CHUNK_BYTES as usize).collect();
        for (number, piece) in (0..).zip(&pieces) {
            assert!(list.fits(number, piece));
            assert!(!list.fits(number + 1, piece));
            assert!(!list.fits(number, &piece[1..]));
            let mut other = piece.to_vec();
            other[7] ^= 1;
            assert!(!list.fits(number, &other));
        }
        assert!(!list.fits(u64::MAX, b""));
        let read = ChunkList::parse(list.as_bytes().to_vec(), &blob(&bytes)).unwrap();
        assert_eq!(read, list);
    }

    #[test]
    fn what_is_no_list_of_the_blob_is_refused() {
        let bytes = content();
        let blob = blob(&bytes);
        let list = list_of(&bytes, 4096).as_bytes().to_vec();
        let refused = |list: &[u8]| ChunkList::parse(list.to_vec(), &blob).is_err();
        assert!(refused(b""));
        assert!(refused(&list[..list.len() - 1]));
        assert!(refused(&[&list[..], b"x"].concat()));
        // Magic, bytes of a chunk, bytes of the blob.
        for at in 0..HEAD_BYTES {
            let mut other = list.clone();
            other[at] ^= 1;
            assert!(refused(&other), "{at}");
        }
        assert_eq!(ChunkList::size(u64::MAX), None);
        assert_eq!(ChunkList::size(1 << 40), None);
    }

    #[test]
    fn a_source_is_the_list() {
        let bytes = content();
        let source = ListSource::new(bytes.clone());
        let mut sent = vec![0; source.size() as usize];
        assert_eq!(source.read_at(&mut sent[..50], 0).unwrap(), 50);
        assert_eq!(
            source.read_at(&mut sent[50..], 50).unwrap(),
            sent.len() - 50
        );
        assert_eq!(sent, list_of(&bytes, 999).as_bytes());
        assert_eq!(source.read_at(&mut [0], source.size()).unwrap(), 0);
    }
}
