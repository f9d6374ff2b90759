// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The index beside a TurboOCI layer that says where in a gzip file one can begin to decompress, "ddgzidx".
//!
//! ```text
//! 0      header, 333 bytes
//! 333    windows: the 32 KiB of content before each point, as they are or each as a zlib stream
//!        table of the points, 29 bytes each, as it is or as one zlib stream, up to the end of the file
//! ```
//!
//! A point is between two blocks of deflate, at any bit. Integers are little-endian. Only the header has a checksum.

/// Bytes of the header.
pub const HEADER_BYTES: usize = 333;

/// Bytes of a point in the table.
pub const POINT_BYTES: usize = 29;

/// Bytes of content that deflate can refer back to.
pub const WINDOW_BYTES: usize = 32768;

/// Bytes of the header that its checksum is about, a CRC-32C as of a ZFile.
pub const CHECKED_BYTES: usize = 329;

/// Bytes of a window that is compressed, at most: what cannot be compressed grows a little.
const MAX_PACKED_WINDOW: u32 = 33 << 10;

/// Deflate makes no more of a byte.
const MAX_RATIO: u64 = 1032;

const MAGIC: &[u8; 8] = b"ddgzidx\0";

/// Where an index has what, and how large the file is that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whether windows and table are zlib streams.
    pub compressed: bool,
    /// Points in the table.
    pub points: u64,
    /// Bytes of the gzip file.
    pub gzip_bytes: u64,
    /// Bytes of its content.
    pub content_bytes: u64,
    /// Where the table is in the index.
    pub table_at: u64,
    /// Bytes that it takes there.
    pub table_bytes: u64,
    /// The checksum.
    pub crc: u32,
}

/// What is wrong with an index.
pub type Wrong = &'static str;

/// A place in the gzip file at which one can begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Byte of the content.
    pub content_at: u64,
    /// First byte of the gzip file of which nothing was read before.
    pub gzip_at: u64,
    /// The highest bits of the byte before that are not read yet.
    pub bits: u8,
    /// Where the window is in the index.
    pub window_at: u64,
    /// Bytes that it takes there.
    pub window_bytes: u32,
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let found = from.get(at..).and_then(<[u8]>::first_chunk);
    found.copied().unwrap_or([0; N])
}

fn u64_at(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(from, at))
}

fn u32_at(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(from, at))
}

impl Header {
    /// Reads the header of an index of `index_bytes`. Its checksum is for the caller to check.
    ///
    /// # Errors
    ///
    /// Why it is none that can be used.
    pub fn parse(block: &[u8; HEADER_BYTES], index_bytes: u64) -> Result<Self, Wrong> {
        let [major, _, algorithm, ..] = bytes::<5>(block, 8);
        if bytes(block, 0) != *MAGIC {
            return Err("no index of a gzip file");
        }
        if major != 1 || algorithm > 1 {
            return Err("an index of another version");
        }
        if u32_at(block, 17) as usize != WINDOW_BYTES || u32_at(block, 21) as usize != POINT_BYTES {
            return Err("an index with windows or points of another size");
        }
        let header = Self {
            compressed: algorithm == 1,
            points: u64_at(block, 25),
            gzip_bytes: u64_at(block, 33),
            content_bytes: u64_at(block, 49),
            table_at: u64_at(block, 313),
            table_bytes: u64_at(block, 321),
            crc: u32_at(block, CHECKED_BYTES),
        };
        let end = header.table_at.checked_add(header.table_bytes);
        if u64_at(block, 41) != index_bytes || end != Some(index_bytes) {
            return Err("an index of another size than it says");
        }
        let bytes = header.points.checked_mul(POINT_BYTES as u64);
        let fits = |bytes| match header.compressed {
            true => bytes / MAX_RATIO <= header.table_bytes,
            false => bytes == header.table_bytes,
        };
        if header.table_at < HEADER_BYTES as u64 || header.points == 0 || !bytes.is_some_and(fits) {
            return Err("an index with a table that cannot be there");
        }
        Ok(header)
    }
}

impl Point {
    /// The first bit of the gzip file that was not read before.
    fn bit(&self) -> u128 {
        (u128::from(self.gzip_at) * 8).saturating_sub(self.bits.into())
    }

    /// Reads a point, which comes after `before`.
    ///
    /// # Errors
    ///
    /// Why there cannot be one.
    pub fn parse(
        entry: &[u8; POINT_BYTES],
        header: &Header,
        before: Option<&Self>,
    ) -> Result<Self, Wrong> {
        let point = Self {
            content_at: u64_at(entry, 0),
            gzip_at: u64_at(entry, 8),
            bits: bytes::<1>(entry, 24)[0],
            window_at: u64_at(entry, 16),
            window_bytes: u32_at(entry, 25),
        };
        let in_order = match before {
            None => point.content_at == 0,
            // At least a bit for each: there are no more of them than the file has room for.
            Some(before) => before.content_at < point.content_at && before.bit() < point.bit(),
        };
        if !in_order {
            return Err("a point that is not behind the one before it");
        }
        let inside = point.content_at <= header.content_bytes && point.gzip_at <= header.gzip_bytes;
        if !inside || point.bits > 7 || point.gzip_at == 0 {
            return Err("a point that is not in the file");
        }
        let size = point.window_bytes;
        let size_is_right = match header.compressed {
            true => size <= MAX_PACKED_WINDOW,
            false => size as usize == WINDOW_BYTES,
        };
        let end = point.window_at.checked_add(size.into());
        if !size_is_right
            || point.window_at < HEADER_BYTES as u64
            || end.is_none_or(|end| end > header.table_at)
        {
            return Err("a point with a window that cannot be there");
        }
        Ok(point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(change: impl Fn(&mut [u8; HEADER_BYTES])) -> Result<Header, Wrong> {
        let mut block = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(8, &[1, 0, 0, 6, 0]);
        put(17, &(WINDOW_BYTES as u32).to_le_bytes());
        put(21, &(POINT_BYTES as u32).to_le_bytes());
        for (at, value) in [
            (25, 2_u64),
            (33, 1000),
            (41, 333 + 65536 + 58),
            (49, 5000),
            (313, 333 + 65536),
            (321, 58),
        ] {
            put(at, &value.to_le_bytes());
        }
        change(&mut block);
        Header::parse(&block, 333 + 65536 + 58)
    }

    #[test]
    fn headers_and_points() {
        let good = header(|_| ()).unwrap();
        assert_eq!((good.points, good.gzip_bytes), (2, 1000));
        for (at, value) in [
            (0, 1),
            (8, 2),
            (10, 2),
            (18, 1),
            (21, 30),
            (25, 3),
            (41, 1),
            (49 + 200, 0),
            (313, 1),
            (321, 59),
            (25, 0),
            (32, 0xff),
            (328, 0x80),
            (320, 0xff),
        ] {
            let result = header(|block| block[at] = value);
            assert_eq!(result.is_ok(), at == 249, "{at}");
        }
        // So many points are in no table of so few bytes.
        assert!(header(|block| {
            block[10] = 1;
            block[28] = 1;
        })
        .is_err());
        let entry = |point: [u64; 3], bits: u8, window: u32| {
            let mut entry = [0; POINT_BYTES];
            for (to, value) in entry.chunks_mut(8).zip(point) {
                to.copy_from_slice(&value.to_le_bytes());
            }
            entry[24] = bits;
            entry[25..].copy_from_slice(&window.to_le_bytes());
            entry
        };
        let parse = |point, bits, before: Option<&Point>| {
            Point::parse(&entry(point, bits, 32768), &good, before)
        };
        let first = parse([0, 10, 333], 0, None).unwrap();
        let second = parse([4000, 11, 333 + 32768], 7, Some(&first)).unwrap();
        assert!(parse([1, 10, 333], 0, None).is_err());
        assert!(parse([4000, 10, 333], 0, Some(&second)).is_err());
        assert!(parse([4001, 9, 333], 0, Some(&second)).is_err());
        assert!(parse([4001, 11, 333], 7, Some(&second)).is_err());
        assert!(parse([4001, 11, 333], 6, Some(&second)).is_ok());
        for (point, bits) in [
            ([5001, 20, 333], 0),
            ([5000, 1001, 333], 0),
            ([5000, 20, 332], 0),
            ([5000, 20, 334 + 32768], 0),
            ([5000, 20, u64::MAX], 0),
            ([5000, 20, 333], 8),
        ] {
            assert!(parse(point, bits, Some(&first)).is_err(), "{point:?}");
        }
        assert!(parse([0, 0, 333], 0, None).is_err());
        let small = Point::parse(&entry([0, 10, 333], 0, 32767), &good, None);
        assert!(small.is_err());
    }
}
