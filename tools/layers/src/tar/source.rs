// SPDX-License-Identifier: GPL-2.0

//! Reading a tar, as it is or compressed with gzip or zstd, from a file or a pipe: once, in order.

use std::{
    borrow::Cow,
    io::{self, BufRead, Read},
    path::Path,
    sync::mpsc::sync_channel,
    thread,
};

use ovbd_image::lsmt::SECTOR_BYTES;

use crate::{
    error::{Error, Result},
    layer_writer::LayerWriter,
    report::Report,
    source::RawSource,
    stack::WINDOW_BYTES,
};

/// Largest window of zstd that is given memory, 2 to the power of this: what its highest levels use without `--long`.
const WINDOW_LOG: u32 = 27;

/// Windows that are read ahead.
const AHEAD: usize = 8;

/// How a tar is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// In one or several members.
    Gzip,
    /// In one or several frames.
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

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    fn reader<'a>(self, from: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(from)),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(from)?;
                decoder.window_log_max(WINDOW_LOG)?;
                Box::new(decoder)
            }
        })
    }
}

/// A tar that is not read yet.
pub struct TarSource {
    raw: RawSource,
    first: Vec<u8>,
    compression: Option<Compression>,
}

impl TarSource {
    /// Opens `path`; `-` is standard input.
    ///
    /// # Errors
    ///
    /// Those of [`RawSource::open`] and of reading.
    pub fn open(path: &Path) -> Result<Self> {
        let raw = RawSource::open(path, false)?;
        let mut first = Vec::new();
        if raw.is_stream() || raw.bytes() > 0 {
            raw.read_window(0, &mut first)?;
        }
        Ok(Self {
            compression: Compression::recognise(&first),
            raw,
            first,
        })
    }

    /// What it is called.
    pub fn path(&self) -> &Path {
        self.raw.path()
    }

    /// The file, if what is in it is the tar itself.
    pub fn plain(&self) -> Option<&RawSource> {
        (!self.raw.is_stream() && self.compression.is_none()).then_some(&self.raw)
    }

    /// Whether the tar is compressed.
    pub fn is_compressed(&self) -> bool {
        self.compression.is_some()
    }

    /// Stores `window`, which is at byte `at` of the tar, in a layer, with zeros up to a whole sector: only the last one has
    /// none. Returns the bytes that were stored.
    ///
    /// # Errors
    ///
    /// Those of [`RawSource::copy_to`].
    pub fn store(&self, layer: &mut LayerWriter<'_>, window: &[u8], at: u64) -> Result<u64> {
        let padded = window.len().next_multiple_of(SECTOR_BYTES as usize);
        match self.plain() {
            Some(raw) if padded == window.len() => raw.copy_to(layer, window, at)?,
            _ => {
                let mut whole = Cow::Borrowed(window);
                whole.to_mut().resize(padded, 0);
                layer.unmapped(&whole)?;
            }
        }
        Ok(padded as u64)
    }

    /// Calls `take` with every MiB of the tar in order, the last of which may be shorter; a thread reads ahead. Returns the
    /// bytes of the tar, of which there may be `limit` at most.
    ///
    /// # Errors
    ///
    /// Those of reading and of `take`, damaged compression, more than `limit`, and a file that was written meanwhile.
    pub fn each_window(
        &self,
        limit: u64,
        report: &dyn Report,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<u64> {
        if !self.raw.is_stream() {
            report.expect(self.raw.bytes());
        }
        let (queue, windows) = sync_channel(AHEAD);
        let bytes = thread::scope(|scope| {
            let reader = scope.spawn(move || -> Result<()> {
                let reader = self.reader(report)?;
                read_windows(reader, limit, |window| queue.send(window).is_ok())
                    .map_err(|error| self.error(error, limit))
            });
            let mut bytes = 0;
            let mut taken = Ok(());
            for window in windows {
                bytes += window.len() as u64;
                taken = take(&window);
                if taken.is_err() {
                    break;
                }
            }
            match reader.join() {
                Ok(read) => taken.and(read).map(|()| bytes),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })?;
        self.raw.check_unchanged()?;
        Ok(bytes)
    }

    fn reader<'a>(&'a self, report: &'a dyn Report) -> Result<Box<dyn Read + 'a>> {
        let windows = Windows {
            raw: &self.raw,
            report,
            buffer: self.first.clone(),
            at: 0,
            next: 1,
        };
        match self.compression {
            None => Ok(Box::new(windows)),
            Some(how) => how
                .reader(windows)
                .map_err(|e| Error::io(self.path(), "decompress", e)),
        }
    }

    /// What went wrong with the file, or else with the compression.
    fn error(&self, error: io::Error, limit: u64) -> Error {
        let error = match error.downcast::<Error>() {
            Ok(error) => return error,
            Err(error) => error,
        };
        if error.kind() == io::ErrorKind::FileTooLarge {
            let what = format!("holds more than {limit} bytes (--max-size allows more)");
            return Error::new(self.path(), what);
        }
        let how = self.compression.map_or("", Compression::name);
        Error::new(
            self.path(),
            format!("its {how} compression is damaged: {error}"),
        )
    }
}

/// Gives `take` windows until there are no more, or it wants none.
fn read_windows(
    mut reader: impl Read,
    limit: u64,
    mut take: impl FnMut(Vec<u8>) -> bool,
) -> io::Result<()> {
    let mut left = limit;
    loop {
        let mut window = Vec::with_capacity(WINDOW_BYTES as usize);
        (&mut reader).take(WINDOW_BYTES).read_to_end(&mut window)?;
        left = left
            .checked_sub(window.len() as u64)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let last = (window.len() as u64) < WINDOW_BYTES;
        if !window.is_empty() && !take(window) || last {
            return Ok(());
        }
    }
}

/// The windows of a source, one after the other.
struct Windows<'a> {
    raw: &'a RawSource,
    report: &'a dyn Report,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were taken.
    at: usize,
    /// Number of the window after the buffer.
    next: u64,
}

impl BufRead for Windows<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.buffer.len() && self.buffer.len() as u64 == WINDOW_BYTES {
            self.report.add(WINDOW_BYTES);
            self.buffer.clear();
            self.at = 0;
            if self.raw.is_stream() || self.next * WINDOW_BYTES < self.raw.bytes() {
                self.raw
                    .read_window(self.next, &mut self.buffer)
                    .map_err(io::Error::other)?;
                self.next += 1;
            }
        }
        Ok(&self.buffer[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl Read for Windows<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let have = self.fill_buf()?;
        let count = have.len().min(buffer.len());
        buffer[..count].copy_from_slice(&have[..count]);
        self.consume(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _};

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn read(packed: &[u8], limit: u64) -> Result<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, packed).unwrap();
        let mut all = Vec::new();
        let source = TarSource::open(&path)?;
        let bytes = source.each_window(limit, &(), |window| {
            all.extend_from_slice(window);
            Ok(())
        })?;
        assert_eq!(bytes, all.len() as u64);
        Ok(all)
    }

    #[test]
    fn members_and_frames_limits_and_damage() {
        let content: Vec<u8> = (0..900_000_u32)
            .flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 20).to_le_bytes())
            .collect();
        let (one, two) = content.split_at(1_234_567);
        let several = |pack: &dyn Fn(&[u8]) -> Vec<u8>| [pack(one), pack(two)].concat();
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        let limit = content.len() as u64;
        for packed in [
            content.clone(),
            gzip(&content),
            zstd(&content),
            several(&gzip),
            several(&zstd),
        ] {
            assert!(read(&packed, limit).unwrap() == content);
            let error = read(&packed, limit - 1).unwrap_err();
            assert!(error.what().contains("holds more than"), "{error}");
        }
        for mut packed in [gzip(&content), zstd(&content)] {
            packed.extend_from_slice(b"garbage");
            let error = read(&packed, limit).unwrap_err();
            assert!(error.what().contains("compression is damaged"), "{error}");
            assert!(read(&packed[..packed.len() / 2], limit).is_err());
        }
        assert!(read(b"", 0).unwrap().is_empty());
        let bomb = gzip(&vec![0; 64 << 20]);
        assert!(read(&bomb, 1 << 20).is_err());
    }

    #[test]
    fn an_error_of_taking_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, vec![1; 40 << 20]).unwrap();
        let source = TarSource::open(&path).unwrap();
        let result = source.each_window(u64::MAX, &(), |_| Err(Error::new(&path, "no")));
        assert_eq!(result.unwrap_err().what(), "no");
    }
}
