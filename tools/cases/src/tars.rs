// SPDX-License-Identifier: GPL-2.0

//! Finding the content of files in a tar, whatever that holds: errors are fine, panics are bugs, and what is found is what was
//! looked for.

use ovbd_image::tar::BLOCK_BYTES;
use ovbd_layers::tar::pieces::{Scanner, PIECE_SECTORS};

use crate::random::Random;

/// Bytes of a block that is looked for.
const PIECE_BYTES: usize = PIECE_SECTORS as usize * BLOCK_BYTES;

/// Looks for every block of 4 KiB of `tar` among the content of its files.
pub fn check(tar: &[u8]) {
    let mut whole = Scanner::default();
    whole.feed(tar);
    let mut parts = Scanner::default();
    for part in tar.chunks(3 * BLOCK_BYTES) {
        parts.feed(part);
    }
    assert_eq!(whole.extent(), parts.extent());
    assert_eq!(whole.is_cut(), parts.is_cut());
    assert_eq!(whole.looks_right(), parts.looks_right());
    let pieces = parts.finish();
    // What a block at each sector would be, and of how many sectors: the last of a file has fewer.
    let mut block = [0; PIECE_BYTES];
    for from in (0..tar.len()).step_by(BLOCK_BYTES) {
        for sectors in 1..=PIECE_SECTORS as usize {
            let Some(data) = tar.get(from..from + sectors * BLOCK_BYTES) else {
                break;
            };
            block.fill(0);
            block[..data.len()].copy_from_slice(data);
            let wanted = (from / BLOCK_BYTES) as u64;
            let Some(place) = pieces.find(pieces.seed().hash(&block), wanted) else {
                continue;
            };
            let start = place.start as usize * BLOCK_BYTES;
            let end = start + place.sectors as usize * BLOCK_BYTES;
            let found = tar.get(start..end).expect("it is in the tar");
            assert!(place.sectors <= PIECE_SECTORS);
            assert!(block.starts_with(found), "other bytes at {start}");
            assert!(block[found.len()..].iter().all(|byte| *byte == 0));
        }
    }
}

/// A tar of a few files, with `damage` in its headers.
pub fn damaged(number: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    let mut tar = Vec::new();
    let mut headers = Vec::new();
    for member in 0..1 + random.below(6) {
        let bytes = random.below(12_000);
        let kind = *random.choose(b"00007xgLKS12");
        headers.push(tar.len());
        tar.extend_from_slice(&header(kind, bytes as u64));
        match kind {
            b'x' => {
                let record = format!("13 size={:04}\n", random.below(9000));
                tar.extend_from_slice(record.as_bytes());
            }
            _ => tar.extend((0..bytes).map(|n| (n / 9) as u8 ^ member as u8)),
        }
        tar.resize(tar.len().next_multiple_of(BLOCK_BYTES), 0);
    }
    tar.extend_from_slice(&[0; 2 * BLOCK_BYTES]);
    for _ in 0..random.below(4) {
        let at = *random.choose(&headers);
        let field = *random.choose(&[124, 156, 482, 100, 0]);
        tar[at + field + random.below(12)] = *random.choose(b"\x00\xff\x8007x9");
        if random.below(2) == 0 {
            set_checksum(&mut tar[at..at + BLOCK_BYTES]);
        }
    }
    let cut = random.below(3) * random.below(2000);
    tar.truncate(tar.len() - cut.min(tar.len() / 2));
    tar
}

fn header(kind: u8, bytes: u64) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    block[0] = b'a';
    block[124..135].copy_from_slice(format!("{bytes:011o}").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    set_checksum(&mut block);
    block
}

fn set_checksum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}
