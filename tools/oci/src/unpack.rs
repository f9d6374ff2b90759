// SPDX-License-Identifier: GPL-2.0

//! Layers that a copying tool compressed: taking that away again, into the store, by the digest that the configuration has.

use std::{
    fs::File,
    io::{self, BufReader, Read},
};

use crate::{
    digest::{Digest, Hasher},
    document::Descriptor,
    error::{message, Error, Kind, Result},
    ingest::Ingested,
    manifest::OCI_LAYER,
    store::Store,
};

/// Largest window of zstd that is given memory: 2 to the power of this.
const WINDOW_LOG: u32 = 23;
/// Bytes that are read at once.
const BUFFER_BYTES: usize = 128 << 10;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip
    Gzip,
    /// zstd
    Zstd,
}

impl Compression {
    /// What a file is compressed with that starts with `first`.
    pub fn recognise(first: &[u8]) -> Option<Self> {
        match first {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            _ => None,
        }
    }

    fn reader<'a>(self, from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(from))),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(from)?;
                decoder.window_log_max(WINDOW_LOG)?;
                Box::new(decoder)
            }
        })
    }

    /// As much of the first `count` bytes of the content as `first`, the start of the file, gives.
    pub fn first_bytes(self, first: &[u8], count: usize) -> Vec<u8> {
        let mut content = vec![0; count];
        let mut have = 0;
        if let Ok(mut reader) = self.reader(first) {
            while let Ok(read @ 1..) = reader.read(&mut content[have..]) {
                have += read;
            }
        }
        content.truncate(have);
        content
    }
}

impl Store {
    /// Puts the content of a compressed blob, which is in the store, into the store as a blob of its own with the digest
    /// `content`; no more than `limit` bytes of it. `read` hears of the bytes that were written.
    ///
    /// # Errors
    ///
    /// A blob that is damaged, has another content, or more than allowed; the system's.
    pub fn unpack(
        &self,
        blob: &Descriptor,
        how: Compression,
        content: &Digest,
        limit: u64,
        read: impl Fn(u64),
    ) -> Result<Descriptor> {
        let fail = |error: &io::Error| {
            Error::invalid(
                &blob.digest,
                format!("its compression is damaged: {}", message(error)),
            )
        };
        // Twice: a blob is begun with its size, and what does not fit is not begun.
        let mut size = 0;
        let mut hasher = Hasher::new(content.algorithm());
        each_piece(how, self.open_blob(blob)?, fail, |bytes| {
            size += bytes.len() as u64;
            if size > limit {
                let what = format!("more than {limit} bytes when it is unpacked");
                return Err(Error::new(Kind::Refused, &blob.digest, what));
            }
            hasher.update(bytes);
            Ok(())
        })?;
        let found = hasher.finish();
        if found != *content {
            let what =
                format!("its content has the digest {found}, and the configuration says {content}");
            return Err(Error::invalid(&blob.digest, what));
        }
        if size == 0 {
            return Err(Error::invalid(&blob.digest, "there is nothing in it"));
        }
        let whole = Descriptor::new(OCI_LAYER, found, size);
        if let Ingested::Part(mut part) = self.ingest(&whole, || ())? {
            part.restart()?;
            each_piece(how, self.open_blob(blob)?, fail, |bytes| {
                read(bytes.len() as u64);
                part.write(bytes)
            })?;
            part.commit()?;
        }
        Ok(whole)
    }
}

fn each_piece(
    how: Compression,
    file: File,
    fail: impl Fn(&io::Error) -> Error,
    mut piece: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut reader = how.reader(file).map_err(|error| fail(&error))?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match reader.read(&mut buffer).map_err(|error| fail(&error))? {
            0 => return Ok(()),
            count => piece(&buffer[..count])?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn content_by_its_digest_and_not_too_much() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path()).unwrap();
        let content: Vec<u8> = (0..300_000_u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        for (how, packed) in [
            (Compression::Gzip, gzip(&content)),
            (
                Compression::Zstd,
                zstd::encode_all(&content[..], 1).unwrap(),
            ),
        ] {
            assert_eq!(Compression::recognise(&packed), Some(how));
            assert_eq!(how.first_bytes(&packed[..200_000], 1000), content[..1000]);
            let blob = Descriptor::of("x", &packed);
            store.put(&blob, &packed).unwrap();
            let unpack = |digest: &Digest, limit| store.unpack(&blob, how, digest, limit, |_| ());
            assert!(unpack(&Digest::of(b"other"), 2_000_000)
                .unwrap_err()
                .what()
                .contains("has the digest"));
            assert!(unpack(&Digest::of(&content), 1_199_999)
                .unwrap_err()
                .what()
                .contains("more than"));
            let whole = unpack(&Digest::of(&content), 1_200_000).unwrap();
            assert!(store.has_blob(&whole).unwrap());
            std::fs::remove_file(store.blob_path(&whole.digest)).unwrap();
        }
        let bomb = gzip(&vec![0; 50 << 20]);
        let blob = Descriptor::of("x", &bomb);
        store.put(&blob, &bomb).unwrap();
        let error = store
            .unpack(&blob, Compression::Gzip, &Digest::of(b""), 1 << 20, |_| ())
            .unwrap_err();
        assert!(error.what().contains("more than"), "{error}");
        let cut = Descriptor::of("x", &bomb[..bomb.len() / 2]);
        store.put(&cut, &bomb[..bomb.len() / 2]).unwrap();
        assert!(store
            .unpack(&cut, Compression::Gzip, &Digest::of(b""), 1 << 30, |_| ())
            .is_err());
        assert_eq!(Compression::recognise(b"LSMT"), None);
        assert!(Compression::Gzip
            .first_bytes(b"\x1f\x8bnonsense", 10)
            .is_empty());
    }
}
