// SPDX-License-Identifier: GPL-2.0

//! What the tests share: images with a bit of everything, and the library called as the command does.

#![allow(dead_code, missing_docs)]

pub mod gzips;
pub mod programs;
pub mod tars;
pub mod turbo;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::{
    build::{build, Options},
    export,
    layer::LayerPath,
    parents::Parents,
    stack::WINDOW_BYTES,
    stack_or_zfile::StackOrZfile,
    verify::{verify, Finding},
    Result,
};

/// A generator of numbers that is the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit.max(1)
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    /// Bytes that compress by about half.
    pub fn text(&mut self, n: usize) -> Vec<u8> {
        let words: Vec<Vec<u8>> = (0..32).map(|_| self.bytes(7)).collect();
        let mut out = Vec::with_capacity(n + 8);
        while out.len() < n {
            out.extend_from_slice(&words[self.below(32) as usize]);
            out.push(self.next() as u8);
        }
        out.truncate(n);
        out
    }
}

/// A sparse image with text, noise and zeros.
pub fn raw_image(path: &Path, bytes: u64, seed: u64) {
    let file = File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    change(path, seed);
}

/// Overwrites some parts of an image with text, noise and zeros.
pub fn change(path: &Path, seed: u64) {
    let mut random = Random::new(seed);
    let file = File::options().write(true).open(path).unwrap();
    let bytes = file.metadata().unwrap().len();
    for _ in 0..12 {
        let at = random.below(bytes);
        let n = (random.below(150_000) + 1).min(bytes - at) as usize;
        let data = match random.below(4) {
            0 => vec![0; n],
            1 => random.bytes(n),
            _ => random.text(n),
        };
        file.write_all_at(&data, at).unwrap();
    }
}

/// For layers that are not compressed.
pub fn plain() -> Options {
    Options {
        zfile: None,
        ..Options::default()
    }
}

/// For ZFiles, also such as only our own readers can read.
pub fn zfile(algorithm: Algorithm, block_bytes: u32) -> Options {
    Options {
        zfile: Some(ZfileOptions {
            block_bytes,
            algorithm,
            block_crc: true,
        }),
        own_reader_only: true,
        ..Options::default()
    }
}

pub fn layers(paths: &[&Path]) -> Vec<LayerPath> {
    paths.iter().map(|path| LayerPath::from(*path)).collect()
}

pub fn make(source: &Path, out: &Path, options: &Options) {
    build(source, out, options, &()).unwrap();
}

pub fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(work)
}

/// Opens and reads all of a stack, to memory. Of a device that damage made huge, only the windows with
/// data are read, and nothing is returned.
pub fn content(layers: &[LayerPath]) -> Result<Vec<u8>> {
    let image = StackOrZfile::open(layers, Parents::Ignored)?;
    if image.bytes() > 64 << 20 {
        let mut reader = image.reader();
        let mut buffer = vec![0; WINDOW_BYTES as usize];
        for window in image.windows() {
            let at = window * WINDOW_BYTES;
            let n = (image.bytes() - at).min(WINDOW_BYTES) as usize;
            reader.read(&mut buffer[..n], at)?;
        }
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    let name = Path::new("memory");
    export::to_writer(&image, &mut out, name, &())?;
    Ok(out)
}

/// Filled up with zeros as a device is.
pub fn whole_sectors(mut content: Vec<u8>) -> Vec<u8> {
    content.resize(content.len().next_multiple_of(512), 0);
    content
}

pub fn problems(layers: &[LayerPath]) -> Vec<String> {
    let mut problems = Vec::new();
    verify(layers, Parents::Ignored, &(), &mut |finding| {
        if let Finding::Problem(e) = finding {
            problems.push(e.to_string());
        }
    });
    problems
}

/// The fixtures, if they are there.
pub fn fixtures() -> Option<PathBuf> {
    let folder = std::env::var_os("OVBD_FIXTURES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures"),
        PathBuf::from,
    );
    folder.exists().then_some(folder)
}

/// Names in a folder.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
