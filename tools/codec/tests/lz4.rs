// SPDX-License-Identifier: GPL-2.0

//! Both LZ4 decoders against blocks written by hand, and against what liblz4 compresses.
//!
//! The long comparison with other decoders, on damaged blocks and between guard pages, is `ovbd-fuzz-lz4`.

use lz4::block::{compress, decompress_to_buffer, CompressionMode};
use ovbd_codec::lz4::{decompress, decompress_portable, Malformed, INPUT_SLACK};
use proptest::prelude::*;

/// Decodes `block` to `len` bytes with both decoders and with any number of bytes behind it.
fn decode(block: &[u8], len: usize) -> Result<Vec<u8>, Malformed> {
    let mut expected = vec![0xaa; len];
    let result = decompress_portable(block, &mut expected).map(|()| expected);
    for slack in 0..=INPUT_SLACK + 2 {
        let mut input = block.to_vec();
        input.resize(block.len() + slack, 0xef);
        let mut output = vec![0x55; len];
        let other = decompress(&input, block.len(), &mut output).map(|()| output);
        assert_eq!(result, other, "with {slack} bytes behind the block");
    }
    result
}

/// A sequence: its literals, then how far back and how long the match is.
type Sequence<'a> = (&'a [u8], usize, usize);

/// A block of `sequences` and the literals of the last.
fn block(sequences: &[Sequence], last: &[u8]) -> Vec<u8> {
    let mut block = Vec::new();
    let mut put = |literals: &[u8], found: Option<(usize, usize)>| {
        let code = found.map_or(0, |(_, len)| len - 4);
        let half = |n: usize| n.min(15) as u8;
        block.push((half(literals.len()) << 4) | half(code));
        put_rest(&mut block, literals.len());
        block.extend_from_slice(literals);
        if let Some((offset, _)) = found {
            block.extend_from_slice(&(offset as u16).to_le_bytes());
            put_rest(&mut block, code);
        }
    };
    for (literals, offset, len) in sequences {
        put(literals, Some((*offset, *len)));
    }
    put(last, None);
    block
}

fn put_rest(block: &mut Vec<u8>, n: usize) {
    if let Some(mut rest) = n.checked_sub(15) {
        while rest >= 255 {
            block.push(255);
            rest -= 255;
        }
        block.push(rest as u8);
    }
}

/// What `sequences` and `last` stand for.
fn plain(sequences: &[Sequence], last: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (literals, offset, len) in sequences {
        out.extend_from_slice(literals);
        for _ in 0..*len {
            out.push(out[out.len() - offset]);
        }
    }
    out.extend_from_slice(last);
    out
}

fn numbered(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

/// Checks that `sequences` and `last` are decoded to what they stand for, and to no other length.
fn valid(sequences: &[Sequence], last: &[u8]) {
    let (block, expected) = (block(sequences, last), plain(sequences, last));
    assert_eq!(decode(&block, expected.len()), Ok(expected.clone()));
    assert_eq!(decode(&block, expected.len() + 1), Err(Malformed));
    if let Some(less) = expected.len().checked_sub(1) {
        assert_eq!(decode(&block, less), Err(Malformed));
    }
    for len in 0..block.len() {
        assert_eq!(decode(&block[..len], expected.len()), Err(Malformed));
    }
}

#[test]
fn literals_alone() {
    for len in (0..40).chain([269, 270, 271, 524, 525, 526, 4096, 65536]) {
        let literals = numbered(len);
        assert_eq!(decode(&block(&[], &literals), len), Ok(literals));
    }
}

#[test]
fn every_offset_and_length_of_a_match() {
    for offset in (1..40).chain([255, 256, 257]) {
        for len in (4..40).chain([273, 274, 275, 528, 529, 530]) {
            let first = numbered(offset);
            valid(&[(&first, offset, len)], b"the end comes here");
            // As the second sequence, with and without literals.
            for literals in [0, 1, 13, 14, 15, 16, 33] {
                let literals = numbered(literals);
                let room = [7; 600];
                let sequences: &[Sequence] = &[(&room, 1, 4), (&literals, offset, len)];
                let (block, expected) = (block(sequences, &room), plain(sequences, &room));
                assert_eq!(decode(&block, expected.len()), Ok(expected));
            }
        }
    }
}

#[test]
fn short_matches_up_to_the_end() {
    // All ways to get near the end, where there is no room for whole words.
    for before in 0..34 {
        for literals in 0..20 {
            for len in 4..20 {
                for last in 5..10 {
                    if len + last < 12 {
                        continue;
                    }
                    let (first, second) = (numbered(20 + before), numbered(literals));
                    let sequences: &[Sequence] = &[(&first, 9, 5), (&second, 17, len)];
                    let tail = &numbered(200)[200 - last..];
                    let (block, expected) = (block(sequences, tail), plain(sequences, tail));
                    let mut output = vec![0; expected.len()];
                    assert_eq!(decompress(&block, block.len(), &mut output), Ok(()));
                    assert_eq!(output, expected);
                }
            }
        }
    }
}

#[test]
fn offsets_that_lead_nowhere() {
    let first = numbered(40);
    for offset in [0, 41, 42, 1000, 65535] {
        let block = block(&[(&first, offset, 8)], b"the end comes here");
        assert_eq!(decode(&block, 40 + 8 + 18), Err(Malformed));
    }
    // In the first bytes of the output.
    for literals in 0..12 {
        let first = numbered(literals);
        let block = block(&[(&first, literals + 1, 40)], &numbered(60));
        assert_eq!(decode(&block, literals + 40 + 60), Err(Malformed));
    }
}

#[test]
fn the_end_of_a_block() {
    let first = numbered(20);
    for (len, last, result) in [
        (7, 5, true),
        (8, 4, false),
        (6, 5, false),
        (100, 5, true),
        (100, 4, false),
        (100, 0, false),
    ] {
        let sequences: &[Sequence] = &[(&first, 20, len)];
        let last = numbered(last);
        let (block, expected) = (block(sequences, &last), plain(sequences, &last));
        assert_eq!(decode(&block, expected.len()).is_ok(), result);
        let mut reference = vec![0; expected.len()];
        let len = Some(expected.len() as i32);
        assert_eq!(
            decompress_to_buffer(&block, len, &mut reference).is_ok(),
            result
        );
    }
}

#[test]
fn nothing() {
    assert_eq!(decode(&[0], 0), Ok(vec![]));
    assert_eq!(decode(&[], 0), Err(Malformed));
    assert_eq!(decode(&[], 1), Err(Malformed));
    assert_eq!(decode(&[0, 0], 0), Err(Malformed));
    assert_eq!(decode(&[1], 0), Err(Malformed));
    assert_eq!(decompress(&[0; 4], 5, &mut [0; 8]), Err(Malformed));
}

#[test]
fn lengths_without_end() {
    for token in [0xf0, 0xff, 0x0f, 0x1f] {
        let mut block = vec![255; 70_000];
        block[0] = token;
        for len in [0, 20, 4096] {
            assert_eq!(
                decompress_portable(&block, &mut vec![0; len]),
                Err(Malformed)
            );
            assert_eq!(
                decompress(&block, 60_000, &mut vec![0; len]),
                Err(Malformed)
            );
        }
    }
}

/// Bytes that compress: runs, words from a small set, and noise.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        (any::<u8>(), 1..200_usize).prop_map(|(byte, len)| vec![byte; len]),
        prop::collection::vec(0..4_u8, 1..40),
        (1..9_usize, 1..40_usize)
            .prop_map(|(period, len)| { numbered(period).into_iter().cycle().take(len).collect() }),
        prop::collection::vec(any::<u8>(), 1..60),
    ];
    prop::collection::vec(piece, 1..120).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn what_liblz4_compresses(content in content(), level in 0..10_i32, slack in 0..40_usize) {
        let mode = match level {
            0 => CompressionMode::DEFAULT,
            1 => CompressionMode::FAST(9),
            level => CompressionMode::HIGHCOMPRESSION(level),
        };
        let block = compress(&content, Some(mode), false).expect("there is room");
        let mut output = vec![0; content.len()];
        prop_assert_eq!(decompress_portable(&block, &mut output), Ok(()));
        prop_assert!(output == content);
        let mut input = block.clone();
        input.resize(block.len() + slack, 0xff);
        let mut output = vec![0; content.len()];
        prop_assert_eq!(decompress(&input, block.len(), &mut output), Ok(()));
        prop_assert!(output == content);
    }
}
