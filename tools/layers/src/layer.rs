// SPDX-License-Identifier: GPL-2.0

//! One layer of a stack: a sealed blob, or the data and index files of a writable layer.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use ovbd_image::{
    layer_index::IndexReader,
    log::{self, LogReader},
    lsmt::{Header, Trailer, UuidText, ENTRY_BYTES, HEADER_BYTES},
    segment::{PackedSegment, Segment},
    Reason,
};

use crate::{
    blob::{Blob, Content},
    error::{Error, Result},
    file_range::{FileRange, CHUNK_BYTES},
    foreign,
    turbo::Target,
    zfile::Cursor,
};

/// How the command line names a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerPath {
    /// A sealed blob.
    Sealed(PathBuf),
    /// A sealed blob that is part of a file or block device.
    Part {
        /// The file or device.
        path: PathBuf,
        /// Byte of it at which the blob begins; the start of a sector of 512 bytes.
        start: u64,
        /// Bytes of the blob.
        bytes: u64,
    },
    /// The pair of a writable layer, written `DATA:INDEX`.
    Writable {
        /// The file with the data.
        data: PathBuf,
        /// The file with the log.
        index: PathBuf,
    },
    /// A TurboOCI layer, or an EROFS that is an index of tars.
    Joined {
        /// The blob.
        blob: PathBuf,
        /// The original tars that it points into.
        targets: Vec<Target>,
    },
}

impl LayerPath {
    /// The files, also those that are not read as data.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let (index, targets) = match self {
            LayerPath::Sealed(_) | LayerPath::Part { .. } => (None, &[][..]),
            LayerPath::Writable { index, .. } => (Some(index.as_path()), &[][..]),
            LayerPath::Joined { targets, .. } => (None, &targets[..]),
        };
        let others = index.into_iter().chain(targets.iter().map(Target::path));
        std::iter::once(self.data()).chain(others)
    }

    /// The file with the data, or where that is in several the blob.
    pub fn data(&self) -> &Path {
        match self {
            LayerPath::Sealed(path)
            | LayerPath::Part { path, .. }
            | LayerPath::Joined { blob: path, .. } => path,
            LayerPath::Writable { data, .. } => data,
        }
    }
}

impl From<&Path> for LayerPath {
    fn from(path: &Path) -> Self {
        LayerPath::Sealed(path.to_owned())
    }
}

impl From<&OsStr> for LayerPath {
    /// A name with a colon is a pair, unless there is a file of that name.
    fn from(name: &OsStr) -> Self {
        let path = Path::new(name);
        let bytes = name.as_bytes();
        let colon = bytes.iter().position(|byte| *byte == b':');
        match colon.map(|at| (&bytes[..at], &bytes[at + 1..])) {
            Some((data, index)) if !data.is_empty() && !index.is_empty() && !path.exists() => {
                LayerPath::Writable {
                    data: OsStr::from_bytes(data).into(),
                    index: OsStr::from_bytes(index).into(),
                }
            }
            _ => LayerPath::Sealed(path.to_owned()),
        }
    }
}

/// What an open layer is.
#[derive(Clone, Debug)]
pub enum LayerKind {
    /// A sealed blob.
    Sealed(Trailer),
    /// A writable layer, and the whole entries in its log.
    Writable {
        /// Header of the data file.
        header: Header,
        /// Entries of the log, padding included.
        entries: u64,
    },
}

/// An open layer: its checked index, and how to read its data.
#[derive(Clone, Debug)]
pub struct Layer {
    opened: Blob,
    kind: LayerKind,
    virtual_bytes: u64,
    segments: Vec<PackedSegment>,
}

impl Layer {
    /// Opens the layer that becomes number `position` of a stack.
    ///
    /// # Errors
    ///
    /// Everything that [`ovbd_image`] checks, and those of reading.
    pub fn open(path: &LayerPath, position: u8) -> Result<Self> {
        tracing::debug!(position, path = %path.data().display(), "open");
        match path {
            LayerPath::Sealed(path) => Self::sealed(Blob::open(path)?, position),
            LayerPath::Part { path, start, bytes } => {
                Self::sealed(Blob::open_part(path, *start, *bytes)?, position)
            }
            LayerPath::Writable { data, index } => Self::writable(data, index, position),
            LayerPath::Joined { blob, targets } => {
                Self::sealed(Blob::open_joined(blob, targets)?, position)
            }
        }
    }

    /// Makes a layer of an open file.
    ///
    /// # Errors
    ///
    /// As [`Layer::open`].
    pub fn sealed(opened: Blob, position: u8) -> Result<Self> {
        let content = &opened.content;
        read_header(content)?;
        let trailer = read_trailer(content)?;
        let mut reader = IndexReader::new(&trailer, position);
        let mut segments = Vec::new();
        each_chunk(trailer.index_bytes(), |at, buffer| {
            content.read(&mut Cursor::default(), buffer, trailer.index_offset + at)?;
            reader
                .feed(buffer, |segment| push(&mut segments, segment))
                .map_err(|e| index_error(content, e))
        })?;
        reader.finish().map_err(|e| content.error(e))?;
        Ok(Self {
            opened,
            kind: LayerKind::Sealed(trailer),
            virtual_bytes: trailer.virtual_size,
            segments,
        })
    }

    fn writable(data: &Path, index: &Path, position: u8) -> Result<Self> {
        let data = FileRange::open(data)?;
        let data_bytes = data.bytes();
        let content = Content::Plain(data);
        let header = log::check_data_header(&content.read_array(&mut Cursor::default(), 0)?)
            .map_err(|e| content.error(e))?;
        let index = Content::Plain(FileRange::open(index)?);
        let fail = |e| index.error(e);
        let block = index.read_array(&mut Cursor::default(), 0)?;
        let mut reader =
            LogReader::new(&block, index.bytes(), data_bytes, position).map_err(fail)?;
        let count = LogReader::entries(index.bytes());
        let mut entries = Vec::new();
        each_chunk(count * ENTRY_BYTES as u64, |at, buffer| {
            index.read(&mut Cursor::default(), buffer, HEADER_BYTES as u64 + at)?;
            reader
                .feed(buffer, |entry| {
                    entries.push(entry);
                    Ok::<(), ovbd_image::Error>(())
                })
                .map_err(fail)
        })?;
        let mut scratch = vec![0; entries.len()];
        let mut segments = Vec::new();
        log::resolve(&mut entries, &mut scratch, |segment| {
            push(&mut segments, segment)
        })
        .map_err(fail)?;
        Ok(Self {
            opened: Blob {
                file_bytes: data_bytes,
                tar: None,
                content,
            },
            kind: LayerKind::Writable {
                header,
                entries: count,
            },
            virtual_bytes: reader.virtual_size,
            segments,
        })
    }

    /// The file and its wrapping.
    pub fn opened(&self) -> &Blob {
        &self.opened
    }

    /// The bytes in which the segments' data is stored.
    pub fn content(&self) -> &Content {
        &self.opened.content
    }

    /// Path of the file with the data.
    pub fn path(&self) -> &Path {
        self.content().input().path()
    }

    /// Sealed or writable.
    pub fn kind(&self) -> &LayerKind {
        &self.kind
    }

    /// Virtual size in bytes; 0 where the layer below decides.
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// UUID of the layer, if it has one.
    pub fn uuid(&self) -> Option<UuidText> {
        match &self.kind {
            LayerKind::Sealed(trailer) => trailer.uuid,
            LayerKind::Writable { header, .. } => header.uuid,
        }
        .filter(|uuid| !uuid.is_nil())
    }

    /// UUID of the layer below, if it names one.
    pub fn parent_uuid(&self) -> Option<UuidText> {
        match &self.kind {
            LayerKind::Sealed(trailer) => trailer.parent_uuid,
            LayerKind::Writable { header, .. } => header.parent_uuid,
        }
        .filter(|uuid| !uuid.is_nil())
    }

    /// The segments, in order and without overlap.
    pub fn segments(&self) -> &[PackedSegment] {
        &self.segments
    }
}

/// Reads the header of a sealed layer.
///
/// # Errors
///
/// Those of the format, and of reading.
pub fn read_header(content: &Content) -> Result<Header> {
    let mut cursor = Cursor::default();
    if content.bytes() >= HEADER_BYTES as u64 {
        let block = content.read_array(&mut cursor, 0)?;
        return match Header::parse_data(&block) {
            Err(e) if e.reason() == Reason::LsmtHeaderMagic => Err(no_layer(content)?),
            result => result.map_err(|e| content.error(e)),
        };
    }
    // Too short, but perhaps it is something else altogether.
    let mut first = [0; 24];
    let looks_right = content.bytes() < first.len() as u64 || {
        content.read(&mut cursor, &mut first, 0)?;
        Header::recognise(&first)
    };
    if !looks_right {
        return Err(no_layer(content)?);
    }
    let short = ovbd_image::Error::new(Reason::LsmtTooShort, content.bytes());
    Err(content.error(short))
}

/// The error of something that does not start as a layer does.
fn no_layer(content: &Content) -> Result<Error> {
    let path = content.input().path();
    if let Content::Zfile(_) = content {
        return Ok(Error::new(path, "a ZFile that holds no layer"));
    }
    let first = content.input().first(foreign::LOOK_BYTES)?;
    let what = match foreign::kind(&first, content.bytes()) {
        Some(kind) => format!("{kind}, not a layer"),
        None => "not a layer; \"ovbd build\" makes one of a raw image".to_owned(),
    };
    Ok(Error::new(path, what))
}

/// Reads the trailer of a sealed layer.
///
/// # Errors
///
/// Those of the format, and of reading.
pub fn read_trailer(content: &Content) -> Result<Trailer> {
    let fail = |e| index_error(content, e);
    let at = Trailer::position(content.bytes()).map_err(fail)?;
    let block = content.read_array(&mut Cursor::default(), at)?;
    Trailer::parse(&block, content.bytes()).map_err(fail)
}

/// The error of an index or trailer, which for a TurboOCI layer says what is missing.
fn index_error(content: &Content, error: ovbd_image::Error) -> Error {
    match error.reason() {
        Reason::TurboLayer => {
            let what = "TurboOCI layer: its files are in the original tar (--target names it)";
            Error::new(content.input().path(), what).at(content.place(error.offset()))
        }
        _ => content.error(error),
    }
}

/// Calls `read` for every part of `bytes` with a buffer of its size.
pub fn each_chunk(bytes: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; bytes.min(CHUNK_BYTES as u64) as usize];
    let mut at = 0;
    while at < bytes {
        let n = (bytes - at).min(buffer.len() as u64) as usize;
        read(at, &mut buffer[..n])?;
        at += n as u64;
    }
    Ok(())
}

fn push(
    segments: &mut Vec<PackedSegment>,
    segment: Segment,
) -> std::result::Result<(), ovbd_image::Error> {
    segments.push(PackedSegment::from(segment));
    Ok(())
}
