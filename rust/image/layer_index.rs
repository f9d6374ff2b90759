// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Reading the index of a sealed layer: every entry is checked as it streams by.

use super::{
    error::{Error, Reason},
    lsmt::{Entry, Trailer, DATA_START, ENTRY_BYTES, SECTOR_BYTES},
    segment::{Segment, MAX_VIRTUAL_SECTORS},
};

/// Reads the index of a sealed layer as it streams by, and checks every entry.
///
/// Segments may only be used when [`IndexReader::finish`] succeeded. After an error the reader can go on,
/// so that all errors of an index can be listed.
#[derive(Clone, Debug)]
pub struct IndexReader {
    layer: u8,
    /// Byte of the blob of the next entry.
    position: u64,
    remaining: u64,
    data_end: u64,
    previous_end: u64,
    first_tag: Option<u8>,
    mixed_tags: bool,
    /// Where the data of the next entry is if all data was written in the order of the entries.
    written: u64,
    dense: bool,
}

impl IndexReader {
    /// Starts reading the index of the layer with this trailer, which is number `layer` of its stack.
    pub fn new(trailer: &Trailer, layer: u8) -> Self {
        Self {
            layer,
            position: trailer.index_offset,
            remaining: trailer.entries,
            data_end: trailer.index_offset / SECTOR_BYTES,
            previous_end: 0,
            first_tag: None,
            mixed_tags: false,
            written: DATA_START,
            dense: true,
        }
    }

    /// Takes the next entry; `None` for an entry that covers nothing.
    ///
    /// # Errors
    ///
    /// An entry that overlaps or precedes an earlier one, lies beyond all virtual sectors, has data
    /// outside the data section, or belongs to a TurboOCI layer.
    ///
    /// An entry may lie beyond the virtual size of its own layer: a merge under a smaller layer and a
    /// commit after a shrink leave such entries, and they show again under a layer that is larger. Only
    /// the size of the whole stack cuts them.
    pub fn push(&mut self, bytes: &[u8; ENTRY_BYTES]) -> Result<Option<Segment>, Error> {
        let at = self.position;
        let fail = |reason| Err(Error::new(reason, at));
        let Some(remaining) = self.remaining.checked_sub(1) else {
            return fail(Reason::LsmtIndexTruncated);
        };
        self.remaining = remaining;
        self.position = at.saturating_add(ENTRY_BYTES as u64);

        let entry = Entry::decode(bytes);
        if entry.is_padding() {
            return Ok(None);
        }
        self.note_tag(&entry);
        // Neither sum can overflow: 50 or 55 bits plus 14.
        let length = u64::from(entry.sectors);
        let end = entry.start + length;
        if self.mixed_tags && !self.dense {
            return fail(Reason::TurboLayer);
        }
        if entry.start < self.previous_end {
            return fail(Reason::LsmtOrder);
        }
        self.previous_end = end;
        if end > MAX_VIRTUAL_SECTORS {
            return fail(Reason::LsmtEntryOutside);
        }
        if !entry.data_is_inside(self.data_end) {
            return fail(Reason::LsmtDataOutside);
        }
        if entry.sectors == 0 {
            return Ok(None);
        }
        match Segment::new(
            entry.start,
            entry.sectors,
            entry.stored,
            self.layer,
            entry.zeroed,
        ) {
            Some(segment) => Ok(Some(segment)),
            None => fail(Reason::LsmtEntryOutside),
        }
    }

    /// Takes the next `bytes`, whole entries, and hands every segment to `sink`.
    ///
    /// # Errors
    ///
    /// The first error of [`IndexReader::push`] or of `sink`, and bytes that are not whole entries.
    pub fn feed<E: From<Error>>(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(Segment) -> Result<(), E>,
    ) -> Result<(), E> {
        let (entries, rest) = entries(bytes);
        for entry in entries {
            if let Some(segment) = self.push(entry)? {
                sink(segment)?;
            }
        }
        if rest != 0 {
            return Err(Error::new(Reason::LsmtIndexTruncated, self.position).into());
        }
        Ok(())
    }

    /// Checks that the index is complete.
    ///
    /// # Errors
    ///
    /// Entries are missing.
    pub fn finish(&self) -> Result<(), Error> {
        if self.remaining != 0 {
            return Err(Error::new(Reason::LsmtIndexTruncated, self.position));
        }
        Ok(())
    }

    /// A TurboOCI layer is the only one that mixes tags and has data that was not written in the order of
    /// its entries: a merge keeps the tags of its sources but writes their data in order.
    fn note_tag(&mut self, entry: &Entry) {
        let first = *self.first_tag.get_or_insert(entry.tag);
        self.mixed_tags |= first != entry.tag;
        if !entry.zeroed {
            self.dense &= entry.stored == self.written;
            self.written = self.written.saturating_add(u64::from(entry.sectors));
        }
    }
}

/// Number of entries in `bytes` that cover something: of the segments that [`IndexReader::feed`] gives
/// for them, if it accepts them.
///
/// An index may consist of little else than padding, which compresses to nothing. So this, not what the
/// trailer says, is how much room the segments need.
pub fn count_segments(bytes: &[u8]) -> usize {
    let covers = |entry: &Entry| !entry.is_padding() && entry.sectors != 0;
    entries(bytes).0.map(Entry::decode).filter(covers).count()
}

/// The whole entries in `bytes` and the number of bytes left over.
pub fn entries(bytes: &[u8]) -> (impl Iterator<Item = &[u8; ENTRY_BYTES]>, usize) {
    let chunks = bytes.chunks_exact(ENTRY_BYTES);
    let rest = chunks.remainder().len();
    (chunks.filter_map(|chunk| chunk.try_into().ok()), rest)
}
