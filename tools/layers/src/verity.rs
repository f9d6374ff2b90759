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

/// Bytes of a superblock of which a salt of 256 bytes is the last field.
const SUPERBLOCK_BYTES: usize = 512;

/// Most bytes of a salt.
const MAX_SALT_BYTES: usize = 256;

/// What a superblock says of the tree behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// 1, or 0 where the salt is hashed last, as Chromium OS has it.
    pub hash_type: u32,
    /// The hash function, in the words of the kernel's crypto interface.
    pub algorithm: String,
    /// Bytes of a block of data.
    pub data_block_bytes: u32,
    /// Bytes of a block of the tree.
    pub hash_block_bytes: u32,
    /// Blocks of data.
    pub data_blocks: u64,
    /// What is hashed with each block.
    pub salt: Vec<u8>,
}

impl Superblock {
    /// Bytes that [`Superblock::parse`] looks at.
    pub const BYTES: usize = SUPERBLOCK_BYTES;

    /// Reads the first bytes of a superblock; `None` if it is none.
    ///
    /// # Errors
    ///
    /// It is one of which dm-verity could make nothing; what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, &'static str> {
        let Some(bytes) = bytes.first_chunk::<SUPERBLOCK_BYTES>() else {
            return Ok(None);
        };
        if !bytes.starts_with(MAGIC) {
            return Ok(None);
        }
        let number = |at: usize| {
            let mut field = [0; 4];
            field.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(field)
        };
        let data_blocks = u64::from(number(72)) | (u64::from(number(76)) << 32);
        let salt_bytes = usize::from(u16::from_le_bytes([bytes[80], bytes[81]]));
        let algorithm: Vec<u8> = bytes[32..64]
            .iter()
            .copied()
            .take_while(|byte| *byte != 0)
            .collect();
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_".contains(byte);
        // A word of a table.
        let algorithm = String::from_utf8(algorithm)
            .ok()
            .filter(|name| !name.is_empty() && name.bytes().all(|byte| plain(&byte)))
            .ok_or("the superblock of the hash tree names no hash function")?;
        let (data_block_bytes, hash_block_bytes) = (number(64), number(68));
        let is_block = |bytes: u32| bytes.is_power_of_two() && (512..=1 << 20).contains(&bytes);
        if number(8) != 1 || number(12) > 1 {
            return Err("the superblock of the hash tree has an unknown version");
        }
        if !is_block(data_block_bytes) || !is_block(hash_block_bytes) {
            return Err("the superblock of the hash tree has blocks of a wrong size");
        }
        if salt_bytes > MAX_SALT_BYTES {
            return Err("the superblock of the hash tree has a salt that is too long");
        }
        Ok(Some(Self {
            hash_type: number(12),
            algorithm,
            data_block_bytes,
            hash_block_bytes,
            data_blocks,
            salt: bytes[88..88 + salt_bytes].to_vec(),
        }))
    }

    /// Bytes of data; `None` where there are more than numbers.
    pub fn data_bytes(&self) -> Option<u64> {
        self.data_blocks.checked_mul(self.data_block_bytes.into())
    }

    /// The digest of a block, where the hash function is one that is known here.
    pub fn digest(&self, block: &[u8]) -> Option<Digest> {
        let known = self.hash_type == 1 && self.algorithm == "sha256";
        let hash = || Sha256::new_with_prefix(&self.salt).chain_update(block);
        known.then(|| hash().finalize().into())
    }
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
        let seal = Seal::new(Uuid::nil());
        let block = seal.superblock(&geometry);
        let found = Superblock::parse(&block).unwrap().unwrap();
        assert_eq!(found.data_blocks, 1 << 18);
        assert_eq!(found.data_bytes(), Some(1 << 30));
        assert_eq!(found.salt, seal.salt());
        assert_eq!((found.hash_type, found.algorithm.as_str()), (1, "sha256"));
        assert_eq!(Superblock::parse(&block[1..]), Ok(None));
        assert_eq!(Superblock::parse(&block[..511]), Ok(None));
        for (at, byte) in [
            (8, 2),
            (12, 2),
            (32, 0),
            (33, b' '),
            (64, 1),
            (69, 0),
            (81, 2),
        ] {
            let mut wrong = block.clone();
            wrong[at] = byte;
            assert!(Superblock::parse(&wrong).is_err(), "byte {at}");
        }
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
