// SPDX-License-Identifier: GPL-2.0

//! Any bytes as a gzip file with an index of it: errors are fine, panics are bugs.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use ovbd_image::gzip_index::{CHECKED_BYTES, HEADER_BYTES, POINT_BYTES, WINDOW_BYTES};
use ovbd_layers::{file_range::FileRange, gzip_index::GzipIndex};
use tempfile::TempDir;

/// Bytes of content at most that all of is looked at.
const MAX_CONTENT_BYTES: u64 = 1 << 20;

/// Reads inputs, in files of its own.
pub struct Checker {
    folder: TempDir,
    gzip: File,
    index: File,
    content: File,
}

impl Checker {
    /// Makes the files, in memory where the system has a place for that.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let folder = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new())?;
        let create = |name: &str| File::create(folder.path().join(name));
        Ok(Self {
            gzip: create("gzip")?,
            index: create("index")?,
            content: create("content")?,
            folder,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Reads `input`: the bytes of the index, the index, and the gzip file. What every index has is put right in it.
    ///
    /// # Errors
    ///
    /// Those of writing the files.
    pub fn check(&self, input: &[u8]) -> io::Result<()> {
        let Some((length, files)) = input.split_first_chunk() else {
            return Ok(());
        };
        let at = files.len().min(u32::from_le_bytes(*length) as usize);
        let (index, gzip) = files.split_at(at);
        let mut index = index.to_vec();
        repair(&mut index, gzip.len() as u64);
        replace(&self.index, &index)?;
        replace(&self.gzip, gzip)?;
        let opened = FileRange::open(&self.path("gzip"))
            .and_then(|gzip| GzipIndex::open(&self.path("index"), gzip));
        let Ok(opened) = opened else {
            return Ok(());
        };
        let bytes = opened.bytes().min(MAX_CONTENT_BYTES);
        let mut whole = vec![0; bytes as usize];
        if opened.read(&mut whole, 0).is_ok() && bytes == opened.bytes() {
            // What passes against the content gives the same from everywhere.
            replace(&self.content, &whole)?;
            let content = FileRange::open(&self.path("content")).map_err(io::Error::other)?;
            if opened.check(&content, &()).is_ok() {
                let mut part = vec![0; 100];
                for from in (0..whole.len().saturating_sub(100)).step_by(1777) {
                    opened
                        .read(&mut part, from as u64)
                        .expect("it was read before");
                    assert!(part == whole[from..from + 100], "other bytes at {from}");
                }
            }
        }
        let _ = opened.read(&mut [0; 64], opened.bytes() / 2);
        Ok(())
    }
}

/// Puts the fields right that are the same in every index of this size, and its checksum.
fn repair(index: &mut [u8], gzip_bytes: u64) {
    let index_bytes = index.len() as u64;
    if index.len() < HEADER_BYTES {
        return;
    }
    let mut put = |at: usize, bytes: &[u8]| index[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"ddgzidx\0\x01");
    put(17, &(WINDOW_BYTES as u32).to_le_bytes());
    put(21, &(POINT_BYTES as u32).to_le_bytes());
    put(33, &gzip_bytes.to_le_bytes());
    put(41, &index_bytes.to_le_bytes());
    let crc = ovbd_layers::crc::crc32c(0, &index[..CHECKED_BYTES]);
    index[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

fn replace(file: &File, data: &[u8]) -> io::Result<()> {
    file.set_len(data.len() as u64)?;
    file.write_all_at(data, 0)
}
