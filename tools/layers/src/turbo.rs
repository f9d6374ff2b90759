// SPDX-License-Identifier: GPL-2.0

//! TurboOCI layers: the metadata of a file system whose files are in the tar of the original image, which is here as well.
//!
//! The blob up to its index, the tar behind that, and an index for the two are an ordinary layer ([`Joined`]).

use std::{
    env,
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use ovbd_image::{
    layer_index,
    lsmt::{Identity, Trailer, UuidText, ENTRY_BYTES, SECTOR_BYTES},
    turbo::{self, Wrong},
};

use crate::{
    blob::Content,
    error::{Error, Result},
    file_range::FileRange,
    gzip_index::GzipIndex,
    joined::{Joined, Part},
    layer::{each_chunk, read_header},
    report::Report,
    tar::source::TarSource,
    zfile::Cursor,
};

/// The folder for a tar that was decompressed, which may stay as long as a device.
const FOLDER: &str = "/var/tmp";

/// The original tar of a layer.
#[derive(Clone, Debug)]
pub struct Target {
    /// What the user calls it.
    path: PathBuf,
    tar: Tar,
}

/// Where the content of a target is.
#[derive(Clone, Debug)]
enum Tar {
    /// In a file, without compression; and whether that has no other name.
    File(FileRange, bool),
    /// In a gzip file, of which parts are decompressed when they are read.
    Ranges(Arc<GzipIndex>),
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for Target {}

impl Target {
    /// Opens a tar. One that is compressed is decompressed first, into a file without a name.
    ///
    /// # Errors
    ///
    /// Those of reading and decompressing, and more than there is room for.
    pub fn open(path: &Path, report: &dyn Report) -> Result<Self> {
        let source = TarSource::open(path)?;
        if !source.is_compressed() {
            return Ok(Self {
                path: path.to_owned(),
                tar: Tar::File(FileRange::open(path)?, false),
            });
        }
        let folder = env::var_os("TMPDIR").map_or_else(|| FOLDER.into(), PathBuf::from);
        let file = tempfile::tempfile_in(&folder)
            .map_err(|e| Error::io(&folder, "create a file in", e))?;
        let space = rustix::fs::fstatvfs(&file);
        let room = space.map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize));
        let mut at = 0;
        source.each_window(room, report, |window| {
            file.write_all_at(window, at)
                .map_err(|e| Error::io(&folder, "write a file in", e))?;
            at += window.len() as u64;
            Ok(())
        })?;
        Ok(Self {
            path: path.to_owned(),
            tar: Tar::File(FileRange::of(file, path)?, true),
        })
    }

    /// As [`Target::open`] of a gzip file, and checks its `index` against all that is in it.
    ///
    /// # Errors
    ///
    /// Those of [`Target::open`], [`GzipIndex::open`] and [`GzipIndex::check`].
    pub fn open_checked(path: &Path, index: &Path, report: &dyn Report) -> Result<Self> {
        let index = GzipIndex::open(index, FileRange::open(path)?)?;
        let target = Self::open(path, report)?;
        if let Tar::File(tar, _) = &target.tar {
            index.check(tar, report)?;
        }
        Ok(target)
    }

    /// Opens a gzip file with its `index`, by which only that is decompressed which is read.
    ///
    /// # Errors
    ///
    /// Those of [`GzipIndex::open`].
    pub fn open_ranges(path: &Path, index: &Path) -> Result<Self> {
        let index = GzipIndex::open(index, FileRange::open(path)?)?;
        Ok(Self {
            path: path.to_owned(),
            tar: Tar::Ranges(Arc::new(index)),
        })
    }

    /// What the user calls it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the tar without compression.
    pub fn bytes(&self) -> u64 {
        match &self.tar {
            Tar::File(tar, _) => tar.bytes(),
            Tar::Ranges(index) => index.bytes(),
        }
    }

    /// Fills `buffer` from byte `offset` of the tar.
    ///
    /// # Errors
    ///
    /// Those of reading and decompressing.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match &self.tar {
            Tar::File(tar, _) => tar.read(buffer, offset),
            Tar::Ranges(index) => index.read(buffer, offset),
        }
    }

    /// The file that is the tar without compression.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn file(&self) -> Result<&FileRange> {
        match &self.tar {
            Tar::File(tar, _) => Ok(tar),
            Tar::Ranges(_) => Err(Error::new(&self.path, "is not decompressed")),
        }
    }

    /// Whether the tar without compression is a file that others can open, too.
    pub fn has_name(&self) -> bool {
        matches!(self.tar, Tar::File(_, false))
    }

    /// A name of that file for this process.
    ///
    /// # Errors
    ///
    /// As [`Target::file`].
    pub fn name(&self) -> Result<PathBuf> {
        match self.has_name() {
            true => Ok(self.path.clone()),
            false => Ok(own_name(self.file()?.file())),
        }
    }
}

/// The name of an open file, for this process.
pub fn own_name(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Puts `head`, the blob of a TurboOCI layer, and its target together.
///
/// # Errors
///
/// A blob that is no layer, entries that are in neither of the two, and those of reading.
pub fn join(head: Content, target: Target) -> Result<Joined> {
    let Index {
        trailer,
        mut entries,
    } = Index::read(&head)?;
    let target_sectors = target.bytes().div_ceil(SECTOR_BYTES);
    let rebased = turbo::rebase(&mut entries, &trailer, target_sectors);
    let tar = (target.path.as_path(), target.bytes());
    rebased.map_err(|wrong| wrong_entry(&head, tar, wrong))?;
    let target = Part {
        sectors: target_sectors,
        target,
    };
    let head_sectors = trailer.index_offset / SECTOR_BYTES;
    Ok(Joined::new(
        Vec::new(),
        (head, head_sectors),
        vec![target],
        entries,
        &identity(&trailer),
    ))
}

/// The index of a blob as it is stored.
pub struct Index {
    /// The end of the blob, which was checked but for the entries.
    pub trailer: Trailer,
    /// Not checked.
    pub entries: Vec<[u8; ENTRY_BYTES]>,
}

impl Index {
    /// Reads that of `head`.
    ///
    /// # Errors
    ///
    /// A blob that is no layer, and those of reading.
    pub fn read(head: &Content) -> Result<Self> {
        read_header(head)?;
        let fail = |e| head.error(e);
        let at = Trailer::position(head.bytes()).map_err(fail)?;
        let block = head.read_array(&mut Cursor::default(), at)?;
        let trailer = turbo::parse_trailer(&block, head.bytes()).map_err(fail)?;
        let mut entries: Vec<[u8; ENTRY_BYTES]> = Vec::new();
        each_chunk(trailer.index_bytes(), |at, buffer| {
            head.read(&mut Cursor::default(), buffer, trailer.index_offset + at)?;
            entries.extend(layer_index::entries(buffer).0);
            Ok(())
        })?;
        Ok(Self { trailer, entries })
    }
}

/// What a layer with this trailer is.
pub fn identity(trailer: &Trailer) -> Identity {
    Identity {
        virtual_size: trailer.virtual_size,
        uuid: trailer.uuid.unwrap_or(UuidText::NIL),
        parent_uuid: trailer.parent_uuid.unwrap_or(UuidText::NIL),
    }
}

/// The error of an entry of `head`, whose target has this path and so many bytes.
pub fn wrong_entry(head: &Content, (target, bytes): (&Path, u64), wrong: Wrong) -> Error {
    let path = head.input().path();
    match wrong {
        Wrong::Format(error) => head.error(error),
        Wrong::Tag(at) => {
            let what =
                "TurboOCI index entry of which the tag names neither the layer nor its target";
            Error::new(path, what).at(head.place(at))
        }
        Wrong::OutsideTarget(at) => {
            let what = format!(
                "TurboOCI index entry beyond the {bytes} bytes of {}, which may be another tar",
                crate::error::name(target)
            );
            Error::new(path, what).at(head.place(at))
        }
    }
}
