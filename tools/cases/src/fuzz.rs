// SPDX-License-Identifier: GPL-2.0

//! What the fuzzers do with a file: errors are fine, panics are bugs.
//!
//! A file also must not pass `verify` and then fail to be read.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use ovbd::{
    crc::crc32c,
    image::Image,
    info::Info,
    layer::LayerPath,
    progress::Progress,
    stack::WINDOW_BYTES,
    verify::{verify, Finding},
};
use ovbd_image::zfile::{Header, HEADER_BYTES};
use tempfile::TempDir;

/// Windows that are read of an image, so that a huge one takes no longer than others.
const MAX_WINDOWS: usize = 8;

/// Files that every input is written to.
pub struct Fuzzer {
    file: File,
    index: File,
    folder: TempDir,
}

impl Fuzzer {
    /// Makes the files, in memory where the system has a place for that.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let folder = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new())?;
        Ok(Self {
            file: File::create(folder.path().join("blob"))?,
            index: File::create(folder.path().join("index"))?,
            folder,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Reads `data` as a blob in any wrapper.
    ///
    /// # Errors
    ///
    /// Those of writing the file.
    pub fn blob(&self, data: &[u8]) -> io::Result<()> {
        replace(&self.file, data)?;
        read(&[LayerPath::Sealed(self.path("blob"))]);
        Ok(())
    }

    /// Reads a writable pair whose index file is `index`.
    ///
    /// # Errors
    ///
    /// Those of writing the files.
    pub fn pair(&self, data: &[u8], index: &[u8]) -> io::Result<()> {
        replace(&self.file, data)?;
        replace(&self.index, index)?;
        read(&[LayerPath::Writable {
            data: self.path("blob"),
            index: self.path("index"),
        }]);
        Ok(())
    }
}

fn replace(file: &File, data: &[u8]) -> io::Result<()> {
    file.set_len(data.len() as u64)?;
    file.write_all_at(data, 0)
}

fn read(layers: &[LayerPath]) {
    let mut problem = None;
    verify(layers, &Progress::hidden(), &mut |finding| {
        if let Finding::Problem(e) = finding {
            problem.get_or_insert(e.to_string());
        }
    });
    if let Err(e) = open_and_read(layers) {
        assert!(problem.is_some(), "verify does not find: {e}");
    }
}

fn open_and_read(layers: &[LayerPath]) -> ovbd::Result<()> {
    let image = Image::open(layers)?;
    let _ = Info::new(&image).to_string();
    let mut reader = image.reader();
    let mut buffer = vec![0; WINDOW_BYTES as usize];
    for window in image.windows().take(MAX_WINDOWS) {
        let at = window * WINDOW_BYTES;
        let n = (image.bytes() - at).min(WINDOW_BYTES) as usize;
        reader.read(&mut buffer[..n], at)?;
    }
    Ok(())
}

/// Puts right digests into a damaged ZFile, so that the damage gets past them.
pub fn repair(data: &mut [u8]) {
    if data.len() < 2 * HEADER_BYTES || !Header::recognise(data) {
        return;
    }
    let trailer = data.len() - HEADER_BYTES;
    for start in [0, trailer] {
        let field = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&data[start + at..start + at + 8]);
            usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (offset, entries) = (field(40), field(48));
        let end = entries.checked_mul(4).and_then(|n| offset.checked_add(n));
        if let Some(table) = end.and_then(|end| data.get(offset..end)) {
            let crc = crc32c(0, table).to_le_bytes();
            data[start + 64..start + 68].copy_from_slice(&crc);
        }
        let block = &mut data[start..start + HEADER_BYTES];
        block[28..32].fill(0);
        let digest = crc32c(0, block).to_le_bytes();
        block[28..32].copy_from_slice(&digest);
    }
}

/// Every file of a folder of cases that is small enough, to start from.
///
/// # Errors
///
/// The system's.
pub fn corpus(folder: &Path) -> io::Result<Vec<Vec<u8>>> {
    const MAX_BYTES: u64 = 128 << 10;
    let mut files = Vec::new();
    for case in crate::find(folder)? {
        for entry in std::fs::read_dir(case)? {
            let path = entry?.path();
            let described = path.extension().is_some_and(|ext| ext == "json");
            if !described && path.metadata()?.len() <= MAX_BYTES {
                files.push(path);
            }
        }
    }
    files.sort();
    files.iter().map(std::fs::read).collect()
}
