// SPDX-License-Identifier: GPL-2.0

//! What the fuzzers do with a file: errors are fine, panics are bugs.
//!
//! A file also must not pass `verify` and then fail to be read, or be squashed to another content.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_layers::{
    build::Options,
    info::Info,
    layer::LayerPath,
    parents::Parents,
    squash::squash,
    stack::{Stack, WINDOW_BYTES},
    stack_or_zfile::StackOrZfile,
    turbo::Target,
    verify::{verify, Finding},
};
use tempfile::TempDir;

use crate::{base::MAX_LAYERS, random::Random};

/// Windows that are read of an image, so that a huge one takes no longer than others.
const MAX_WINDOWS: usize = 8;

/// Bytes of the target of layers that may be TurboOCI.
const TARGET_BYTES: u64 = 300_000;

/// Files that every input is written to.
pub struct Fuzzer {
    layers: [File; MAX_LAYERS],
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
        File::create(folder.path().join("target"))?.set_len(TARGET_BYTES)?;
        Ok(Self {
            layers: [
                File::create(folder.path().join("0"))?,
                File::create(folder.path().join("1"))?,
                File::create(folder.path().join("2"))?,
                File::create(folder.path().join("3"))?,
            ],
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
        self.stack(&[data])
    }

    /// Reads blobs in any wrapper as the layers of a stack, bottom first.
    ///
    /// # Errors
    ///
    /// Those of writing the files.
    pub fn stack(&self, blobs: &[impl AsRef<[u8]>]) -> io::Result<()> {
        let mut paths = Vec::new();
        for (number, (blob, file)) in blobs.iter().zip(&self.layers).enumerate() {
            replace(file, blob.as_ref())?;
            paths.push(LayerPath::Sealed(self.path(&number.to_string())));
        }
        read(&paths, &self.path("squashed"));
        if let [LayerPath::Sealed(blob)] = &paths[..] {
            // Perhaps it points into another file, of which only the size matters.
            let target = Target::open(&self.path("target"), &()).map_err(io::Error::other)?;
            let blob = blob.clone();
            read(
                &[LayerPath::Joined {
                    blob,
                    targets: vec![target],
                }],
                &self.path("squashed"),
            );
        }
        Ok(())
    }

    /// Reads a writable pair whose index file is `index`.
    ///
    /// # Errors
    ///
    /// Those of writing the files.
    pub fn pair(&self, data: &[u8], index: &[u8]) -> io::Result<()> {
        replace(&self.layers[0], data)?;
        replace(&self.index, index)?;
        let pair = LayerPath::Writable {
            data: self.path("0"),
            index: self.path("index"),
        };
        read(&[pair], &self.path("squashed"));
        Ok(())
    }
}

fn replace(file: &File, data: &[u8]) -> io::Result<()> {
    file.set_len(data.len() as u64)?;
    file.write_all_at(data, 0)
}

/// Bytes of data at most of a stack that is squashed too.
const MAX_SQUASHED_BYTES: u64 = 4 << 20;

fn read(layers: &[LayerPath], out: &Path) {
    let mut problem = None;
    verify(layers, Parents::Ignored, &(), &mut |finding| {
        if let Finding::Problem(e) = finding {
            problem.get_or_insert(e.to_string());
        }
    });
    if let Err(e) = open_and_read(layers) {
        assert!(problem.is_some(), "verify does not find: {e}");
    } else if problem.is_none() {
        squash_and_read(layers, out);
    }
}

/// What is sound is so as one layer, and reads as before.
fn squash_and_read(layers: &[LayerPath], out: &Path) {
    let image = StackOrZfile::open(layers, Parents::Ignored).expect("it was read");
    let is_small = |stack: &Stack| {
        let sectors = stack.segments().iter().map(|one| u64::from(one.sectors()));
        sectors.sum::<u64>() * SECTOR_BYTES <= MAX_SQUASHED_BYTES
    };
    if !matches!(&image, StackOrZfile::Stack(stack) if is_small(stack)) {
        return;
    }
    let options = Options {
        base: layers.to_vec(),
        parents: Parents::Ignored,
        own_reader_only: true,
        replace: true,
        ..Options::default()
    };
    if squash(out, &options, true, &()).is_err() {
        // Data that several segments share would be there as often.
        return;
    }
    let squashed = [LayerPath::Sealed(out.to_owned())];
    let squashed = StackOrZfile::open(&squashed, Parents::Ignored).expect("it was made");
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for window in image.windows().take(MAX_WINDOWS) {
        let at = window * WINDOW_BYTES;
        let n = (image.bytes() - at).min(WINDOW_BYTES) as usize;
        old.resize(n, 0);
        new.resize(n, 0);
        image.reader().read(&mut old, at).expect("it was read");
        squashed.reader().read(&mut new, at).expect("it was made");
        assert!(old == new, "squashed, other bytes from {at} on");
    }
}

fn open_and_read(layers: &[LayerPath]) -> ovbd_layers::Result<()> {
    let image = StackOrZfile::open(layers, Parents::Ignored)?;
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

/// A mutator for libFuzzer: in half of the cases its own, `default`, else what `ours` makes of the input, also of an empty
/// one. `data` holds `size` bytes of input and has room for `max_size`. Returns the new size.
pub fn mutate(
    data: &mut [u8],
    size: usize,
    max_size: usize,
    seed: u32,
    default: fn(&mut [u8], usize, usize) -> usize,
    ours: impl FnOnce(&[u8], &mut Random) -> Vec<u8>,
) -> usize {
    let random = &mut Random::new(seed.into());
    if size > 8 && random.below(2) == 0 {
        return default(data, size, max_size);
    }
    let bytes = ours(&data[..size], random);
    let size = bytes.len().min(max_size);
    data[..size].copy_from_slice(&bytes[..size]);
    size
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lz4, mutate::mutate_blob};

    #[test]
    fn mutants_of_nothing_and_of_mutants() {
        for ours in [mutate_blob, lz4::mutate_input] {
            for room in [0, 5, 1 << 20] {
                let mut data = vec![0xaa; room + 1];
                let (mut size, mut theirs) = (0, 0);
                for seed in 0..50 {
                    let default = |data: &mut [u8], size: usize, _: usize| {
                        data[..8].copy_from_slice(b"default!");
                        size
                    };
                    size = mutate(&mut data, size, room, seed, default, ours);
                    assert!(size <= room);
                    assert_eq!(data[room], 0xaa, "beyond the room");
                    theirs += u32::from(data.starts_with(b"default!"));
                }
                assert_eq!(theirs > 0, room > 8);
            }
        }
    }
}
