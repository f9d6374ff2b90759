// SPDX-License-Identifier: GPL-2.0

//! Writing a sealed layer: header, data, index and trailer as one stream.

use std::{fs::File, path::Path};

use ovbd_image::{
    lsmt::{
        set_tar_bytes, Entry, Identity, DATA_START, ENTRY_BYTES, HEADER_BYTES, MAX_LAYER_ENTRIES,
        PADDING_ENTRIES, SECTOR_BYTES,
    },
    segment::{Segment, MAX_VIRTUAL_SECTORS},
};

use crate::{
    content_hash::{ContentHash, Summary},
    error::{Error, Result},
    output::Stream,
    zeros::{is_zero, GRANULE_BYTES},
    zfile_writer::ZfileWriter,
};

/// Sectors of a segment at most: the largest multiple of 64 KiB that an entry can hold, so that a long run
/// is not cut where a block of the filesystem or of a ZFile would straddle it.
pub const MAX_RUN_SECTORS: u64 = 16256;

/// Segments that a layer can have: the rest is padding.
pub const MAX_SEGMENTS: u64 = MAX_LAYER_ENTRIES / PADDING_ENTRIES * PADDING_ENTRIES;

/// What layers for direct access are aligned to in bytes: huge pages.
pub const DAX_ALIGNMENT: u64 = 2 << 20;

/// Bytes of the smallest page that layers for direct access are for.
pub const DAX_PAGE: u64 = 4096;

/// Sectors of a device, 2 TiB, beyond which the original reads a stack wrongly if its merged index starts at sector 0.
const LARGE_SECTORS: u64 = 1 << 32;

/// Where the bytes of a blob go.
pub enum BlobWriter<'a> {
    /// Into the file as they are.
    Plain(Stream<'a>),
    /// Into a ZFile.
    Zfile(Box<ZfileWriter<'a>>),
}

impl BlobWriter<'_> {
    /// Appends `data`.
    ///
    /// # Errors
    ///
    /// Those of compressing and writing.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        match self {
            BlobWriter::Plain(stream) => stream.write(data),
            BlobWriter::Zfile(zfile) => zfile.write(data),
        }
    }

    /// Appends `bytes` zeros.
    ///
    /// # Errors
    ///
    /// As [`BlobWriter::write`].
    pub fn zeros(&mut self, bytes: u64) -> Result<()> {
        match self {
            BlobWriter::Plain(stream) => stream.zeros(bytes),
            BlobWriter::Zfile(zfile) => zfile.zeros(bytes),
        }
    }

    /// Appends `bytes` zeros that more is appended to, without taking space for them where that can be.
    ///
    /// # Errors
    ///
    /// As [`BlobWriter::write`].
    pub fn hole(&mut self, bytes: u64) -> Result<()> {
        match self {
            BlobWriter::Plain(stream) => stream.hole(bytes),
            BlobWriter::Zfile(zfile) => zfile.zeros(bytes),
        }
    }

    /// Completes the blob; returns the byte of the file after its end.
    ///
    /// # Errors
    ///
    /// As [`BlobWriter::write`].
    pub fn finish(self) -> Result<u64> {
        match self {
            BlobWriter::Plain(stream) => Ok(stream.position()),
            BlobWriter::Zfile(zfile) => zfile.finish(),
        }
    }
}

/// Writes one layer.
///
/// The header goes out first and therefore does not hold a UUID that is derived from the content: its
/// field is nil then. Readers take the UUID from the trailer, the original among them; only the parent's
/// they also take from the header.
pub struct LayerWriter<'a> {
    blob: BlobWriter<'a>,
    path: &'a Path,
    entries: Vec<[u8; ENTRY_BYTES]>,
    /// The run that the next one may continue.
    open: Option<Run>,
    /// Sector of the blob at which the next data goes.
    stored: u64,
    /// Sectors at the start of the device that are zero, here and below; `None` until it is told.
    blank: Option<u64>,
    /// Bytes of the tar that the data section begins with.
    tar_bytes: Option<u64>,
    /// The layout for direct access.
    dax: Option<Dax>,
}

/// The layout for direct access: data begins with a huge page, segments are whole ones where the data is, zeros are
/// stored, and the blob ends with a huge page.
struct Dax {
    /// Sector before which all are stored; `None` over other layers, where it does not matter which are.
    filled: Option<u64>,
}

/// Sectors at the start of a device that are zero in `new`, its first bytes, and in `below`, what the layers below hold
/// there. Without `below` that is zeros.
pub fn blank_sectors(new: &[u8], below: Option<&[u8]>) -> u64 {
    let sectors = |bytes: &[u8]| {
        let sectors = bytes.chunks(SECTOR_BYTES as usize);
        sectors.take_while(|sector| is_zero(sector)).count() as u64
    };
    below.map_or(u64::MAX, sectors).min(sectors(new))
}

/// Segments that a run of `sectors` takes.
pub fn segments_of(sectors: u64) -> u64 {
    sectors.div_ceil(MAX_RUN_SECTORS)
}

/// Refuses a device that cannot be accessed directly for its size in bytes; it is called `path`.
///
/// # Errors
///
/// That one.
pub fn check_dax_size(path: &Path, bytes: u64) -> Result<()> {
    let what = if bytes % DAX_PAGE != 0 {
        format!("{bytes} bytes are not whole pages of {DAX_PAGE}, as direct access wants")
    } else if bytes / SECTOR_BYTES > LARGE_SECTORS {
        let most = LARGE_SECTORS * SECTOR_BYTES;
        format!("{bytes} bytes, of which a layer for direct access can have {most}")
    } else {
        return Ok(());
    };
    Err(Error::new(path, what))
}

/// Refuses an image of more bytes than the index of a layer can address; it is called `path`.
///
/// # Errors
///
/// That one.
pub fn check_size(path: &Path, bytes: u64) -> Result<()> {
    if bytes.div_ceil(SECTOR_BYTES) > MAX_VIRTUAL_SECTORS {
        let most = MAX_VIRTUAL_SECTORS * SECTOR_BYTES;
        let what = format!("{bytes} bytes, of which a layer can have {most}");
        return Err(Error::new(path, what));
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Run {
    start: u64,
    sectors: u64,
    /// Sector of the blob where its data is; of a zeroed one where the next data goes.
    stored: u64,
    zeroed: bool,
}

impl<'a> LayerWriter<'a> {
    /// Starts a layer that is called `path` in errors. Of `first`, which goes into the header, what is not known yet
    /// is 0 or nil.
    ///
    /// # Errors
    ///
    /// Those of writing, and a virtual size that is too large.
    pub fn new(mut blob: BlobWriter<'a>, path: &'a Path, first: &Identity) -> Result<Self> {
        check_size(path, first.virtual_size)?;
        blob.write(&whole_sectors(first).header())?;
        Ok(Self {
            blob,
            path,
            entries: Vec::new(),
            open: None,
            stored: DATA_START,
            blank: None,
            tar_bytes: None,
            dax: None,
        })
    }

    /// Lays the layer out for direct access, before anything is stored in it. With `dense` all of the device is stored:
    /// there are no layers below.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn lay_out_for_dax(&mut self, dense: bool) -> Result<()> {
        self.blob.hole(DAX_ALIGNMENT - self.stored * SECTOR_BYTES)?;
        self.stored = DAX_ALIGNMENT / SECTOR_BYTES;
        self.dax = Some(Dax {
            filled: dense.then_some(0),
        });
        if dense {
            // Nobody looks for more: the device is small enough, or it is refused.
            self.blank = Some(0);
        }
        Ok(())
    }

    /// Sectors of a segment at most.
    fn longest(&self) -> u64 {
        const HUGE: u64 = DAX_ALIGNMENT / SECTOR_BYTES;
        match self.dax {
            Some(_) => MAX_RUN_SECTORS / HUGE * HUGE,
            None => MAX_RUN_SECTORS,
        }
    }

    /// Stores zeros before sector `start`, where everything is stored.
    fn fill(&mut self, start: u64) -> Result<()> {
        let Some(Dax {
            filled: Some(filled),
        }) = self.dax
        else {
            return Ok(());
        };
        if filled < start {
            self.stored_zeros(filled, start - filled)?;
        }
        Ok(())
    }

    /// Stores `sectors` of zeros from `start` on as data.
    fn stored_zeros(&mut self, start: u64, sectors: u64) -> Result<()> {
        self.announce(start, sectors)?;
        self.blob.hole(sectors * SECTOR_BYTES)
    }

    /// Records that what was stored first is a tar of so many bytes.
    pub fn set_tar_bytes(&mut self, bytes: u64) {
        self.tar_bytes = Some(bytes);
    }

    /// The first `sectors` of the device are zero, in this layer and in those below ([`blank_sectors`]); 0 where that is
    /// not known. Whoever stores something from sector 0 on says so before.
    pub fn set_blank(&mut self, sectors: u64) {
        self.blank = Some(sectors);
    }

    /// Stores whole blocks of 4 KiB, which follow all earlier ones, from sector `start` on, and adds them to `hash`.
    /// Blocks of zeros become zeroed. The last block of a device may be shorter.
    ///
    /// # Errors
    ///
    /// As [`LayerWriter::data`].
    pub fn blocks(&mut self, start: u64, data: &[u8], hash: &mut ContentHash) -> Result<()> {
        let mut summary = Summary::default();
        for (number, block) in data.chunks(GRANULE_BYTES).enumerate() {
            let at = start + (number * GRANULE_BYTES) as u64 / SECTOR_BYTES;
            if is_zero(block) {
                summary.add(at, None);
                self.zeros(at, block.len() as u64 / SECTOR_BYTES)?;
            } else {
                summary.add(at, Some(block));
                self.data(at, block)?;
            }
        }
        hash.add(&summary);
        Ok(())
    }

    /// Stores `data`, whole sectors, for the sectors from `start` on, which follow all earlier ones.
    ///
    /// # Errors
    ///
    /// Those of writing, more segments than a layer can have, and a start without [`LayerWriter::set_blank`].
    pub fn data(&mut self, start: u64, data: &[u8]) -> Result<()> {
        self.fill(start)?;
        self.run(Run {
            start,
            sectors: data.len() as u64 / SECTOR_BYTES,
            stored: self.stored,
            zeroed: false,
        })?;
        self.unmapped(data)
    }

    /// Stores `data`, whole sectors, for [`LayerWriter::map`] to say later what they are.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn unmapped(&mut self, data: &[u8]) -> Result<()> {
        self.stored += data.len() as u64 / SECTOR_BYTES;
        self.blob.write(data)
    }

    /// As [`LayerWriter::unmapped`] with `data`, which is also in `file`, from byte `at` on: a file system that can do so
    /// lets both files share the blocks.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn unmapped_copy(&mut self, data: &[u8], file: &File, at: u64) -> Result<()> {
        if let BlobWriter::Plain(stream) = &mut self.blob {
            if stream.copy(file, at, data.len() as u64)? {
                self.stored += data.len() as u64 / SECTOR_BYTES;
                return Ok(());
            }
        }
        self.unmapped(data)
    }

    /// Makes `sectors` from `start` on, which follow all earlier ones, read what is stored from sector `stored` of the blob
    /// on.
    ///
    /// # Errors
    ///
    /// As [`LayerWriter::data`], and what is not stored yet.
    pub fn map(&mut self, start: u64, sectors: u64, stored: u64) -> Result<()> {
        let end = stored.checked_add(sectors);
        if stored < DATA_START || end.is_none_or(|end| end > self.stored) {
            return Err(Error::new(self.path, "data is mapped that is not stored"));
        }
        self.run(Run {
            start,
            sectors,
            stored,
            zeroed: false,
        })
    }

    /// Makes `sectors` from `start` on, which follow all earlier ones, read as what comes next in
    /// [`LayerWriter::blob`]: it is appended there later, in the same order.
    ///
    /// # Errors
    ///
    /// As [`LayerWriter::data`].
    pub fn announce(&mut self, start: u64, sectors: u64) -> Result<()> {
        self.run(Run {
            start,
            sectors,
            stored: self.stored,
            zeroed: false,
        })?;
        self.stored += sectors;
        Ok(())
    }

    /// Where data goes that was announced. All of it has to be there before [`LayerWriter::finish`].
    pub fn blob(&mut self) -> &mut BlobWriter<'a> {
        &mut self.blob
    }

    /// Makes `sectors` from `start` on, which follow all earlier ones, read as zeros.
    ///
    /// # Errors
    ///
    /// As [`LayerWriter::data`].
    pub fn zeros(&mut self, start: u64, sectors: u64) -> Result<()> {
        if self.dax.is_some() {
            self.fill(start)?;
            return self.stored_zeros(start, sectors);
        }
        self.run(Run {
            start,
            sectors,
            stored: self.stored,
            zeroed: true,
        })
    }

    /// Segments so far.
    pub fn segments(&self) -> u64 {
        self.entries.len() as u64 + u64::from(self.open.is_some())
    }

    fn run(&mut self, mut run: Run) -> Result<()> {
        if run.start == 0 && self.blank.is_none() {
            let what = "it was not said which sectors at the start are zero";
            return Err(Error::new(self.path, what));
        }
        if let Some(open) = self.open {
            let follows = run.zeroed || open.stored + open.sectors == run.stored;
            if open.zeroed == run.zeroed && open.start + open.sectors == run.start && follows {
                run = Run {
                    sectors: open.sectors + run.sectors,
                    ..open
                };
            } else {
                self.segment(open)?;
            }
        }
        if let Some(Dax {
            filled: Some(filled),
        }) = &mut self.dax
        {
            *filled = run.start + run.sectors;
        }
        let longest = self.longest();
        while run.sectors > longest {
            self.segment(Run {
                sectors: longest,
                ..run
            })?;
            run.start += longest;
            run.sectors -= longest;
            if !run.zeroed {
                run.stored += longest;
            }
        }
        self.open = Some(run);
        Ok(())
    }

    fn segment(&mut self, run: Run) -> Result<()> {
        let segment = Segment::new(run.start, run.sectors as u32, run.stored, 0, run.zeroed)
            .ok_or_else(|| Error::new(self.path, "the image is too large for a layer"))?;
        self.entries.push(Entry::from(&segment).encode());
        if self.entries.len() as u64 > MAX_SEGMENTS {
            return Err(Error::new(
                self.path,
                format!("the layer needs more than the {MAX_SEGMENTS} segments that one can have"),
            ));
        }
        Ok(())
    }

    /// Writes index and trailer; returns the byte of the file after the end.
    ///
    /// # Errors
    ///
    /// As [`LayerWriter::data`].
    pub fn finish(mut self, identity: &Identity) -> Result<u64> {
        if self.dax.is_some() {
            check_dax_size(self.path, identity.virtual_size)?;
            self.fill(identity.virtual_size / SECTOR_BYTES)?;
        }
        if let Some(open) = self.open.take() {
            self.segment(open)?;
        }
        check_size(self.path, identity.virtual_size)?;
        let identity = whole_sectors(identity);
        if identity.virtual_size / SECTOR_BYTES > LARGE_SECTORS {
            self.leave_out_blank();
        }
        let index_offset = self.stored * SECTOR_BYTES;
        let padded = self
            .entries
            .len()
            .next_multiple_of(PADDING_ENTRIES as usize);
        self.entries.resize(padded, Entry::PADDING.encode());
        for entries in self.entries.chunks(HEADER_BYTES) {
            self.blob.write(entries.as_flattened())?;
        }
        if self.dax.is_some() {
            // The trailer is the end of the device that the layer becomes.
            let end = index_offset + (padded * ENTRY_BYTES + HEADER_BYTES) as u64;
            self.blob.hole(end.next_multiple_of(DAX_ALIGNMENT) - end)?;
        }
        let mut trailer = identity.trailer(index_offset, padded as u64);
        if let Some(bytes) = self.tar_bytes {
            set_tar_bytes(&mut trailer, bytes);
        }
        self.blob.write(&trailer)?;
        self.blob.finish()
    }

    /// Takes the blank sectors at the start of the device out of the index, so that it does not begin at sector 0. Data
    /// stays where it is.
    fn leave_out_blank(&mut self) {
        let Some(first) = self.entries.first_mut() else {
            return;
        };
        let mut entry = Entry::decode(first);
        let blank = self.blank.unwrap_or(0);
        let sectors = u64::from(entry.sectors).min(blank.saturating_sub(entry.start));
        if entry.start != 0 || sectors == 0 {
            return;
        }
        entry.start += sectors;
        entry.sectors -= sectors as u32;
        if !entry.zeroed {
            entry.stored += sectors;
        }
        *first = entry.encode();
        if entry.sectors == 0 {
            self.entries.remove(0);
        }
    }
}

/// The same, of whole sectors: the original's devices leave out a partial last one.
fn whole_sectors(identity: &Identity) -> Identity {
    Identity {
        virtual_size: identity.virtual_size.next_multiple_of(SECTOR_BYTES),
        ..*identity
    }
}
