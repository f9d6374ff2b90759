// SPDX-License-Identifier: GPL-2.0

//! The hash tree of dm-verity as veritysetup makes it: format 1, SHA-256, blocks of 4 KiB, the superblock and then the tree
//! behind the data (Documentation/admin-guide/device-mapper/verity.rst, and veritysetup(8) for the superblock).

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// Bytes of a block of data and of the tree.
pub const BLOCK_BYTES: usize = 4096;

/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 32;

/// Digests in a block of the tree.
pub const DIGESTS: u64 = (BLOCK_BYTES / DIGEST_BYTES) as u64;

/// A SHA-256.
pub type Digest = [u8; DIGEST_BYTES];

/// Where superblock and tree of an image are, in blocks from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks of data; the superblock follows them.
    pub data_blocks: u64,
    /// First block and number of blocks of each level of the tree, the lowest first, which is the last in the image.
    pub levels: Vec<(u64, u64)>,
}

impl Geometry {
    /// That of an image of `bytes`, whose last block may be partial; `None` where there are more blocks than numbers, or
    /// none.
    pub fn new(bytes: u64) -> Option<Self> {
        let data_blocks = bytes.div_ceil(BLOCK_BYTES as u64);
        let mut sizes = Vec::new();
        let mut blocks = data_blocks;
        while blocks > 1 {
            blocks = blocks.div_ceil(DIGESTS);
            sizes.push(blocks);
        }
        // The highest level is the first behind the superblock.
        let mut at = data_blocks.checked_add(1)?;
        let mut levels = Vec::with_capacity(sizes.len());
        for size in sizes.into_iter().rev() {
            levels.push((at, size));
            at = at.checked_add(size)?;
        }
        levels.reverse();
        at.checked_mul(BLOCK_BYTES as u64)?;
        (data_blocks > 0).then_some(Self {
            data_blocks,
            levels,
        })
    }

    /// That of the image with which superblock and tree have `bytes`, if there is one.
    pub fn of_sealed(bytes: u64) -> Option<Self> {
        let block = BLOCK_BYTES as u64;
        let (mut least, mut most) = (block, bytes);
        while least < most {
            let middle = least + (most - least) / 2;
            match Self::new(middle) {
                Some(geometry) if geometry.bytes() < bytes => least = middle + 1,
                _ => most = middle,
            }
        }
        Self::new(least).filter(|geometry| geometry.bytes() == bytes)
    }

    /// Bytes of data: where the superblock is.
    pub fn data_bytes(&self) -> u64 {
        self.data_blocks * BLOCK_BYTES as u64
    }

    /// Bytes of data, superblock and tree.
    pub fn bytes(&self) -> u64 {
        let end = self.levels.first().map(|(at, size)| at + size);
        end.unwrap_or(self.data_blocks + 1) * BLOCK_BYTES as u64
    }
}

const MAGIC: &[u8; 8] = b"verity\0\0";

/// Where the superblock has the number of blocks of data.
const DATA_BLOCKS_AT: usize = 72;

/// The blocks of data that a superblock is for; `None` if it is none.
pub fn data_blocks(superblock: &[u8]) -> Option<u64> {
    if !superblock.starts_with(MAGIC) {
        return None;
    }
    let (blocks, _) = superblock.get(DATA_BLOCKS_AT..)?.split_first_chunk()?;
    Some(u64::from_le_bytes(*blocks))
}

/// How blocks are hashed: salt and UUID, both of the bottom layer, so that trees of images that share layers share blocks.
#[derive(Clone, Debug)]
pub struct Seal {
    salt: Digest,
    uuid: Uuid,
    salted: Sha256,
}

impl Seal {
    /// For images on a bottom layer of this UUID; nil where it has none.
    pub fn new(bottom: Uuid) -> Self {
        let mut hash = Sha256::new_with_prefix(b"salt of images on the layer ");
        hash.update(bottom.as_bytes());
        let salt: Digest = hash.finalize().into();
        let mut first = [0; 16];
        first.copy_from_slice(&salt[..16]);
        Self {
            salt,
            uuid: if bottom.is_nil() {
                Uuid::new_v8(first)
            } else {
                bottom
            },
            salted: Sha256::new_with_prefix(salt),
        }
    }

    /// The salt, which `veritysetup format --salt=` takes in hexadecimal digits.
    pub fn salt(&self) -> &Digest {
        &self.salt
    }

    /// The UUID of the tree.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The digest of a block.
    pub fn digest(&self, block: &[u8]) -> Digest {
        let mut hash = self.salted.clone();
        hash.update(block);
        hash.finalize().into()
    }

    /// The digests of many blocks, one after the other. The last may be partial: zeros follow it.
    pub fn digests(&self, data: &[u8]) -> Vec<u8> {
        let mut digests = Vec::with_capacity(data.len().div_ceil(BLOCK_BYTES) * DIGEST_BYTES);
        for block in data.chunks(BLOCK_BYTES) {
            let digest = match block.len() {
                BLOCK_BYTES => self.digest(block),
                bytes => {
                    let mut whole = [0; BLOCK_BYTES];
                    whole[..bytes].copy_from_slice(block);
                    self.digest(&whole)
                }
            };
            digests.extend_from_slice(&digest);
        }
        digests
    }

    /// The superblock, a whole block.
    pub fn superblock(&self, geometry: &Geometry) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        block.extend_from_slice(MAGIC);
        // Version of the superblock, and of the tree: the salt comes first.
        block.extend_from_slice(&1_u32.to_le_bytes());
        block.extend_from_slice(&1_u32.to_le_bytes());
        block.extend_from_slice(self.uuid.as_bytes());
        block.extend_from_slice(b"sha256");
        block.resize(64, 0);
        block.extend_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        block.extend_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        block.extend_from_slice(&geometry.data_blocks.to_le_bytes());
        block.extend_from_slice(&(DIGEST_BYTES as u16).to_le_bytes());
        block.resize(88, 0);
        block.extend_from_slice(&self.salt);
        block.resize(BLOCK_BYTES, 0);
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_behind_the_data_the_highest_first() {
        let of = |blocks: u64| Geometry::new(blocks * BLOCK_BYTES as u64).unwrap();
        assert_eq!(Geometry::new(0), None);
        assert_eq!(of(1).levels, []);
        assert_eq!(of(1).bytes(), 2 * 4096);
        assert_eq!(of(2).levels, [(3, 1)]);
        assert_eq!(of(128).levels, [(129, 1)]);
        assert_eq!(of(129).levels, [(131, 2), (130, 1)]);
        assert_eq!(of(129).bytes(), 133 * 4096);
        assert_eq!(
            of(128 * 128 + 1).levels,
            [(16389, 129), (16387, 2), (16386, 1)]
        );
        assert_eq!(Geometry::new(4097).unwrap().data_blocks, 2);
        for blocks in [1, 2, 127, 128, 129, 16384, 16385, 1 << 30] {
            let geometry = of(blocks);
            assert_eq!(Geometry::of_sealed(geometry.bytes()), Some(geometry));
        }
        for bytes in [0, 4096, 5 * 4096 + 1, u64::MAX] {
            assert_eq!(Geometry::of_sealed(bytes), None, "{bytes}");
        }
        // What no index can address has no tree either.
        assert_eq!(Geometry::new(u64::MAX), None);
    }

    #[test]
    fn the_superblock_says_how_much_data_there_is() {
        let geometry = Geometry::new(1 << 30).unwrap();
        let block = Seal::new(Uuid::nil()).superblock(&geometry);
        assert_eq!(data_blocks(&block), Some(1 << 18));
        assert_eq!(data_blocks(&block[1..]), None);
        assert_eq!(data_blocks(&block[..DATA_BLOCKS_AT + 7]), None);
    }

    #[test]
    fn a_partial_block_is_followed_by_zeros() {
        let seal = Seal::new(Uuid::from_u128(1));
        let mut data = vec![7; 5000];
        let partial = seal.digests(&data);
        data.resize(2 * BLOCK_BYTES, 0);
        assert_eq!(seal.digests(&data), partial);
        assert_eq!(partial.len(), 2 * DIGEST_BYTES);
        assert_ne!(Seal::new(Uuid::nil()).salt(), seal.salt());
        assert!(!Seal::new(Uuid::nil()).uuid().is_nil());
    }
}
