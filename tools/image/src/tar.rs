// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The tar wrapper in which registries carry a layer.
//!
//! The original writes one member: a pax header `overlaybd.pax` whose only record is the size, and a
//! header `overlaybd.commit` whose own size is 0; the blob starts at byte 1536. Without a pax header the
//! blob starts at byte 512 and the header's own size counts. A file is recognised as such a tar when its
//! first header says "ustar", version "00", and has a right checksum; other kinds of tar (GNU) are not
//! recognised, as the original does not.

use super::error::{Error, Reason};

/// Bytes of a tar header, and the unit of everything in a tar.
pub const BLOCK_BYTES: usize = 512;

/// Bytes that must be looked at to recognise the wrapper; a shorter file is given whole.
pub const LOOK_BYTES: usize = 3 * BLOCK_BYTES;

/// Bytes before the blob in a wrapper that [`header`] makes.
pub const HEADER_BYTES: usize = 3 * BLOCK_BYTES;

/// Where a wrapped blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// First byte of the blob in the file.
    pub offset: u64,
    /// Bytes of the blob.
    pub bytes: u64,
}

// Fields of a header: first byte and the byte after the last.
const NAME_BYTES: usize = 100;
const MODE: (usize, usize) = (100, 108);
const UID: (usize, usize) = (108, 116);
const GID: (usize, usize) = (116, 124);
const SIZE: (usize, usize) = (124, 136);
const MTIME: (usize, usize) = (136, 148);
const CHECKSUM: (usize, usize) = (148, 156);
const TYPE: usize = 156;
const MAGIC: (usize, usize) = (257, 262);
const VERSION: (usize, usize) = (263, 265);
const USER: usize = 265;
const GROUP: usize = 297;
/// In a header of GNU's tar: the number of the extents that are in more headers.
const SPARSE_GOES_ON: usize = 482;
/// The same in those headers.
const MORE_SPARSE_GOES_ON: usize = 504;

/// Finds the blob in a file of `file_bytes` that starts with `first` ([`LOOK_BYTES`], or all of a shorter
/// file); `None` where there is no wrapper.
///
/// # Errors
///
/// A wrapper whose records are not understood, that holds no regular file, or that announces more bytes
/// than there are.
pub fn recognise(first: &[u8], file_bytes: u64) -> Result<Option<Member>, Error> {
    let Some(header) = block(first, 0) else {
        return Ok(None);
    };
    if !is_header(header) {
        return Ok(None);
    }
    let (offset, bytes) = match header.get(TYPE) {
        Some(b'x' | b'g') => {
            let truncated = Error::new(Reason::TarTruncated, file_bytes);
            let records = block(first, 1).ok_or(truncated)?;
            let member = block(first, 2).ok_or(truncated)?;
            let used = usize::try_from(octal(header, SIZE))
                .ok()
                .and_then(|used| records.get(..used))
                .ok_or(Error::new(Reason::TarPax, SIZE.0 as u64))?;
            let size = pax_size(used).ok_or(Error::new(Reason::TarPax, BLOCK_BYTES as u64))?;
            let size = match size {
                0 => octal(member, SIZE),
                size => size,
            };
            (3 * BLOCK_BYTES as u64, size)
        }
        Some(b'0' | 0) => (BLOCK_BYTES as u64, octal(header, SIZE)),
        _ => return Err(Error::new(Reason::TarType, TYPE as u64)),
    };
    match offset.checked_add(bytes) {
        Some(end) if end <= file_bytes => Ok(Some(Member { offset, bytes })),
        _ => Err(Error::new(Reason::TarTruncated, file_bytes)),
    }
}

fn block(first: &[u8], number: usize) -> Option<&[u8; BLOCK_BYTES]> {
    first
        .get(number * BLOCK_BYTES..)?
        .first_chunk::<BLOCK_BYTES>()
}

fn is_header(block: &[u8; BLOCK_BYTES]) -> bool {
    block.get(MAGIC.0..MAGIC.1) == Some(b"ustar")
        && block.get(VERSION.0..VERSION.1) == Some(b"00")
        && has_checksum(block)
}

fn has_checksum(block: &[u8; BLOCK_BYTES]) -> bool {
    let stored = octal(block, CHECKSUM);
    // Historic writers summed signed bytes.
    stored == sum(block, u64::from) || stored == sum(block, |byte| i64::from(byte as i8) as u64)
}

/// The header of a member of any tar, historic, POSIX's or GNU's, as far as it says what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberHeader {
    /// Type of the member.
    pub kind: u8,
    /// Bytes of its content.
    pub bytes: u64,
    /// When it was changed last, in seconds since 1970; the largest number where that is earlier.
    pub mtime: u64,
    /// Whether another header of the same sparse file follows, as [`sparse_goes_on`] says of that one.
    pub sparse_goes_on: bool,
}

impl MemberHeader {
    /// Reads a block that is a header by its checksum.
    pub fn parse(block: &[u8; BLOCK_BYTES]) -> Option<Self> {
        // A block of zeros has no checksum: that is the sum of eight spaces.
        has_checksum(block).then(|| Self {
            kind: block.get(TYPE).copied().unwrap_or(0),
            bytes: number(block, SIZE),
            mtime: number(block, MTIME),
            sparse_goes_on: block.get(SPARSE_GOES_ON).is_some_and(|byte| *byte != 0),
        })
    }
}

/// The name in the header of a member, as far as it is there: longer ones are elsewhere.
pub fn member_name(block: &[u8; BLOCK_BYTES]) -> &[u8] {
    let field = block.get(..NAME_BYTES).unwrap_or(&[]);
    field.split(|byte| *byte == 0).next().unwrap_or(&[])
}

/// Whether one more header of a sparse file follows the one in `block`, which is not its first.
pub fn sparse_goes_on(block: &[u8; BLOCK_BYTES]) -> bool {
    block
        .get(MORE_SPARSE_GOES_ON)
        .is_some_and(|byte| *byte != 0)
}

/// A number in octal, or in binary as GNU's tar writes what does not fit; the largest one where it is larger.
fn number(block: &[u8; BLOCK_BYTES], field: (usize, usize)) -> u64 {
    let bytes = block.get(field.0..field.1).unwrap_or(&[]);
    match bytes.split_first() {
        Some((0x80, rest)) => {
            let (high, low) = rest.split_at(rest.len().saturating_sub(8));
            match (high.iter().all(|byte| *byte == 0), low.first_chunk()) {
                (true, Some(low)) => u64::from_be_bytes(*low),
                _ => u64::MAX,
            }
        }
        // A negative one has no meaning.
        Some((first, _)) if first & 0x80 != 0 => u64::MAX,
        _ => octal(block, field),
    }
}

/// The checksum of a header: the sum of its bytes, with spaces in place of the checksum.
fn sum(block: &[u8; BLOCK_BYTES], value: impl Fn(u8) -> u64) -> u64 {
    block
        .iter()
        .enumerate()
        .map(|(i, byte)| match (CHECKSUM.0..CHECKSUM.1).contains(&i) {
            true => u64::from(b' '),
            false => value(*byte),
        })
        .fold(0, u64::wrapping_add)
}

/// An octal number after optional spaces; anything else ends it. 0 where there is none, as in the
/// original, and the largest number where it is too large.
fn octal(block: &[u8; BLOCK_BYTES], field: (usize, usize)) -> u64 {
    block
        .get(field.0..field.1)
        .unwrap_or(&[])
        .iter()
        .skip_while(|c| c.is_ascii_whitespace())
        .take_while(|c| (b'0'..=b'7').contains(c))
        .fold(0, |value: u64, digit| {
            value
                .checked_mul(8)
                .map_or(u64::MAX, |value| value | u64::from(digit - b'0'))
        })
}

/// The size among pax records ("length key=value\n"), 0 where there is none, `None` where the records
/// are malformed.
pub fn pax_size(mut records: &[u8]) -> Option<u64> {
    let mut size = 0;
    while !records.is_empty() {
        let (record, rest) = next_record(records)?;
        if let Some(value) = record.strip_prefix(b"size=") {
            size = decimal(value)?;
        }
        records = rest;
    }
    Some(size)
}

/// Whether pax records say that the next member is one of GNU's sparse files: its content begins with, or is beside, the
/// places where it belongs.
pub fn pax_is_sparse(mut records: &[u8]) -> bool {
    while let Some((record, rest)) = next_record(records) {
        if record.starts_with(b"GNU.sparse.") {
            return true;
        }
        records = rest;
    }
    false
}

/// The first of pax records, without its length, and those that follow.
fn next_record(records: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = records.iter().position(|c| *c == b' ')?;
    let length = usize::try_from(decimal(records.get(..space)?)?).ok()?;
    let record = records.get(space.checked_add(1)?..length)?;
    match record.split_last()? {
        (b'\n', record) => Some((record, records.get(length..)?)),
        _ => None,
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        if !digit.is_ascii_digit() {
            return None;
        }
        value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    })
}

/// The bytes before a blob of `bytes`, equal to what the original writes.
///
/// After the blob come zeros up to a multiple of [`BLOCK_BYTES`] and two blocks of zeros.
pub fn header(bytes: u64) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    let (pax, rest) = out.split_at_mut(BLOCK_BYTES);
    let (records, member) = rest.split_at_mut(BLOCK_BYTES);

    let used = pax_record(records, bytes);
    put(pax, 0, b"overlaybd.pax");
    put_number(pax, SIZE, used as u64);
    put_magic(pax, b'x');

    put(member, 0, b"overlaybd.commit");
    put(member, MODE.0, b"100644 ");
    put(member, UID.0, b"     0 ");
    put(member, GID.0, b"     0 ");
    put_number(member, SIZE, 0);
    put_number(member, MTIME, 0);
    put(member, USER, b"root");
    put(member, GROUP, b"root");
    put_magic(member, b'0');
    out
}

fn put(block: &mut [u8], at: usize, text: &[u8]) {
    for (to, from) in block.iter_mut().skip(at).zip(text) {
        *to = *from;
    }
}

/// A number in octal, right-aligned before one space.
fn put_number(block: &mut [u8], field: (usize, usize), mut value: u64) {
    let Some(field) = block.get_mut(field.0..field.1) else {
        return;
    };
    field.fill(b' ');
    for to in field.iter_mut().rev().skip(1) {
        *to = b'0' + (value & 7) as u8;
        value >>= 3;
        if value == 0 {
            break;
        }
    }
}

fn put_magic(block: &mut [u8], kind: u8) {
    put(block, TYPE, &[kind]);
    put(block, MAGIC.0, b"ustar\0");
    put(block, VERSION.0, b"00");
    let checksum = match block.first_chunk::<BLOCK_BYTES>() {
        Some(block) => sum(block, u64::from),
        None => 0,
    };
    // Six digits' room, a space and a NUL.
    put_number(block, (CHECKSUM.0, CHECKSUM.1 - 1), checksum);
}

/// Writes "length size=bytes\n" and returns its length, which counts itself.
fn pax_record(block: &mut [u8], bytes: u64) -> usize {
    let mut digits = [0; 20];
    let number = decimal_text(bytes, &mut digits);
    let body = b" size=".len() + number.len() + 1;
    let mut length = body + 1;
    // The length's own digits can add one more, once.
    while body + digit_count(length) != length {
        length += 1;
    }
    let mut own = [0; 20];
    let own = decimal_text(length as u64, &mut own);
    put(block, 0, own);
    put(block, own.len(), b" size=");
    put(block, own.len() + 6, number);
    put(block, own.len() + 6 + number.len(), b"\n");
    length
}

fn digit_count(mut value: usize) -> usize {
    let mut count = 1;
    while value >= 10 {
        value /= 10;
        count += 1;
    }
    count
}

fn decimal_text(mut value: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    for (i, to) in digits.iter_mut().enumerate().rev() {
        *to = b'0' + (value % 10) as u8;
        value /= 10;
        start = i;
        if value == 0 {
            break;
        }
    }
    digits.get(start..).unwrap_or(&[])
}
