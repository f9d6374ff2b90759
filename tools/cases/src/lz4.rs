// SPDX-License-Identifier: GPL-2.0

//! LZ4 blocks, sound and damaged, through our decoders and those of others, which must agree.
//!
//! Input and output lie next to pages that cannot be accessed, on either side, so that an access outside ends the
//! program.

use lz4::block::{compress, decompress_to_buffer, CompressionMode};
use mmap_rs::{MmapMut, MmapNone, MmapOptions};
use ovbd_codec::lz4::{decompress, decompress_portable};

use crate::random::Random;

/// Bytes that a block stands for at most.
pub const MAX_OUTPUT: usize = 65536;

/// Bytes that a block has at most.
const MAX_BLOCK: usize = 2 * MAX_OUTPUT;

/// Bytes that are readable behind a block at most.
const MAX_SLACK: usize = 64;

/// Bytes next to the output that must not change.
const CANARY: [u8; 32] = [0xc3; 32];

/// Memory between two pages that cannot be accessed.
struct Guarded {
    bytes: MmapMut,
    _guards: [MmapNone; 2],
}

impl Guarded {
    fn new(len: usize) -> Result<Self, mmap_rs::Error> {
        let page = MmapOptions::page_size();
        let len = len.next_multiple_of(page);
        let mut before = MmapOptions::new(len + 2 * page)?.map_mut()?;
        let mut bytes = before.split_off(page)?;
        let after = bytes.split_off(len)?;
        let guard = |map: MmapMut| map.make_none().map_err(|(_, e)| e);
        Ok(Self {
            bytes,
            _guards: [guard(before)?, guard(after)?],
        })
    }

    /// `len` bytes at the end, or at the beginning.
    fn part(&mut self, len: usize, at_end: bool) -> &mut [u8] {
        let start = if at_end { self.bytes.len() - len } else { 0 };
        &mut self.bytes[start..start + len]
    }
}

/// A block, and how it is to be decoded.
#[derive(Clone, Debug)]
pub struct Input {
    /// The block.
    pub block: Vec<u8>,
    /// Bytes that it shall stand for.
    pub output_len: usize,
    /// Bytes that can be read behind it, and what they are.
    pub slack: (usize, u8),
    /// Whether input and output end, not begin, at a page that cannot be accessed.
    pub at_end: (bool, bool),
}

impl Input {
    /// What a fuzzer's bytes mean: five for the rest, then the block.
    pub fn from_bytes(data: &[u8]) -> Option<Self> {
        let (&[low, high, slack, fill, flags], block) = data.split_first_chunk()?;
        if block.len() > MAX_BLOCK {
            return None;
        }
        Some(Self {
            block: block.to_vec(),
            output_len: u16::from_le_bytes([low, high]).into(),
            slack: (usize::from(slack) % MAX_SLACK, fill),
            at_end: (flags & 1 != 0, flags & 2 != 0),
        })
    }

    /// Bytes of which [`Input::from_bytes`] makes this.
    pub fn to_bytes(&self) -> Vec<u8> {
        let [low, high] = (self.output_len.min(0xffff) as u16).to_le_bytes();
        let flags = u8::from(self.at_end.0) | (u8::from(self.at_end.1) << 1);
        let mut bytes = vec![low, high, self.slack.0 as u8, self.slack.1, flags];
        bytes.extend_from_slice(&self.block);
        bytes
    }
}

/// What several inputs were.
#[derive(Default)]
pub struct Counts {
    /// Valid blocks.
    pub accepted: u64,
    /// Others.
    pub refused: u64,
    /// Those that only liblz4 accepts, though they break the rules.
    pub lax: u64,
}

/// Memory for any number of inputs.
pub struct Checker {
    input: Guarded,
    output: Guarded,
    expected: Vec<u8>,
    other: Vec<u8>,
    /// What the inputs were.
    pub counts: Counts,
}

impl Checker {
    /// Allocates the memory.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> Result<Self, mmap_rs::Error> {
        Ok(Self {
            input: Guarded::new(MAX_BLOCK + MAX_SLACK)?,
            output: Guarded::new(MAX_OUTPUT + CANARY.len())?,
            expected: vec![0; MAX_OUTPUT],
            other: vec![0; MAX_OUTPUT],
            counts: Counts::default(),
        })
    }

    /// Decodes `input` with all decoders.
    ///
    /// # Errors
    ///
    /// How they differ, or that something outside was written to.
    pub fn check(&mut self, input: &Input) -> Result<(), String> {
        let block = input.block.as_slice();
        let len = input.output_len;
        let expected = &mut self.expected[..len];
        let reference = decompress_to_buffer(block, Some(len as i32), expected);
        let reference = matches!(reference, Ok(count) if count == len);

        let (slack, fill) = input.slack;
        let readable = self.input.part(block.len() + slack, input.at_end.0);
        readable[..block.len()].copy_from_slice(block);
        readable[block.len()..].fill(fill);
        let room = self.output.part(len + CANARY.len(), input.at_end.1);
        let (output, canary) = if input.at_end.1 {
            let (canary, output) = room.split_at_mut(CANARY.len());
            (output, canary)
        } else {
            room.split_at_mut(len)
        };
        output.fill(0xaa);
        canary.copy_from_slice(&CANARY);
        let accepted = decompress(readable, block.len(), output).is_ok();
        if canary != CANARY {
            return Err("something outside the output was written to".into());
        }
        if readable[..block.len()] != *block {
            return Err("the block has changed".into());
        }
        match (accepted, reference) {
            (true, false) => return Err("liblz4 refuses this block".into()),
            (false, true) if !breaks_rules(block, len) => {
                return Err("only liblz4 accepts this block".into())
            }
            (false, true) => self.counts.lax += 1,
            (false, false) => self.counts.refused += 1,
            (true, true) => self.counts.accepted += 1,
        }
        if accepted && *output != *expected {
            return Err("liblz4 has another output".into());
        }
        let other = &mut self.other[..len];
        if decompress_portable(block, other).is_ok() != accepted {
            return Err("only one of our decoders accepts this block".into());
        }
        if accepted && *other != *expected {
            return Err("the portable decoder has another output".into());
        }
        if accepted {
            other.fill(0x55);
            match lz4_flex::block::decompress_into(block, other) {
                Ok(count) if count == len && *other == *expected => {}
                _ => return Err("lz4_flex has another output".into()),
            }
        }
        Ok(())
    }

    /// Decodes the block of `input` in all four places and with every slack.
    ///
    /// # Errors
    ///
    /// As [`Checker::check`].
    pub fn check_everywhere(&mut self, input: &Input) -> Result<(), String> {
        let mut input = input.clone();
        for slack in 0..MAX_SLACK {
            for place in 0..4 {
                input.slack.0 = slack;
                input.at_end = (place & 1 != 0, place & 2 != 0);
                self.check(&input)?;
            }
        }
        Ok(())
    }
}

/// A sequence of a block.
#[derive(Clone, Debug, Default)]
struct Sequence {
    literals: Vec<u8>,
    offset: usize,
    /// Length of the match less 4. The last sequence has only that half of the token.
    code: usize,
}

/// Takes the sequences of `block` apart. Damage ends the last.
fn parse(block: &[u8]) -> Vec<Sequence> {
    let mut sequences = Vec::new();
    let mut rest = block;
    while let Some((&token, after)) = rest.split_first() {
        rest = after;
        let literals = parse_length(&mut rest, token >> 4).min(rest.len());
        let (literals, after) = rest.split_at(literals);
        let mut sequence = Sequence {
            literals: literals.to_vec(),
            offset: 0,
            code: usize::from(token & 15),
        };
        rest = after;
        if let Some((offset, after)) = rest.split_first_chunk() {
            rest = after;
            sequence.offset = u16::from_le_bytes(*offset).into();
            sequence.code = parse_length(&mut rest, token & 15);
        }
        sequences.push(sequence);
    }
    sequences
}

fn parse_length(rest: &mut &[u8], half: u8) -> usize {
    let mut length = usize::from(half);
    if half == 15 {
        while let Some((&more, after)) = rest.split_first() {
            *rest = after;
            length += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    length
}

/// Puts a block together.
fn encode(sequences: &[Sequence]) -> Vec<u8> {
    let mut block = Vec::new();
    for (n, sequence) in sequences.iter().enumerate() {
        let literals = sequence.literals.len();
        block.push(((literals.min(15) << 4) | sequence.code.min(15)) as u8);
        encode_length(&mut block, literals);
        block.extend_from_slice(&sequence.literals);
        if n + 1 < sequences.len() {
            block.extend_from_slice(&(sequence.offset as u16).to_le_bytes());
            encode_length(&mut block, sequence.code);
        }
    }
    block
}

fn encode_length(block: &mut Vec<u8>, length: usize) {
    if let Some(rest) = length.checked_sub(15) {
        block.extend(std::iter::repeat_n(255, rest / 255));
        block.push((rest % 255) as u8);
    }
}

/// Bytes that sequences stand for, at most what there is room for.
fn decoded_len(sequences: &[Sequence]) -> usize {
    let literals = sequences.iter().map(|s| s.literals.len()).sum::<usize>();
    let matches = sequences.iter().rev().skip(1).map(|s| s.code + 4);
    (literals + matches.sum::<usize>()).min(MAX_OUTPUT)
}

/// Whether `block` breaks a rule that liblz4 does not enforce everywhere: there is no offset of 0, no match ends in the
/// last 5 bytes of the output, and none begins in the last 12.
fn breaks_rules(block: &[u8], output_len: usize) -> bool {
    let sequences = parse(block);
    let mut at = 0;
    sequences.iter().rev().skip(1).rev().any(|sequence| {
        let begin = at + sequence.literals.len();
        at = begin + sequence.code + 4;
        sequence.offset == 0 || begin + 12 > output_len || at + 5 > output_len
    })
}

/// A number of literals, or the length of a match less 4, of which those next to a limit are the more frequent ones.
fn length(random: &mut Random) -> usize {
    match random.below(32) {
        0 => 12 + random.below(7),
        1 => 268 + random.below(4),
        2 => 14,
        3 => 15 + random.below(256),
        4 => 24 + random.below(20),
        5 if random.below(16) == 0 => 255 * random.below(40) + 14 + random.below(4),
        6..=9 => 15,
        10..=13 => 0,
        _ => random.below(17),
    }
}

/// An offset, sound more often than not, where `len` bytes of output are there.
fn offset(len: usize, random: &mut Random) -> usize {
    match random.below(16) {
        0..=3 => 1 + random.below(10),
        4 => 8,
        5 | 6 => len,
        7 if random.below(8) == 0 => len + random.below(3),
        8 if random.below(64) == 0 => 0,
        _ => 1 + random.below(len),
    }
    .min(0xffff)
}

fn bytes(len: usize, random: &mut Random) -> Vec<u8> {
    let word = random.bits().to_le_bytes();
    // Bytes that would be tokens or lengths, if they were taken for it.
    match random.below(4) {
        0 => vec![*random.choose(&[0x00, 0xef, 0xf0, 0xff]); len],
        _ => word.iter().copied().cycle().take(len).collect(),
    }
}

/// Sequences of a block that is about sound.
fn sequences(random: &mut Random) -> Vec<Sequence> {
    let count = match random.below(64) {
        0 => random.below(400),
        1..=7 => random.below(60),
        _ => random.below(10),
    };
    let mut len = 0;
    let mut sequences = Vec::new();
    for _ in 0..count {
        let literals = match (len, length(random)) {
            (0, 0) => 1,
            (_, literals) => literals,
        };
        len += literals;
        let sequence = Sequence {
            literals: bytes(literals, random),
            offset: offset(len, random),
            code: length(random),
        };
        len += sequence.code + 4;
        sequences.push(sequence);
        if len > MAX_OUTPUT / 2 {
            break;
        }
    }
    let last = match random.below(4) {
        0 => length(random),
        _ => 5 + random.below(16),
    };
    // Room for the last match.
    let last = match sequences.last() {
        Some(s) if s.code + 4 + last < 12 && random.below(8) != 0 => last + 8,
        _ => last,
    };
    sequences.push(Sequence {
        literals: bytes(last, random),
        ..Sequence::default()
    });
    sequences
}

/// Changes one thing about `sequences`.
fn damage_sequences(sequences: &mut Vec<Sequence>, random: &mut Random) {
    let number = random.below(sequences.len());
    let before = decoded_len(&sequences[..=number.min(sequences.len() - 1)]);
    let other = random.choose(sequences).clone();
    let sequence = &mut sequences[number];
    match random.below(8) {
        0 | 1 => sequence.literals = bytes(length(random), random),
        2 | 3 => sequence.code = length(random),
        4 | 5 => sequence.offset = offset(before, random),
        6 => sequences.insert(number, other),
        _ if sequences.len() > 1 => drop(sequences.remove(number)),
        _ => {}
    }
}

/// Changes one thing about the bytes of `block`.
fn damage_bytes(block: &mut Vec<u8>, random: &mut Random) {
    if block.is_empty() {
        return;
    }
    let at = random.below(block.len());
    match random.below(6) {
        0 => block[at] ^= 1 << random.below(8),
        1 => block[at] = random.bits() as u8,
        2 => block[at] = *random.choose(&[0, 15, 0xf0, 255]),
        3 => block.truncate(at.max(block.len().saturating_sub(20))),
        4 => {
            let count = 1 + random.below(20);
            block.splice(at..at, bytes(count, random));
        }
        _ => drop(block.drain(at..(at + 1 + random.below(4)).min(block.len()))),
    }
}

/// Damages the block of `input` once: its structure, or its bytes.
pub fn damage(input: &mut Input, random: &mut Random) {
    if random.below(3) == 0 {
        damage_bytes(&mut input.block, random);
    } else {
        let mut sequences = parse(&input.block);
        if sequences.is_empty() {
            sequences = self::sequences(random);
        }
        damage_sequences(&mut sequences, random);
        input.block = encode(&sequences);
        // The right length for it, or the one of before.
        if random.below(4) != 0 {
            input.output_len = decoded_len(&sequences);
        }
    }
    input.block.truncate(MAX_BLOCK);
    if random.below(16) == 0 {
        input.output_len = (input.output_len + random.below(3)).clamp(1, MAX_OUTPUT) - 1;
    }
}

/// Input `number` of an endless series: sound, about sound, or damaged.
pub fn generate(number: u64) -> Input {
    let random = &mut Random::new(number);
    let (block, output_len) = if random.below(8) == 0 {
        let len = match random.below(32) {
            0 => random.below(MAX_OUTPUT),
            1 | 2 => 4096,
            _ => random.below(300),
        };
        let mut content = Vec::new();
        while content.len() < len {
            let count = length(random);
            let from = random.below(content.len());
            let end = (from + count).min(content.len());
            if random.below(2) == 0 {
                content.extend_from_within(from..end);
            }
            let count = random.below(9);
            content.extend(bytes(count, random));
        }
        content.truncate(len);
        let mode = *random.choose(&[CompressionMode::DEFAULT, CompressionMode::FAST(20)]);
        let block = compress(&content, Some(mode), false).expect("there is room");
        (block, len)
    } else {
        let sequences = sequences(random);
        (encode(&sequences), decoded_len(&sequences))
    };
    let mut input = Input {
        block,
        output_len,
        slack: (
            match random.below(3) {
                0 => 0,
                _ => random.below(MAX_SLACK),
            },
            *random.choose(&[0x00, 0x10, 0xef, 0xf0, 0xff]),
        ),
        at_end: (random.below(4) != 0, random.below(4) != 0),
    };
    if random.below(2) == 0 {
        for _ in 0..=random.below(3) {
            damage(&mut input, random);
        }
    }
    input
}

/// An input for libFuzzer's mutator: `bytes` damaged, or where they are none, one of [`generate`]'s.
pub fn mutate_input(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let Some(mut input) = Input::from_bytes(bytes) else {
        return generate(random.bits()).to_bytes();
    };
    damage(&mut input, random);
    if random.below(4) == 0 {
        input.slack.0 = random.below(MAX_SLACK);
    }
    input.to_bytes()
}
