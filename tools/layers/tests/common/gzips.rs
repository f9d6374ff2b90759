// SPDX-License-Identifier: GPL-2.0

//! Gzip files of which every block of deflate is known, and indexes of them.

#![allow(dead_code, missing_docs)]

use std::io::Write as _;

use flate2::{write::ZlibEncoder, Compression, Crc};

/// A gzip file, with the places between its blocks.
pub struct Gzip {
    pub bytes: Vec<u8>,
    /// Byte of the content, and bit of the file, at which each block begins.
    pub blocks: Vec<(usize, usize)>,
}

/// Bits, the lowest of each byte first.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    used: usize,
}

impl Bits {
    fn put(&mut self, value: u32, count: usize) {
        for bit in 0..count {
            if self.used % 8 == 0 {
                self.bytes.push(0);
            }
            if (value >> bit) & 1 == 1 {
                *self.bytes.last_mut().unwrap() |= 1 << (self.used % 8);
            }
            self.used += 1;
        }
    }

    /// A code, whose highest bit comes first.
    fn code(&mut self, value: u32, count: usize) {
        (0..count)
            .rev()
            .for_each(|bit| self.put((value >> bit) & 1, 1));
    }

    fn literal(&mut self, byte: u8) {
        match byte {
            0..=143 => self.code(0x30 + u32::from(byte), 8),
            _ => self.code(0x190 + u32::from(byte) - 144, 9),
        }
    }

    /// The last block of fixed codes, which is not ended, says three bytes from `back` bytes ago, 24577 at least.
    fn far(&mut self, back: usize) {
        self.code(1, 7);
        self.code(29, 5);
        self.put((back - 24577) as u32, 13);
    }
}

impl Gzip {
    /// `content` in blocks of these many bytes, in turns stored and in fixed codes that refer back as far as possible where they
    /// can.
    pub fn new(content: &[u8], sizes: &[usize]) -> Self {
        let mut bits = Bits::default();
        for byte in [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255] {
            bits.put(byte, 8);
        }
        let mut blocks = Vec::new();
        let mut at = 0;
        for (number, size) in sizes.iter().cycle().enumerate() {
            let end = content.len().min(at + size);
            let last = u32::from(end == content.len());
            blocks.push((at, bits.used));
            bits.put(last, 1);
            if number % 3 == 2 {
                bits.put(0, 2);
                bits.put(0, bits.used.next_multiple_of(8) - bits.used);
                bits.put((end - at) as u32, 16);
                bits.put(!(end - at) as u32, 16);
                content[at..end]
                    .iter()
                    .for_each(|byte| bits.put((*byte).into(), 8));
                at = end;
            } else {
                bits.put(1, 2);
                while at < end {
                    let three = content.get(at..at + 3).filter(|_| at + 3 <= end);
                    let before = |back: usize| Some(&content[at.checked_sub(back)?..][..3]);
                    let back = [32768, 32767, 30000, 24577]
                        .into_iter()
                        .find(|back| three.is_some() && before(*back) == three);
                    match back {
                        Some(back) => {
                            bits.far(back);
                            at += 3;
                        }
                        None => {
                            bits.literal(content[at]);
                            at += 1;
                        }
                    }
                }
                bits.code(0, 7);
            }
            if last == 1 {
                break;
            }
        }
        let mut bytes = bits.bytes;
        let mut crc = Crc::new();
        crc.update(content);
        bytes.extend_from_slice(&crc.sum().to_le_bytes());
        bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        Self { bytes, blocks }
    }

    /// The index of those blocks that `wanted` takes; the first is always there.
    pub fn index(
        &self,
        content: &[u8],
        compressed: bool,
        wanted: impl Fn(usize) -> bool,
    ) -> Vec<u8> {
        let mut index = vec![0; 333];
        let mut table = Vec::new();
        let pack = |bytes: &[u8]| match compressed {
            false => bytes.to_vec(),
            true => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
        };
        let mut points = 0_u64;
        for (number, (at, bit)) in self.blocks.iter().enumerate() {
            if number > 0 && !wanted(number) {
                continue;
            }
            points += 1;
            let mut window = vec![0; 32768];
            let before = &content[at.saturating_sub(32768)..*at];
            window[32768 - before.len()..].copy_from_slice(before);
            let window = pack(&window);
            for value in [*at, bit.div_ceil(8), index.len()] {
                table.extend_from_slice(&(value as u64).to_le_bytes());
            }
            table.push((bit.next_multiple_of(8) - bit) as u8);
            table.extend_from_slice(&(window.len() as u32).to_le_bytes());
            index.extend_from_slice(&window);
        }
        let table_at = index.len() as u64;
        let table = pack(&table);
        index.extend_from_slice(&table);
        index[..8].copy_from_slice(b"ddgzidx\0");
        index[8..13].copy_from_slice(&[1, 0, u8::from(compressed), 6, 0]);
        index[13..17].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        index[17..21].copy_from_slice(&32768_u32.to_le_bytes());
        index[21..25].copy_from_slice(&29_u32.to_le_bytes());
        for (at, value) in [
            (25, points),
            (33, self.bytes.len() as u64),
            (41, index.len() as u64),
            (49, content.len() as u64),
            (313, table_at),
            (321, table.len() as u64),
        ] {
            index[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        set_checksum(&mut index);
        index
    }
}

/// Puts the checksum of the header of an index right.
pub fn set_checksum(index: &mut [u8]) {
    // As in ZFiles: inverted neither before nor after.
    let crc = !crc32c::crc32c_append(!0, &index[..329]);
    index[329..333].copy_from_slice(&crc.to_le_bytes());
}
