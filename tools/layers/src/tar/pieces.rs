// SPDX-License-Identifier: GPL-2.0

//! The content of the files of a tar, piece by piece, and where a block of a file system is among it.
//!
//! File systems store files in blocks of 4 KiB from their first byte on, the last filled up with zeros. So the content of
//! each file is hashed in pieces of 4 KiB, and a block that has the hash of a piece is that piece. The hash is of 64 bits
//! with a seed that nobody knows; whoever uses what is found here compares the bytes in the end
//! ([`super::verbatim`]).

use std::hash::{BuildHasher, RandomState};

use ovbd_image::{lsmt::SECTOR_BYTES, tar::BLOCK_BYTES};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::members::{Follows, Members, Odd};
use crate::zeros::{is_zero, GRANULE_BYTES};

/// Sectors of a whole piece.
pub const PIECE_SECTORS: u64 = GRANULE_BYTES as u64 / SECTOR_BYTES;

const _: () = assert!(BLOCK_BYTES as u64 == SECTOR_BYTES);

/// A piece: its hash, and sector of the tar times [`PIECE_SECTORS`] plus its sectors less one. Ordered by that.
type Piece = (u64, u64);

/// Part of the content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First sector of the tar.
    pub start: u64,
    /// Sectors, [`PIECE_SECTORS`] at most.
    pub sectors: u64,
}

/// Hashes blocks as the pieces were hashed.
#[derive(Clone, Copy, Debug)]
pub struct Seed(u64);

impl Seed {
    /// The hash of a block of 4 KiB.
    pub fn hash(self, block: &[u8]) -> u64 {
        xxh3_64_with_seed(block, self.0)
    }
}

/// Collects the pieces of a tar that streams by.
#[derive(Debug)]
pub struct Scanner {
    seed: Seed,
    members: Members,
    /// Sector of the tar that comes next.
    at: u64,
    /// Sectors of content to come, and whether they are of a file.
    content: u64,
    of_file: bool,
    /// The piece that is not complete yet.
    open: Vec<u8>,
    pieces: Vec<Piece>,
    /// Whether the first block is a header, or zeros as in a tar of nothing.
    looks_right: bool,
    extent: Extent,
}

/// How much a tar holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Members, and headers that belong to them.
    pub headers: u64,
    /// Blocks of 4 KiB of the content of files.
    pub blocks: u64,
    /// The latest time at which a member was changed, in seconds since 1970.
    pub newest: u64,
}

impl Default for Scanner {
    fn default() -> Self {
        Self {
            // The standard library has a source of what nobody can know.
            seed: Seed(RandomState::new().hash_one(0)),
            members: Members::default(),
            at: 0,
            content: 0,
            of_file: false,
            open: Vec::new(),
            pieces: Vec::new(),
            looks_right: true,
            extent: Extent::default(),
        }
    }
}

impl Scanner {
    /// Takes what follows of the tar. Only the last part may be no whole blocks.
    pub fn feed(&mut self, mut data: &[u8]) {
        while let Some(block) = data.first_chunk::<BLOCK_BYTES>() {
            if self.content == 0 {
                self.header(block);
                data = &data[BLOCK_BYTES..];
                continue;
            }
            let whole = (data.len() / BLOCK_BYTES) as u64;
            let now = match self.of_file {
                true => PIECE_SECTORS - self.open_sectors(),
                false => whole,
            };
            let now = now.min(self.content).min(whole);
            let (part, rest) = data.split_at((now * SECTOR_BYTES) as usize);
            self.content -= now;
            self.at += now;
            if self.of_file {
                self.piece(part);
            }
            data = rest;
        }
    }

    fn header(&mut self, block: &[u8; BLOCK_BYTES]) {
        let follows = self.members.next(block);
        if self.at == 0 && follows == Follows::Block {
            self.looks_right =
                is_zero(block) || ovbd_image::tar::MemberHeader::parse(block).is_some();
        }
        self.at += 1;
        self.extent.headers += u64::from(!is_zero(block));
        if let Follows::File(blocks) = follows {
            let blocks = blocks.div_ceil(PIECE_SECTORS);
            self.extent.blocks = self.extent.blocks.saturating_add(blocks);
        }
        (self.content, self.of_file) = match follows {
            Follows::Block => (0, false),
            Follows::File(blocks) => (blocks, true),
            Follows::Other(blocks) => (blocks, false),
        };
    }

    fn open_sectors(&self) -> u64 {
        self.open.len() as u64 / SECTOR_BYTES
    }

    /// Takes a piece, or part of one.
    fn piece(&mut self, part: &[u8]) {
        if part.len() == GRANULE_BYTES {
            self.add(part, PIECE_SECTORS);
            return;
        }
        let mut open = std::mem::take(&mut self.open);
        open.extend_from_slice(part);
        if open.len() < GRANULE_BYTES && self.content > 0 {
            self.open = open;
            return;
        }
        let sectors = open.len() as u64 / SECTOR_BYTES;
        open.resize(GRANULE_BYTES, 0);
        self.add(&open, sectors);
        open.clear();
        self.open = open;
    }

    /// Adds a piece that ends here.
    fn add(&mut self, piece: &[u8], sectors: u64) {
        if !is_zero(piece) {
            let start = self.at - sectors;
            let place = start * PIECE_SECTORS + sectors - 1;
            self.pieces.push((self.seed.hash(piece), place));
        }
    }

    /// Whether this is a tar, as far as its first block shows.
    pub fn looks_right(&self) -> bool {
        self.looks_right
    }

    /// How much the tar holds.
    pub fn extent(&self) -> Extent {
        Extent {
            newest: self.members.newest(),
            ..self.extent
        }
    }

    /// The first member that not every tool makes a file of.
    pub fn odd(&self) -> Option<Odd> {
        self.members.odd()
    }

    /// Whether the tar ends inside a member. Where one ends, or the blocks of zeros after the last are missing, it is whole
    /// enough.
    pub fn is_cut(&self) -> bool {
        self.content > 0 || self.members.wants_more()
    }

    /// All pieces of the tar.
    pub fn finish(mut self) -> Pieces {
        self.pieces.sort_unstable();
        self.pieces.shrink_to_fit();
        Pieces {
            seed: self.seed,
            pieces: self.pieces,
        }
    }
}

/// The pieces of a tar.
#[derive(Debug)]
pub struct Pieces {
    seed: Seed,
    /// Sorted.
    pieces: Vec<Piece>,
}

impl Pieces {
    /// How blocks are hashed.
    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// The piece with this hash: the one at sector `wanted` if that is one, else the first of the tar.
    pub fn find(&self, hash: u64, wanted: u64) -> Option<Place> {
        let from = |start: u64| {
            let least = (hash, start.saturating_mul(PIECE_SECTORS));
            let at = self.pieces.partition_point(|piece| *piece < least);
            let (found, place) = *self.pieces.get(at)?;
            let (start, sectors) = (place / PIECE_SECTORS, place % PIECE_SECTORS + 1);
            (found == hash).then_some(Place { start, sectors })
        };
        let at_wanted = from(wanted).filter(|place| place.start == wanted);
        at_wanted.or_else(|| from(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header as GNU tar writes it, of a member of `kind`.
    fn header(kind: u8, bytes: u64) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        block[..4].copy_from_slice(b"name");
        block[124..135].copy_from_slice(format!("{bytes:011o}").as_bytes());
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar  \0");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }

    fn content(seed: u8, bytes: usize) -> Vec<u8> {
        (0..bytes).map(|n| (n / 7) as u8 ^ seed).collect()
    }

    fn member(tar: &mut Vec<u8>, kind: u8, bytes: &[u8]) -> u64 {
        tar.extend_from_slice(&header(kind, bytes.len() as u64));
        let start = tar.len() as u64 / SECTOR_BYTES;
        tar.extend_from_slice(bytes);
        tar.resize(tar.len().next_multiple_of(BLOCK_BYTES), 0);
        start
    }

    fn scan(tar: &[u8], step: usize) -> Pieces {
        let mut scanner = Scanner::default();
        tar.chunks(step).for_each(|part| scanner.feed(part));
        assert!(scanner.looks_right());
        scanner.finish()
    }

    fn block(bytes: &[u8]) -> Vec<u8> {
        let mut block = bytes.to_vec();
        block.resize(GRANULE_BYTES, 0);
        block
    }

    #[test]
    fn whole_pieces_last_ones_and_runs() {
        let (a, b) = (content(1, 10_000), content(2, 700));
        let mut tar = Vec::new();
        let first = member(&mut tar, b'0', &a);
        let second = member(&mut tar, 0, &b);
        // The same once more, where a run is wanted.
        let third = member(&mut tar, b'0', &a);
        // A link with a size has no content; what is no file is not looked for.
        tar.extend_from_slice(&header(b'1', 5000));
        member(&mut tar, b'L', &content(3, 5000));
        let last = member(&mut tar, b'7', &content(4, 100));
        tar.extend_from_slice(&[0; 1024]);
        for step in [512, 1024, 4608, 1 << 20] {
            let pieces = scan(&tar, step);
            let find =
                |bytes: &[u8], wanted| pieces.find(pieces.seed().hash(&block(bytes)), wanted);
            let place = |start, sectors| Some(Place { start, sectors });
            assert_eq!(find(&a[..4096], 0), place(first, 8));
            assert_eq!(find(&a[..4096], third), place(third, 8));
            assert_eq!(find(&a[4096..8192], third + 8), place(third + 8, 8));
            assert_eq!(find(&a[8192..], first + 16), place(first + 16, 4));
            assert_eq!(find(&b, 77), place(second, 2));
            assert_eq!(find(&content(4, 100), 0), place(last, 1));
            assert_eq!(find(&content(3, 5000)[..4096], 0), None);
        }
    }

    #[test]
    fn extended_sizes_sparse_headers_and_nonsense() {
        let mut tar = Vec::new();
        // The size of the next member is in the extended header alone.
        member(&mut tar, b'x', b"18 path=some/name\n13 size=5000\n");
        tar.extend_from_slice(&header(b'0', 0));
        let first = tar.len() as u64 / SECTOR_BYTES;
        tar.extend_from_slice(&block(&content(1, 4096)));
        tar.extend_from_slice(&block(&content(2, 904))[..1024]);
        // A sparse file with two headers more.
        let mut sparse = header(b'S', 600);
        sparse[482] = 1;
        let sum: u32 = sparse.iter().map(|byte| u32::from(*byte)).sum::<u32>()
            - sparse[148..156]
                .iter()
                .map(|byte| u32::from(*byte))
                .sum::<u32>()
            + 8 * u32::from(b' ');
        sparse[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        tar.extend_from_slice(&sparse);
        let mut more = [7; BLOCK_BYTES];
        more[504] = 1;
        tar.extend_from_slice(&more);
        more[504] = 0;
        tar.extend_from_slice(&more);
        let second = tar.len() as u64 / SECTOR_BYTES;
        tar.extend_from_slice(&block(&content(3, 600))[..1024]);
        // What is no header is passed over, and a size beyond all is no harm.
        tar.extend_from_slice(&[0xff; 3 * BLOCK_BYTES]);
        let third = member(&mut tar, b'0', &content(4, 50));
        tar.extend_from_slice(&header(b'0', (1 << 33) - 1));
        tar.extend_from_slice(&[1; 100]);
        assert!({
            let mut scanner = Scanner::default();
            scanner.feed(&tar);
            scanner.is_cut()
        });
        let pieces = scan(&tar, 1 << 20);
        let find = |bytes: &[u8]| pieces.find(pieces.seed().hash(&block(bytes)), 0);
        let place = |start, sectors| Some(Place { start, sectors });
        assert_eq!(find(&content(1, 4096)), place(first, 8));
        assert_eq!(find(&content(2, 904)), place(first + 8, 2));
        assert_eq!(find(&content(3, 600)), place(second, 2));
        assert_eq!(find(&content(4, 50)), place(third, 1));
        let mut scanner = Scanner::default();
        scanner.feed(&[1; 512]);
        assert!(!scanner.looks_right());
    }
}
