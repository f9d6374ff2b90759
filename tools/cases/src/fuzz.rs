// SPDX-License-Identifier: GPL-2.0

//! What the fuzzers do with a file: errors are fine, panics are bugs.
//!
//! A file also must not pass `verify` and then fail to be read.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use ovbd_layers::{
    info::Info,
    layer::LayerPath,
    parents::Parents,
    stack::WINDOW_BYTES,
    stack_or_zfile::StackOrZfile,
    verify::{verify, Finding},
};
use tempfile::TempDir;

use crate::base::MAX_LAYERS;

/// Windows that are read of an image, so that a huge one takes no longer than others.
const MAX_WINDOWS: usize = 8;

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
        read(&paths);
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
        read(&[LayerPath::Writable {
            data: self.path("0"),
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
    verify(layers, Parents::Ignored, &(), &mut |finding| {
        if let Finding::Problem(e) = finding {
            problem.get_or_insert(e.to_string());
        }
    });
    if let Err(e) = open_and_read(layers) {
        assert!(problem.is_some(), "verify does not find: {e}");
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
