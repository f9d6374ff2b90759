// SPDX-License-Identifier: GPL-2.0

//! Layers whose data is in several files: they read as one, and device-mapper puts the files together in the same way.

use std::path::Path;

use ovbd_image::lsmt::{Entry, Identity, ENTRY_BYTES, PADDING_ENTRIES, SECTOR_BYTES};

use crate::{
    blob::Content,
    erofs_index,
    error::{Error, Result},
    turbo::{self, Target},
    zfile::Cursor,
};

/// A layer of several files, sector by sector: what is put in front, the blob, the targets, index and trailer.
///
/// # Invariants
///
/// `front` and `tail` are whole sectors, and `head` has `head_sectors` at least.
#[derive(Clone, Debug)]
pub struct Joined {
    front: Vec<u8>,
    head: Content,
    head_sectors: u64,
    targets: Vec<Part>,
    tail: Vec<u8>,
}

/// A file behind the blob.
#[derive(Clone, Debug)]
pub struct Part {
    /// The file.
    pub target: Target,
    /// Sectors of it, of which the last may not be whole; it has no fewer.
    pub sectors: u64,
}

impl Part {
    /// Whole sectors that are in the file.
    pub fn whole_sectors(&self) -> u64 {
        self.sectors.min(self.target.bytes() / SECTOR_BYTES)
    }
}

impl Joined {
    /// What `blob` and its targets are together: a TurboOCI layer has one, and an EROFS as many as it says.
    ///
    /// # Errors
    ///
    /// Those of [`turbo::join`] and [`erofs_index::join`], and another number of targets.
    pub fn open(blob: Content, targets: &[Target]) -> Result<Self> {
        if let Some(devices) = erofs_index::read(&blob)? {
            return erofs_index::join(blob, &devices, targets);
        }
        match targets {
            [target] => turbo::join(blob, target.clone()),
            _ => {
                let what = format!("a layer has one --target, and {} are given", targets.len());
                Err(Error::new(blob.input().path(), what))
            }
        }
    }

    /// Puts `front`, so many sectors of `head`, and the targets together, with an index of `entries`.
    pub(crate) fn new(
        front: Vec<u8>,
        (head, head_sectors): (Content, u64),
        targets: Vec<Part>,
        mut entries: Vec<[u8; ENTRY_BYTES]>,
        identity: &Identity,
    ) -> Self {
        let padded = entries.len().next_multiple_of(PADDING_ENTRIES as usize);
        entries.resize(padded, Entry::PADDING.encode());
        let target_sectors: u64 = targets.iter().map(|part| part.sectors).sum();
        let index_offset = front.len() as u64 + (head_sectors + target_sectors) * SECTOR_BYTES;
        let mut tail = entries.as_flattened().to_vec();
        tail.extend_from_slice(&identity.trailer(index_offset, padded as u64));
        // INVARIANT: Entries fill whole sectors with their padding.
        Self {
            front,
            head,
            head_sectors,
            targets,
            tail,
        }
    }

    /// What comes first.
    pub fn front(&self) -> &[u8] {
        &self.front
    }

    /// The blob.
    pub fn head(&self) -> &Content {
        &self.head
    }

    /// Sectors of it that are part of the layer.
    pub fn head_sectors(&self) -> u64 {
        self.head_sectors
    }

    /// The files behind it.
    pub fn targets(&self) -> &[Part] {
        &self.targets
    }

    /// Index and trailer.
    pub fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// What it is: `turbo` or `erofs`.
    pub fn kind(&self) -> &'static str {
        match self.front.is_empty() {
            true => "turbo",
            false => "erofs",
        }
    }

    /// Bytes of what is in no target.
    pub fn own_bytes(&self) -> u64 {
        self.front.len() as u64 + self.head_sectors * SECTOR_BYTES
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> u64 {
        let sectors: u64 = self.targets.iter().map(|part| part.sectors).sum();
        self.own_bytes() + sectors * SECTOR_BYTES + self.tail.len() as u64
    }

    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    ///
    /// Those of reading, and an end before the buffer is full.
    pub fn read(&self, cursor: &mut Cursor, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
        while !buffer.is_empty() {
            let done = self.read_some(cursor, buffer, offset)?;
            buffer = buffer.split_at_mut(done).1;
            offset += done as u64;
        }
        Ok(())
    }

    /// As much as is in one part; how much that is.
    fn read_some(&self, cursor: &mut Cursor, buffer: &mut [u8], offset: u64) -> Result<usize> {
        // Of a part of so many bytes, what of it is wanted and how far it goes.
        let within = |at: u64, bytes: u64| {
            let from = offset.checked_sub(at).filter(|from| *from < bytes)?;
            Some((from, (bytes - from).min(buffer.len() as u64) as usize))
        };
        if let Some((from, now)) = within(0, self.front.len() as u64) {
            let from = from as usize;
            buffer[..now].copy_from_slice(&self.front[from..from + now]);
            return Ok(now);
        }
        let mut at = self.front.len() as u64;
        let bytes = self.head_sectors * SECTOR_BYTES;
        if let Some((from, now)) = within(at, bytes) {
            self.head.read(cursor, &mut buffer[..now], from)?;
            return Ok(now);
        }
        at += bytes;
        for part in &self.targets {
            let bytes = part.sectors * SECTOR_BYTES;
            if let Some((from, now)) = within(at, bytes) {
                // The last sector may not be whole.
                let there = part.target.bytes().saturating_sub(from).min(now as u64) as usize;
                part.target.read(&mut buffer[..there], from)?;
                buffer[there..now].fill(0);
                return Ok(now);
            }
            at += bytes;
        }
        if let Some((from, now)) = within(at, self.tail.len() as u64) {
            let from = from as usize;
            buffer[..now].copy_from_slice(&self.tail[from..from + now]);
            return Ok(now);
        }
        Err(Error::new(self.path(), "ends too early"))
    }

    fn path(&self) -> &Path {
        self.head.input().path()
    }
}
