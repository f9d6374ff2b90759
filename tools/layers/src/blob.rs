// SPDX-License-Identifier: GPL-2.0

//! What a file holds once the tar wrapper and the compression are taken away.

use std::path::Path;

use ovbd_image::{
    lsmt,
    tar::{self, Member},
};

use crate::{
    error::{Error, Place, Result},
    file_range::FileRange,
    joined::Joined,
    turbo::Target,
    zfile::{Cursor, Zfile},
};

/// The bytes of a layer, or of anything else in a ZFile.
#[derive(Clone, Debug)]
pub enum Content {
    /// As they are in the file.
    Plain(FileRange),
    /// Compressed.
    Zfile(Box<Zfile>),
    /// In several files.
    Joined(Box<Joined>),
}

/// A file whose wrapping is known.
#[derive(Clone, Debug)]
pub struct Blob {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Where the blob is in its tar wrapper, if there is one.
    pub tar: Option<Member>,
    /// What is in it.
    pub content: Content,
}

/// The part of a file that holds the blob, and where the tar wrapper put it, if there is one.
///
/// # Errors
///
/// A wrapper that is damaged, and those of reading.
pub fn unwrap_tar(file: &FileRange) -> Result<(Option<Member>, FileRange)> {
    let first = file.first(tar::LOOK_BYTES)?;
    let member = tar::recognise(&first, file.bytes())
        .map_err(|e| Error::format(file.path(), e, Place::File(e.offset())))?;
    let blob = match member {
        Some(member) => file.part(member.offset, member.bytes),
        None => file.clone(),
    };
    Ok((member, blob))
}

impl Blob {
    /// Opens a file and takes away what is around its content.
    ///
    /// # Errors
    ///
    /// A damaged wrapper or ZFile, and those of reading.
    pub fn open(path: &Path) -> Result<Self> {
        let file = FileRange::open(path)?;
        Self::unwrap(&file, file.bytes())
    }

    /// As [`Blob::open`], for what is in the `bytes` of a file from byte `start` on.
    ///
    /// # Errors
    ///
    /// Those of [`Blob::open`], and a file that is shorter.
    pub fn open_part(path: &Path, start: u64, bytes: u64) -> Result<Self> {
        let file = FileRange::open(path)?;
        let end = start.checked_add(bytes);
        if end.is_none_or(|end| end > file.bytes()) {
            return Err(Error::new(path, "ends too early").at_byte(file.bytes()));
        }
        Self::unwrap(&file.part(start, bytes), file.bytes())
    }

    fn unwrap(part: &FileRange, file_bytes: u64) -> Result<Self> {
        let (tar, blob) = unwrap_tar(part)?;
        Ok(Self {
            file_bytes,
            tar,
            ..Self::of(blob)?
        })
    }

    /// Opens a layer whose data is in `targets`, too.
    ///
    /// # Errors
    ///
    /// Those of [`Blob::open`] and [`Joined::open`].
    pub fn open_joined(path: &Path, targets: &[Target]) -> Result<Self> {
        let opened = Self::open(path)?;
        let joined = Joined::open(opened.content, targets)?;
        Ok(Self {
            content: Content::Joined(Box::new(joined)),
            ..opened
        })
    }

    /// Takes away the compression of `blob`, which is in no wrapper.
    ///
    /// # Errors
    ///
    /// A damaged ZFile, and those of reading.
    pub fn of(blob: FileRange) -> Result<Self> {
        let file_bytes = blob.bytes();
        let first = blob.first(512)?;
        let content = if Zfile::recognise(&first, blob.bytes()) {
            Content::Zfile(Box::new(Zfile::open(blob)?))
        } else {
            Content::Plain(blob)
        };
        Ok(Self {
            file_bytes,
            tar: None,
            content,
        })
    }

    /// Where `count` bytes of the content from byte `from` on are in the file: the first byte, and the one after the last.
    /// Nothing where the content does not have them, or is in several files.
    pub fn stored(&self, from: u64, count: u64) -> Option<(u64, u64)> {
        let end = from.checked_add(count)?;
        if count == 0 || end > self.content.bytes() {
            return None;
        }
        match &self.content {
            Content::Plain(range) => {
                let start = range.start();
                Some((start.checked_add(from)?, start.checked_add(end)?))
            }
            Content::Zfile(zfile) => {
                let geometry = zfile.geometry();
                let first = zfile.extent(geometry.block_of(from))?;
                let last = zfile.extent(geometry.block_of(end - 1))?;
                let start = zfile.input().start();
                let end = last.offset.checked_add(last.bytes.into())?;
                Some((start.checked_add(first.offset)?, start.checked_add(end)?))
            }
            Content::Joined(_) => None,
        }
    }

    /// Whether the content starts as a layer does.
    ///
    /// # Errors
    ///
    /// Those of [`Content::read`].
    pub fn is_layer(&self) -> Result<bool> {
        let mut first = [0; 24];
        if self.content.bytes() < first.len() as u64 {
            return Ok(false);
        }
        self.content.read(&mut Cursor::default(), &mut first, 0)?;
        Ok(lsmt::Header::recognise(&first))
    }
}

impl Content {
    /// Bytes of the content.
    pub fn bytes(&self) -> u64 {
        match self {
            Content::Plain(input) => input.bytes(),
            Content::Zfile(zfile) => zfile.geometry().original_bytes(),
            Content::Joined(joined) => joined.bytes(),
        }
    }

    /// The part of the file that holds it.
    pub fn input(&self) -> &FileRange {
        match self {
            Content::Plain(input) => input,
            Content::Zfile(zfile) => zfile.input(),
            Content::Joined(joined) => joined.head().input(),
        }
    }

    /// How to name byte `offset` of the content to the user.
    pub fn place(&self, offset: u64) -> Place {
        match self {
            Content::Plain(input) => Place::File(input.start().saturating_add(offset)),
            Content::Zfile(_) | Content::Joined(_) => Place::Content(offset),
        }
    }

    /// An error of the format of the content.
    pub fn error(&self, error: ovbd_image::Error) -> Error {
        Error::format(self.input().path(), error, self.place(error.offset()))
    }

    /// Fills `buffer` from byte `offset` of the content.
    ///
    /// # Errors
    ///
    /// Those of [`Zfile::read`] and [`FileRange::read`].
    pub fn read(&self, cursor: &mut Cursor, buffer: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Content::Plain(input) => input.read(buffer, offset),
            Content::Zfile(zfile) => zfile.read(cursor, buffer, offset),
            Content::Joined(joined) => joined.read(cursor, buffer, offset),
        }
    }

    /// Reads `N` bytes from byte `offset` of the content.
    ///
    /// # Errors
    ///
    /// As [`Content::read`].
    pub fn read_array<const N: usize>(&self, cursor: &mut Cursor, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(cursor, &mut bytes, offset)?;
        Ok(bytes)
    }
}
