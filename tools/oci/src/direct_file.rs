// SPDX-License-Identifier: GPL-2.0

//! A file that is written from its start to its end past the page cache, where the file system can do that. What is
//! fetched is not read again soon, and copying it into the page cache would be a third of all the work.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::fs::{fcntl_getfl, fcntl_setfl, OFlags};

/// Bytes that are written at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Direct I/O wants memory and positions that are multiples of the blocks of the disk, which are not larger anywhere.
const BLOCK_BYTES: usize = 4096;

/// A file, and what is to be written to it next.
///
/// # Invariants
///
/// - `written` is a multiple of [`BLOCK_BYTES`], and the file has so many bytes that were given to it, or more.
/// - `buffer[first..]` has `room` bytes, the first of which is at the start of a block of memory; `filled` of them are
///   those that follow.
pub(crate) struct DirectFile {
    file: File,
    written: u64,
    buffer: Vec<u8>,
    first: usize,
    room: usize,
    filled: usize,
    /// Some of these are not in the file.
    is_dirty: bool,
    /// It has been tried to switch direct I/O on.
    is_tried: bool,
    is_direct: bool,
}

impl DirectFile {
    /// Goes on at byte `at` of a file, which has so many, and will have `size` at most.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(file: File, at: u64, size: u64) -> io::Result<Self> {
        let room = usize::try_from(size)
            .unwrap_or(BUFFER_BYTES)
            // There must be room to see that there are more.
            .saturating_add(1)
            .next_multiple_of(BLOCK_BYTES)
            .min(BUFFER_BYTES);
        let mut buffer = vec![0; room + BLOCK_BYTES];
        let first = buffer.as_ptr().align_offset(BLOCK_BYTES).min(BLOCK_BYTES);
        let filled = (at % BLOCK_BYTES as u64) as usize;
        let written = at - filled as u64;
        file.read_exact_at(&mut buffer[first..first + filled], written)?;
        // INVARIANT: `written` is rounded down, and the rest was read.
        Ok(Self {
            file,
            written,
            buffer,
            first,
            room,
            filled,
            is_dirty: false,
            is_tried: false,
            is_direct: false,
        })
    }

    /// The file itself. What was given last may not be in it yet.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes that were given.
    pub fn position(&self) -> u64 {
        self.written + self.filled as u64
    }

    /// Where to put the next bytes, one at least.
    ///
    /// # Errors
    ///
    /// The system's, of writing those before. They stay, and can be written later.
    pub fn space(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.room {
            self.switch();
            self.flush()?;
        }
        Ok(&mut self.buffer[self.first + self.filled..self.first + self.room])
    }

    /// The first `count` bytes of the space are given now; returns them.
    pub fn advance(&mut self, count: usize) -> &[u8] {
        let before = self.filled;
        self.filled = (before + count).min(self.room);
        self.is_dirty = true;
        &self.buffer[self.first + before..self.first + self.filled]
    }

    /// Switches direct I/O on, once: not everywhere it can be.
    fn switch(&mut self) {
        if !std::mem::replace(&mut self.is_tried, true) {
            self.is_direct = self.set_direct(true).is_ok();
        }
    }

    fn set_direct(&self, direct: bool) -> io::Result<()> {
        let mut flags = fcntl_getfl(&self.file)?;
        flags.set(OFlags::DIRECT, direct);
        Ok(fcntl_setfl(&self.file, flags)?)
    }

    /// Writes all that was given. Only whole blocks are not written again when more is given.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn flush(&mut self) -> io::Result<()> {
        if !self.is_dirty {
            return Ok(());
        }
        let whole = self.filled / BLOCK_BYTES * BLOCK_BYTES;
        let blocks = &self.buffer[self.first..self.first + whole];
        if whole > 0 {
            match self.file.write_all_at(blocks, self.written) {
                // Blocks that are larger after all, say.
                Err(error) if self.is_direct && error.kind() == io::ErrorKind::InvalidInput => {
                    self.set_direct(false)?;
                    self.is_direct = false;
                    self.file.write_all_at(blocks, self.written)?;
                }
                result => result?,
            }
        }
        let (start, end) = (self.first + whole, self.first + self.filled);
        // INVARIANT: `whole` bytes are in the file; the rest moves to the start.
        self.written += whole as u64;
        self.filled -= whole;
        self.buffer.copy_within(start..end, self.first);
        if self.filled > 0 {
            if std::mem::take(&mut self.is_direct) {
                self.set_direct(false)?;
                self.is_tried = false;
            }
            let rest = &self.buffer[self.first..self.first + self.filled];
            self.file.write_all_at(rest, self.written)?;
        }
        self.is_dirty = false;
        Ok(())
    }

    /// Forgets what was given.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        (self.written, self.filled, self.is_dirty) = (0, 0, false);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_pieces_and_breaks_make_the_file() {
        let content: Vec<u8> = (0..700_001_u32).flat_map(u32::to_le_bytes).collect();
        for (piece, size) in [
            (1 << 20, 2_800_004),
            (4097, 2_800_004),
            (100_000, 5000),
            (7, 6),
        ] {
            let content = &content[..size];
            let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
            let open = |at| {
                let file = File::options().read(true).write(true).open(file.path());
                DirectFile::new(file.unwrap(), at, size as u64).unwrap()
            };
            let mut out = open(0);
            while (out.position() as usize) < size {
                let at = out.position() as usize;
                let space = out.space().unwrap();
                let count = space.len().min(piece).min(size - at);
                assert!(count > 0);
                space[..count].copy_from_slice(&content[at..at + count]);
                assert_eq!(out.advance(count), &content[at..at + count]);
                if at % 5 == 0 {
                    out.flush().unwrap();
                    let at = out.position();
                    drop(out);
                    out = open(at);
                    assert_eq!(out.position(), at);
                }
            }
            assert!(!out.space().unwrap().is_empty(), "room for one too many");
            out.flush().unwrap();
            assert!(std::fs::read(file.path()).unwrap() == content);
            out.clear().unwrap();
            assert_eq!(
                (out.position(), out.file().metadata().unwrap().len()),
                (0, 0)
            );
        }
    }
}
