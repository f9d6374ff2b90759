// SPDX-License-Identifier: GPL-2.0

//! Where the content of files is in a tar that streams by: nothing else of a tar is looked at here.
//!
//! What a header says only decides where to look: content that is looked for at the wrong place is not found, and stored
//! once more. So what is not understood is passed over, until something looks like a header again.

use ovbd_image::tar::{self, MemberHeader, BLOCK_BYTES};

use crate::zeros::is_zero;

/// Bytes of an extended header that are looked at for the size of a file.
const MAX_PAX_BYTES: u64 = 1 << 20;

/// What the next block is that is no content.
#[derive(Clone, Copy, Debug, Default)]
enum Next {
    /// A header, or what is between archives.
    #[default]
    Header,
    /// One more header of a sparse file with so many blocks.
    Sparse(u64),
    /// An extended header, of which so many bytes are left.
    Pax(u64),
}

/// A member that not every tool makes a file of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Odd {
    /// A sparse file, in one of GNU's forms.
    Sparse,
    /// Of a type that is in no standard.
    Kind(u8),
}

/// What follows a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follows {
    /// Another block that [`Members::next`] is to see.
    Block,
    /// So many blocks that are the content of a file.
    File(u64),
    /// So many blocks that are not.
    Other(u64),
}

/// Finds the content of files.
#[derive(Debug, Default)]
pub struct Members {
    next: Next,
    /// What was read of an extended header.
    pax: Vec<u8>,
    /// The size that it has for the next member.
    size: Option<u64>,
    /// The latest time of a member that is one.
    newest: u64,
    /// The first member that is odd, before the end of the archive.
    odd: Option<Odd>,
    /// Whether that end was seen: who reads the archive goes no further.
    ended: bool,
}

impl Members {
    /// Takes the next block that is not content.
    pub fn next(&mut self, block: &[u8; BLOCK_BYTES]) -> Follows {
        match self.next {
            Next::Header => match MemberHeader::parse(block) {
                Some(header) => self.begin(&header),
                None => {
                    self.ended |= is_zero(block);
                    Follows::Block
                }
            },
            Next::Sparse(blocks) => self.sparse(tar::sparse_goes_on(block), blocks),
            Next::Pax(bytes) => {
                let used = bytes.min(BLOCK_BYTES as u64);
                self.pax.extend_from_slice(&block[..used as usize]);
                self.next = Next::Pax(bytes - used);
                if bytes == used {
                    self.next = Next::Header;
                    let records = std::mem::take(&mut self.pax);
                    if tar::pax_is_sparse(&records) {
                        self.note(Odd::Sparse);
                    }
                    self.size = tar::pax_size(&records).filter(|size| *size != 0);
                }
                Follows::Block
            }
        }
    }

    /// The latest time at which a member was changed, in seconds since 1970, of those that have 32 bits.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// The first member that not every tool makes a file of.
    pub fn odd(&self) -> Option<Odd> {
        self.odd
    }

    fn note(&mut self, odd: Odd) {
        if !self.ended {
            self.odd.get_or_insert(odd);
        }
    }

    /// Whether a header is to come, or content that none was seen of.
    pub fn wants_more(&self) -> bool {
        !matches!(self.next, Next::Header) || self.size.is_some()
    }

    fn begin(&mut self, header: &MemberHeader) -> Follows {
        if header.mtime <= u32::MAX.into() {
            self.newest = self.newest.max(header.mtime);
        }
        match header.kind {
            b'0'..=b'7' | 0 | b'x' | b'g' | b'L' | b'K' => {}
            b'S' => self.note(Odd::Sparse),
            kind => self.note(Odd::Kind(kind)),
        }
        let bytes = match header.kind {
            b'x' if header.bytes <= MAX_PAX_BYTES => {
                self.next = match header.bytes {
                    0 => Next::Header,
                    bytes => Next::Pax(bytes),
                };
                return Follows::Block;
            }
            b'x' | b'g' | b'L' | b'K' => header.bytes,
            _ => self.size.take().unwrap_or(header.bytes),
        };
        let blocks = bytes.div_ceil(BLOCK_BYTES as u64);
        match header.kind {
            b'0' | b'7' | 0 => Follows::File(blocks),
            b'S' => self.sparse(header.sparse_goes_on, blocks),
            // Links, devices and folders have no content, whatever the size in their header.
            b'1'..=b'6' => Follows::Block,
            _ => Follows::Other(blocks),
        }
    }

    /// More headers of a sparse file, or its content.
    fn sparse(&mut self, goes_on: bool, blocks: u64) -> Follows {
        self.next = match goes_on {
            true => Next::Sparse(blocks),
            false => Next::Header,
        };
        match goes_on {
            true => Follows::Block,
            false => Follows::File(blocks),
        }
    }
}
