// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The writable layer: a data file and an index file that logs every write, the last one wins.
//!
//! The index file is a header of 4096 bytes followed by entries in the order of the writes. Its size may
//! be unaligned and padding entries may appear anywhere. The entries carry a tag without meaning here.
//!
//! Reading takes two steps: [`LogReader`] checks the entries and numbers them, [`resolve`] turns them
//! into the sorted segments that a sealed layer would have. The caller supplies the storage: one
//! [`LogEntry`] and one `u32` per entry, and room for at most twice as many segments.

use super::{
    error::{Error, Reason},
    layer_index::entries,
    lsmt::{
        Entry, Header, ENTRY_BYTES, FLAG_DATA, FLAG_SEALED, FLAG_SPARSE, HEADER_BYTES, SECTOR_BYTES,
    },
    segment::{Segment, MAX_VIRTUAL_SECTORS},
};

/// Entries of a log at most.
pub const MAX_ENTRIES: u64 = 128_000_000;

const FLAGS_AT: u64 = 28;
const INDEX_OFFSET_AT: u64 = 32;

/// Checks the header of the data file of a pair.
///
/// # Errors
///
/// Not the header of a data file, or one of a sparse layer, which has no log.
pub fn check_data_header(block: &[u8; HEADER_BYTES]) -> Result<Header, Error> {
    let header = Header::parse_data(block)?;
    if header.flags & FLAG_SPARSE != 0 {
        return Err(Error::new(Reason::SparseLayer, FLAGS_AT));
    }
    Ok(header)
}

/// The entries of one log, checked, in the order of the writes.
#[derive(Clone, Debug)]
pub struct LogReader {
    /// Virtual size in bytes; 0 where the layer below decides.
    pub virtual_size: u64,
    layer: u8,
    position: u64,
    next: u32,
    data_end: u64,
}

impl LogReader {
    /// Reads the header of an index file of `index_bytes`, which belongs to a data file of `data_bytes`
    /// and is number `layer` of its stack.
    ///
    /// # Errors
    ///
    /// Not the header of an unsealed index file, or too many entries.
    pub fn new(
        block: &[u8; HEADER_BYTES],
        index_bytes: u64,
        data_bytes: u64,
        layer: u8,
    ) -> Result<Self, Error> {
        let header = Header::parse(block)?;
        if header.flags & (FLAG_DATA | FLAG_SEALED) != 0 {
            return Err(Error::new(Reason::LogType, FLAGS_AT));
        }
        if header.index_offset != HEADER_BYTES as u64 {
            return Err(Error::new(Reason::LogOffset, INDEX_OFFSET_AT));
        }
        if Self::entries(index_bytes) > MAX_ENTRIES {
            return Err(Error::new(Reason::LogTooManyEntries, index_bytes));
        }
        Ok(Self {
            virtual_size: header.virtual_size,
            layer,
            position: HEADER_BYTES as u64,
            next: 0,
            data_end: data_bytes / SECTOR_BYTES,
        })
    }

    /// Whole entries, padding included, in an index file of `index_bytes`.
    pub fn entries(index_bytes: u64) -> u64 {
        index_bytes.saturating_sub(HEADER_BYTES as u64) / ENTRY_BYTES as u64
    }

    /// Takes the next entry; `None` for one that covers nothing.
    ///
    /// # Errors
    ///
    /// An entry beyond all virtual sectors or with data outside the data file. One beyond the virtual
    /// size is what a shrink leaves, as in a sealed layer.
    pub fn push(&mut self, bytes: &[u8; ENTRY_BYTES]) -> Result<Option<LogEntry>, Error> {
        let at = self.position;
        self.position = at.saturating_add(ENTRY_BYTES as u64);
        let entry = Entry::decode(bytes);
        if entry.is_padding() {
            return Ok(None);
        }
        // Cannot overflow: 50 bits plus 14.
        if entry.start + u64::from(entry.sectors) > MAX_VIRTUAL_SECTORS {
            return Err(Error::new(Reason::LsmtEntryOutside, at));
        }
        if !entry.data_is_inside(self.data_end) {
            return Err(Error::new(Reason::LsmtDataOutside, at));
        }
        if entry.sectors == 0 {
            return Ok(None);
        }
        let segment = Segment::new(
            entry.start,
            entry.sectors,
            entry.stored,
            self.layer,
            entry.zeroed,
        )
        .ok_or(Error::new(Reason::LsmtEntryOutside, at))?;
        let order = self.next;
        self.next = order
            .checked_add(1)
            .ok_or(Error::new(Reason::LogTooManyEntries, at))?;
        Ok(Some(LogEntry { segment, order }))
    }

    /// Takes the next `bytes`, whole entries, and hands every one that covers something to `sink`.
    ///
    /// # Errors
    ///
    /// The first error of [`LogReader::push`] or of `sink`, and bytes that are not whole entries.
    pub fn feed<E: From<Error>>(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(LogEntry) -> Result<(), E>,
    ) -> Result<(), E> {
        let (entries, rest) = entries(bytes);
        for entry in entries {
            if let Some(entry) = self.push(entry)? {
                sink(entry)?;
            }
        }
        if rest != 0 {
            return Err(Error::new(Reason::LsmtIndexTruncated, self.position).into());
        }
        Ok(())
    }
}

/// One write or discard, and when it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// What was written.
    pub segment: Segment,
    /// Its place in the log: the higher one wins.
    pub order: u32,
}

/// Turns a log into the sorted segments that its last writes leave, and hands each to `sink`.
///
/// `entries` is sorted in place; `scratch` is a heap and must be as long as `entries`, else the log is
/// refused as too long. At most `2 * entries.len() - 1` segments come out. Time is O(n log n).
///
/// # Errors
///
/// A `scratch` that is too short, and the first error of `sink`.
pub fn resolve<E: From<Error>>(
    entries: &mut [LogEntry],
    scratch: &mut [u32],
    mut sink: impl FnMut(Segment) -> Result<(), E>,
) -> Result<(), E> {
    let too_long = || E::from(Error::new(Reason::LogTooManyEntries, 0));
    entries.sort_unstable_by_key(|entry| (entry.segment.start(), entry.order));
    let entries = &*entries;
    let mut open = Heap {
        entries,
        slots: scratch,
        len: 0,
    };
    let mut next = 0;
    // Everything below `position` is settled; the heap holds entries that start at or below it.
    let mut position = 0;
    loop {
        let Some(top) = open.top() else {
            // Nothing is open: go on at the next entry, if there is one.
            let Some(entry) = entries.get(next) else {
                return Ok(());
            };
            position = entry.segment.start();
            open.push(next).ok_or_else(too_long)?;
            next += 1;
            continue;
        };
        let segment = top.segment;
        if segment.end() <= position {
            open.pop();
            continue;
        }
        // The newest open entry holds until it ends or a newer one starts.
        let mut end = segment.end();
        while let Some(entry) = entries.get(next) {
            let start = entry.segment.start();
            if start >= end {
                break;
            }
            open.push(next).ok_or_else(too_long)?;
            next += 1;
            if entry.order > top.order {
                end = start;
            }
        }
        if let Some(part) = segment.clip(position, end) {
            sink(part)?;
        }
        position = end;
    }
}

/// A binary heap of indices into the entries; the newest entry is on top.
struct Heap<'a> {
    entries: &'a [LogEntry],
    slots: &'a mut [u32],
    len: usize,
}

impl Heap<'_> {
    fn order(&self, slot: usize) -> Option<u32> {
        let entry = *self.slots.get(slot).filter(|_| slot < self.len)?;
        Some(self.entries.get(entry as usize)?.order)
    }

    fn top(&self) -> Option<LogEntry> {
        let entry = *self.slots.first().filter(|_| self.len != 0)?;
        self.entries.get(entry as usize).copied()
    }

    fn push(&mut self, entry: usize) -> Option<()> {
        let mut slot = self.len;
        *self.slots.get_mut(slot)? = u32::try_from(entry).ok()?;
        self.len += 1;
        while slot != 0 {
            let parent = (slot - 1) / 2;
            if self.order(parent) >= self.order(slot) {
                break;
            }
            self.slots.swap(parent, slot);
            slot = parent;
        }
        Some(())
    }

    fn pop(&mut self) {
        let Some(last) = self.len.checked_sub(1) else {
            return;
        };
        self.slots.swap(0, last);
        self.len = last;
        let mut slot = 0;
        loop {
            let (left, right) = (2 * slot + 1, 2 * slot + 2);
            // A missing child is `None`, which is below every order.
            let child = if self.order(right) > self.order(left) {
                right
            } else {
                left
            };
            if self.order(child) <= self.order(slot) {
                return;
            }
            self.slots.swap(slot, child);
            slot = child;
        }
    }
}
