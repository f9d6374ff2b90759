// SPDX-License-Identifier: GPL-2.0

//! Reading parts of what a gzip file holds, by an index of the places at which one can begin.
//!
//! A place is a bit between two blocks of deflate, and what was decompressed before is needed as well, the window. A
//! decompressor wants neither: it is given a stream that begins with the window, in a block that is stored, and then with empty
//! blocks until the bits are where they are in the file ([`begin`]).

use std::{
    collections::VecDeque,
    io::{self, BufReader, Cursor, Read},
    path::Path,
    sync::{Mutex, PoisonError},
};

use flate2::bufread::{DeflateDecoder, ZlibDecoder};
use ovbd_image::gzip_index::{
    Header, Point, CHECKED_BYTES, HEADER_BYTES, POINT_BYTES, WINDOW_BYTES,
};

use crate::{
    crc::crc32c,
    error::{Error, Result},
    file_range::{FileRange, CHUNK_BYTES},
    report::Report,
};

/// Decompressors that are kept, each at its place, for who reads on there.
const KEPT: usize = 8;

/// Bytes behind the last block of deflate: checksum and size.
const END_BYTES: u64 = 8;

/// A gzip file and its index.
#[derive(Debug)]
pub struct GzipIndex {
    index: FileRange,
    gzip: FileRange,
    header: Header,
    points: Vec<Point>,
    kept: Mutex<VecDeque<Inflating>>,
}

impl GzipIndex {
    /// Opens the index at `path` of a gzip file.
    ///
    /// # Errors
    ///
    /// One that is damaged or of another file; one that does not reach to the end of the file, as where that has several
    /// members; and those of reading.
    pub fn open(path: &Path, gzip: FileRange) -> Result<Self> {
        let index = FileRange::open(path)?;
        let fail = |what: &str| Error::new(path, what);
        if index.bytes() < HEADER_BYTES as u64 {
            return Err(fail("no index of a gzip file"));
        }
        let block: [u8; HEADER_BYTES] = index.read_array(0)?;
        let header = Header::parse(&block, index.bytes()).map_err(fail)?;
        if crc32c(0, &block[..CHECKED_BYTES]) != header.crc {
            return Err(fail("the checksum of its header is wrong"));
        }
        if header.gzip_bytes != gzip.bytes() {
            let what = format!(
                "the index of a gzip file of {} bytes, and {} has {}",
                header.gzip_bytes,
                crate::error::name(gzip.path()),
                gzip.bytes()
            );
            return Err(fail(&what));
        }
        let mut points: Vec<Point> = Vec::new();
        let mut table = table(&index, &header);
        let mut entry = [0; POINT_BYTES];
        for _ in 0..header.points {
            let read = table.read_exact(&mut entry);
            read.map_err(|e| fail(&format!("its table is damaged: {e}")))?;
            let point = Point::parse(&entry, &header, points.last()).map_err(fail)?;
            points.push(point);
        }
        drop(table);
        let opened = Self {
            index,
            gzip,
            header,
            points,
            kept: Mutex::default(),
        };
        opened.check_end()?;
        Ok(opened)
    }

    /// Bytes of the content.
    pub fn bytes(&self) -> u64 {
        self.header.content_bytes
    }

    /// The gzip file.
    pub fn gzip(&self) -> &FileRange {
        &self.gzip
    }

    /// Fills `buffer` from byte `offset` of the content.
    ///
    /// # Errors
    ///
    /// A range that is not inside, damage, and those of reading.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.bytes()) {
            return Err(Error::new(self.gzip.path(), "ends too early"));
        }
        if buffer.is_empty() {
            return Ok(());
        }
        let mut inflating = self.at(offset)?;
        let mut fill = |inflating: &mut Inflating| {
            inflating.skip_to(offset)?;
            inflating.read_exact(buffer)
        };
        fill(&mut inflating).map_err(|e| self.damage(&e))?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(inflating);
        if kept.len() > KEPT {
            kept.pop_front();
        }
        Ok(())
    }

    /// Checks the index against all of the content, `tar`: every window, and what comes from every point on.
    ///
    /// # Errors
    ///
    /// What differs, and those of reading.
    pub fn check(&self, tar: &FileRange, report: &dyn Report) -> Result<()> {
        let differs = |point: &Point| {
            let what = format!(
                "its point at byte {} of the content gives something else",
                point.content_at
            );
            Err(Error::new(self.index.path(), what))
        };
        if tar.bytes() != self.bytes() {
            let what = format!(
                "the index of {} bytes of content, and there are {}",
                self.bytes(),
                tar.bytes()
            );
            return Err(Error::new(self.index.path(), what));
        }
        let (mut wanted, mut found) = (Vec::new(), Vec::new());
        for (number, point) in self.points.iter().enumerate() {
            let before = point.content_at.min(WINDOW_BYTES as u64);
            wanted.resize(before as usize, 0);
            tar.read(&mut wanted, point.content_at - before)?;
            if !self.window(point)?.ends_with(&wanted) {
                return differs(point);
            }
            let next = self.points.get(number + 1);
            let end = next.map_or(self.bytes(), |next| next.content_at);
            let mut inflating = self.begin(point)?;
            let mut at = point.content_at;
            while at < end {
                let now = (end - at).min(CHUNK_BYTES as u64) as usize;
                wanted.resize(now, 0);
                found.resize(now, 0);
                tar.read(&mut wanted, at)?;
                let read = inflating.read_exact(&mut found);
                read.map_err(|e| self.damage(&e))?;
                if wanted != found {
                    return differs(point);
                }
                at += now as u64;
                report.add(now as u64);
            }
        }
        Ok(())
    }

    /// Checks that the file ends with the content: of another member nothing is known.
    fn check_end(&self) -> Result<()> {
        let Some(last) = self.points.last() else {
            return Ok(());
        };
        let mut inflating = self.begin(last)?;
        let mut rest = inflating.skip_to(self.bytes());
        if rest.is_ok() {
            // One more byte is one too many, and not there.
            rest = match inflating.read(&mut [0]) {
                Ok(0) => Ok(()),
                Ok(_) => Err(io::Error::other(
                    "there is more content than the index says",
                )),
                Err(e) => Err(e),
            };
        }
        rest.map_err(|e| self.damage(&e))?;
        if inflating.gzip_at() + END_BYTES != self.gzip.bytes() {
            let what = "has more than one member, and the index is of the first alone";
            return Err(Error::new(self.gzip.path(), what));
        }
        Ok(())
    }

    fn damage(&self, error: &io::Error) -> Error {
        let what = format!("its gzip compression or its index is damaged: {error}");
        Error::new(self.gzip.path(), what)
    }

    /// A decompressor that is at `offset` of the content or before it, and no point is nearer.
    fn at(&self, offset: u64) -> Result<Inflating> {
        let next = self
            .points
            .partition_point(|point| point.content_at <= offset);
        // The first point is at byte 0.
        let point = &self.points[next.saturating_sub(1)];
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |one: &Inflating| (point.content_at..=offset).contains(&one.content_at);
        if let Some(place) = kept.iter().position(fits) {
            if let Some(found) = kept.remove(place) {
                return Ok(found);
            }
        }
        drop(kept);
        self.begin(point)
    }

    /// A decompressor that is at a point.
    fn begin(&self, point: &Point) -> Result<Inflating> {
        let window = self.window(point)?;
        let mut partial = [0];
        if point.bits > 0 {
            self.gzip.read(&mut partial, point.gzip_at - 1)?;
        }
        let (beginning, skip) = begin(&window, partial[0], point.bits);
        let rest = Bytes {
            file: self.gzip.clone(),
            at: point.gzip_at,
        };
        let beginning_bytes = beginning.len() as u64;
        let stream = BufReader::with_capacity(64 << 10, Cursor::new(beginning).chain(rest));
        let mut inflating = Inflating {
            decoder: DeflateDecoder::new(stream),
            // What comes first is the window.
            content_at: 0,
            start: point.gzip_at,
            beginning: beginning_bytes,
        };
        let skipped = inflating.skip_to(skip);
        skipped.map_err(|e| self.damage(&e))?;
        inflating.content_at = point.content_at;
        Ok(inflating)
    }

    /// What was decompressed before a point.
    fn window(&self, point: &Point) -> Result<Box<[u8; WINDOW_BYTES]>> {
        let mut window = Box::new([0; WINDOW_BYTES]);
        let part = self.index.part(point.window_at, point.window_bytes.into());
        let mut stream = stream(part, self.header.compressed);
        let read = stream.read_exact(&mut window[..]);
        let more = stream.read(&mut [0]);
        if read.is_err() || !matches!(more, Ok(0)) {
            let what = "a window of it is damaged";
            return Err(Error::new(self.index.path(), what));
        }
        Ok(window)
    }
}

/// What part of an index holds.
fn stream(part: FileRange, compressed: bool) -> Box<dyn Read> {
    let bytes = BufReader::new(Bytes { file: part, at: 0 });
    match compressed {
        true => Box::new(ZlibDecoder::new(bytes)),
        false => Box::new(bytes),
    }
}

fn table(index: &FileRange, header: &Header) -> BufReader<Box<dyn Read>> {
    let part = index.part(header.table_at, header.table_bytes);
    BufReader::new(stream(part, header.compressed))
}

/// A range of a file, read from `at` on.
#[derive(Debug)]
struct Bytes {
    file: FileRange,
    at: u64,
}

impl Read for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.file.bytes().saturating_sub(self.at);
        let now = left.min(buffer.len() as u64) as usize;
        self.file
            .read(&mut buffer[..now], self.at)
            .map_err(io::Error::other)?;
        self.at += now as u64;
        Ok(now)
    }
}

/// A decompressor that is somewhere in the content.
#[derive(Debug)]
struct Inflating {
    decoder: DeflateDecoder<BufReader<io::Chain<Cursor<Vec<u8>>, Bytes>>>,
    content_at: u64,
    /// First byte of the file behind the beginning that was made up, and the bytes of that.
    start: u64,
    beginning: u64,
}

impl Inflating {
    /// The first byte of the file that was not decompressed.
    fn gzip_at(&self) -> u64 {
        (self.start + self.decoder.total_in()).saturating_sub(self.beginning)
    }

    /// Goes on to a byte of the content.
    fn skip_to(&mut self, content_at: u64) -> io::Result<()> {
        let left = content_at - self.content_at;
        let skipped = io::copy(&mut self.take(left), &mut io::sink())?;
        match skipped == left {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Read for Inflating {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer)?;
        self.content_at += read as u64;
        Ok(read)
    }
}

/// Blocks of deflate, and how many bytes they give: the window, and perhaps some before it. They end in the `bits` highest bits
/// of `partial`, which are the first ones of the file.
///
/// The bits must be as far from the end of their byte as they are in the file, because stored blocks there are aligned to
/// bytes. An empty block of fixed codes has 10 bits, so some of them move what follows by any even number. For an odd one
/// there is first a block with the last three bytes of the window as a reference, which has 35: they are put before the rest
/// of the window, which is 32768 bytes back, a distance with an odd number of bits.
fn begin(window: &[u8; WINDOW_BYTES], partial: u8, bits: u8) -> (Vec<u8>, u64) {
    const AGAIN: usize = 3;
    let used = (8 - bits) % 8;
    let odd = used % 2 == 1;
    let (rest, last) = window.split_at(WINDOW_BYTES - AGAIN);
    let parts: [&[u8]; 2] = match odd {
        true => [last, rest],
        false => [&window[..], &[]],
    };
    let stored = parts.concat();
    // Not the last block, stored; its bytes, and those inverted.
    let mut stream = vec![0];
    stream.extend_from_slice(&(WINDOW_BYTES as u16).to_le_bytes());
    stream.extend_from_slice(&(!(WINDOW_BYTES as u16)).to_le_bytes());
    stream.extend_from_slice(&stored);
    let mut written = Bits::default();
    if odd {
        written.put(0b010, 3);
        // Three bytes, without further bits; from 24577 bytes back and 13 bits more. Codes begin with their highest bit.
        written.put(0b100_0000, 7);
        written.put(0b10111, 5);
        written.put(32768 - 24577, 13);
        written.put(0, 7);
    }
    while written.count % 8 != used.into() {
        written.put(0b010, 3);
        written.put(0, 7);
    }
    let mut tail = written.value.to_le_bytes()[..written.count.div_ceil(8)].to_vec();
    if let (Some(byte), 1..) = (tail.last_mut(), bits) {
        *byte |= partial & (0xff << used);
    }
    stream.append(&mut tail);
    let again = if odd { AGAIN as u64 } else { 0 };
    (stream, WINDOW_BYTES as u64 + again)
}

/// Bits, the lowest first.
#[derive(Default)]
struct Bits {
    value: u128,
    count: usize,
}

impl Bits {
    fn put(&mut self, value: u128, count: usize) {
        self.value |= value << self.count;
        self.count += count;
    }
}
