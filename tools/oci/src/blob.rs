// SPDX-License-Identifier: GPL-2.0

//! Where the bytes of a blob that is sent come from: read again from any byte, so that nothing is kept in memory.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    sync::Arc,
};

use crate::{
    chunk_list::{ChunkList, ChunkLister},
    digest::{Algorithm, Digest, Hasher},
};

/// Bytes that can be read from anywhere, several times.
pub trait BlobSource: Send + Sync {
    /// Number of bytes.
    fn size(&self) -> u64;

    /// Reads some bytes from byte `at`; 0 only at the end.
    ///
    /// # Errors
    ///
    /// The system's.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;
}

impl dyn BlobSource + '_ {
    /// A reader of the bytes `from..to`.
    pub(crate) fn reader(&self, from: u64, to: u64) -> SourceReader<'_> {
        SourceReader {
            source: self,
            at: from,
            to,
        }
    }

    /// The sha256 digest of all bytes, and the list of their chunks; `read` hears of each piece.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn digests(&self, mut read: impl FnMut(u64)) -> io::Result<(Digest, ChunkList)> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut lister = ChunkLister::new(self.size());
        let mut buffer = vec![0; 1 << 18];
        let mut reader = self.reader(0, self.size());
        loop {
            match reader.read(&mut buffer)? {
                0 => return Ok((hasher.finish(), lister.finish())),
                count => {
                    hasher.update(&buffer[..count]);
                    lister.update(&buffer[..count]);
                    read(count as u64);
                }
            }
        }
    }
}

/// Reads a range of a source in order.
pub(crate) struct SourceReader<'a> {
    source: &'a dyn BlobSource,
    at: u64,
    to: u64,
}

impl Read for SourceReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (self.to - self.at).min(buffer.len() as u64) as usize;
        if length == 0 {
            return Ok(0);
        }
        let count = self.source.read_at(&mut buffer[..length], self.at)?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file became shorter",
            ));
        }
        self.at += count as u64;
        Ok(count)
    }
}

/// A range of bytes of a file.
#[derive(Clone, Debug)]
pub struct FilePart {
    file: Arc<File>,
    start: u64,
    bytes: u64,
}

impl FilePart {
    /// `bytes` bytes from byte `start` on.
    pub fn new(file: Arc<File>, start: u64, bytes: u64) -> Self {
        Self { file, start, bytes }
    }
}

impl BlobSource for FilePart {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let length = self.bytes.saturating_sub(at).min(buffer.len() as u64) as usize;
        self.file.read_at(&mut buffer[..length], self.start + at)
    }
}

impl<S: BlobSource + ?Sized> BlobSource for &S {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        (**self).read_at(buffer, at)
    }
}

impl BlobSource for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let rest = usize::try_from(at)
            .ok()
            .and_then(|at| self.get(at..))
            .unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

/// Sources one after the other, such as a tar header, a file and padding.
#[derive(Default)]
pub struct Pieces(Vec<Box<dyn BlobSource>>);

impl Pieces {
    /// The same with `piece` at the end.
    pub fn with(mut self, piece: impl BlobSource + 'static) -> Self {
        self.0.push(Box::new(piece));
        self
    }
}

impl BlobSource for Pieces {
    fn size(&self) -> u64 {
        self.0.iter().map(|piece| piece.size()).sum()
    }

    fn read_at(&self, buffer: &mut [u8], mut at: u64) -> io::Result<usize> {
        for piece in &self.0 {
            match at.checked_sub(piece.size()) {
                Some(rest) => at = rest,
                None => return piece.read_at(buffer, at),
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_one() {
        let pieces = Pieces::default()
            .with(b"abc".to_vec())
            .with(Vec::new())
            .with(b"defgh".to_vec());
        let source: &dyn BlobSource = &pieces;
        assert_eq!(source.size(), 8);
        for (from, to) in [(0, 8), (2, 5), (3, 3), (7, 8)] {
            let mut text = String::new();
            source.reader(from, to).read_to_string(&mut text).unwrap();
            assert_eq!(text, "abcdefgh"[from as usize..to as usize]);
        }
        assert_eq!(source.digests(|_| ()).unwrap().0, Digest::of(b"abcdefgh"));
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123", 0).unwrap();
        let part = FilePart::new(Arc::new(file), 2, 4);
        let source: &dyn BlobSource = &part;
        assert!(source.digests(|_| ()).is_err());
    }
}
