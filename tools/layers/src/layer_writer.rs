// SPDX-License-Identifier: GPL-2.0

//! Writing a sealed layer: header, data, index and trailer as one stream.

use std::path::Path;

use ovbd_image::{
    lsmt::{
        Entry, Identity, UuidText, DATA_START, ENTRY_BYTES, HEADER_BYTES, MAX_LAYER_ENTRIES,
        PADDING_ENTRIES, SECTOR_BYTES,
    },
    segment::Segment,
};

use crate::{
    error::{Error, Result},
    output::Stream,
    zfile_writer::ZfileWriter,
};

/// Sectors of a segment at most: the largest multiple of 64 KiB that an entry can hold, so that a long run
/// is not cut where a block of the filesystem or of a ZFile would straddle it.
pub const MAX_RUN_SECTORS: u64 = 16256;

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
}

#[derive(Clone, Copy)]
struct Run {
    start: u64,
    sectors: u64,
    zeroed: bool,
}

impl<'a> LayerWriter<'a> {
    /// Starts a layer that is called `path` in errors.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn new(
        mut blob: BlobWriter<'a>,
        path: &'a Path,
        virtual_size: u64,
        uuid: Option<UuidText>,
        parent_uuid: UuidText,
    ) -> Result<Self> {
        let identity = Identity {
            virtual_size,
            uuid: uuid.unwrap_or(UuidText::NIL),
            parent_uuid,
        };
        blob.write(&identity.header())?;
        Ok(Self {
            blob,
            path,
            entries: Vec::new(),
            open: None,
            stored: DATA_START,
        })
    }

    /// Stores `data`, whole sectors, for the sectors from `start` on, which follow all earlier ones.
    ///
    /// # Errors
    ///
    /// Those of writing, and more segments than a layer can have.
    pub fn data(&mut self, start: u64, data: &[u8]) -> Result<()> {
        self.run(Run {
            start,
            sectors: data.len() as u64 / SECTOR_BYTES,
            zeroed: false,
        })?;
        self.blob.write(data)
    }

    /// Makes `sectors` from `start` on, which follow all earlier ones, read as zeros.
    ///
    /// # Errors
    ///
    /// As [`LayerWriter::data`].
    pub fn zeros(&mut self, start: u64, sectors: u64) -> Result<()> {
        self.run(Run {
            start,
            sectors,
            zeroed: true,
        })
    }

    fn run(&mut self, mut run: Run) -> Result<()> {
        if let Some(open) = self.open {
            if open.zeroed == run.zeroed && open.start + open.sectors == run.start {
                run.start = open.start;
                run.sectors += open.sectors;
            } else {
                self.segment(open)?;
            }
        }
        while run.sectors > MAX_RUN_SECTORS {
            self.segment(Run {
                sectors: MAX_RUN_SECTORS,
                ..run
            })?;
            run.start += MAX_RUN_SECTORS;
            run.sectors -= MAX_RUN_SECTORS;
        }
        self.open = Some(run);
        Ok(())
    }

    fn segment(&mut self, run: Run) -> Result<()> {
        let segment = Segment::new(run.start, run.sectors as u32, self.stored, 0, run.zeroed)
            .ok_or_else(|| Error::new(self.path, "the image is too large for a layer"))?;
        if !run.zeroed {
            self.stored += run.sectors;
        }
        self.entries.push(Entry::from(&segment).encode());
        let padded = (self.entries.len() as u64).next_multiple_of(PADDING_ENTRIES);
        if padded > MAX_LAYER_ENTRIES {
            return Err(Error::new(
                self.path,
                format!("the layer needs more than {MAX_LAYER_ENTRIES} segments"),
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
        if let Some(open) = self.open.take() {
            self.segment(open)?;
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
        let trailer = identity.trailer(index_offset, padded as u64);
        self.blob.write(&trailer)?;
        self.blob.finish()
    }
}
