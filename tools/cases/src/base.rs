// SPDX-License-Identifier: GPL-2.0

//! The sound images that are damaged: a few that are built here, so that there always are some, and the small
//! ones of a folder of cases.

use std::{error::Error, fs, path::Path};

use ovbd_image::zfile::{self, Algorithm, Totals, BLOCK_SEED, HEADER_BYTES};
use ovbd_layers::{
    blob::{Blob, Content},
    build::{build, Options},
    codec::Compressor,
    crc::crc32c,
    layer::LayerPath,
    zfile::Cursor,
};
use tempfile::TempDir;

use crate::{
    case::{Case, Expect},
    random::Random,
};

/// Bytes of all layers of a case at most.
const MAX_BYTES: u64 = 256 << 10;

/// Layers of a base at most.
pub const MAX_LAYERS: usize = 4;

/// Result of making bases.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A sound stack of layers, or a single ZFile.
pub struct Base {
    /// What it is called.
    pub name: String,
    /// Bottom first.
    pub layers: Vec<BaseLayer>,
}

/// A layer of a base.
pub struct BaseLayer {
    /// The bytes of the file.
    pub blob: Vec<u8>,
    /// What is in it, if it is a ZFile.
    pub inner: Option<Inner>,
}

/// The content of a ZFile, and how to make it again.
pub struct Inner {
    /// The content.
    pub content: Vec<u8>,
    options: zfile::Options,
}

impl Base {
    /// Reads the files of a base.
    ///
    /// # Errors
    ///
    /// A file that is not sound.
    fn read(name: &str, paths: &[impl AsRef<Path>]) -> Result<Self> {
        let layers = paths.iter().map(|path| BaseLayer::read(path.as_ref()));
        Ok(Self {
            name: name.to_owned(),
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// A number that differs from base to base: FNV-1a of the name.
    pub fn seed(&self) -> u64 {
        self.name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        })
    }
}

impl BaseLayer {
    fn read(path: &Path) -> Result<Self> {
        let inner = match Blob::open(path)?.content {
            Content::Plain(_) | Content::Joined(_) => None,
            Content::Zfile(file) => {
                let mut content = vec![0; file.geometry().original_bytes() as usize];
                file.read(&mut Cursor::default(), &mut content, 0)?;
                Some(Inner {
                    content,
                    options: file.options(),
                })
            }
        };
        let blob = fs::read(path)?;
        Ok(Self { blob, inner })
    }
}

impl Inner {
    /// A ZFile around other content.
    pub fn wrap(&self, content: &[u8]) -> Vec<u8> {
        let mut compressor = Compressor::new(self.options.algorithm, None).expect("a compressor");
        let block_bytes = self.options.block_bytes as usize;
        let mut buffer = vec![0; Compressor::bound(block_bytes)];
        let mut file = vec![0; HEADER_BYTES];
        let mut table = Vec::new();
        for block in content.chunks(block_bytes) {
            let start = file.len();
            let n = compressor
                .compress(block, &mut buffer)
                .expect("room for a block");
            file.extend_from_slice(&buffer[..n]);
            if self.options.block_crc {
                file.extend_from_slice(&crc32c(BLOCK_SEED, &buffer[..n]).to_le_bytes());
            }
            table.extend_from_slice(&((file.len() - start) as u32).to_le_bytes());
        }
        let totals = Totals {
            original_bytes: content.len() as u64,
            index_offset: file.len() as u64,
            blocks: (table.len() / zfile::ENTRY_BYTES) as u64,
            index_crc: crc32c(0, &table),
        };
        file.extend_from_slice(&table);
        file.extend_from_slice(&self.options.trailer(&totals, crc32c));
        file[..HEADER_BYTES].copy_from_slice(&self.options.header(&totals, crc32c));
        file
    }
}

/// All bases: those that are built, and those of `folder` if it exists.
///
/// # Errors
///
/// The system's, and cases that are not as their description says.
pub fn bases(folder: &Path) -> Result<Vec<Base>> {
    let mut bases = built()?;
    if folder.exists() {
        for case in crate::find(folder)? {
            bases.extend(of_case(&case)?);
        }
    }
    Ok(bases)
}

/// A case as a base, if it is sound, small, and of a kind that the targets read.
fn of_case(folder: &Path) -> Result<Option<Base>> {
    let case: Case = serde_json::from_str(&fs::read_to_string(folder.join("case.json"))?)?;
    let sound = matches!(case.expect, Expect::Ok | Expect::OriginalFails);
    let files: Option<Vec<_>> = case
        .layers
        .iter()
        .filter(|layer| layer.stored_as.is_none())
        .map(|layer| Some(folder.join(layer.file.as_ref()?)))
        .collect();
    let fits = |files: &Vec<_>| files.len() == case.layers.len() && files.len() <= MAX_LAYERS;
    let Some(files) = files.filter(|files| sound && fits(files)) else {
        return Ok(None);
    };
    if case.kind != "image" && case.kind != "zfile" {
        return Ok(None);
    }
    let bytes = files
        .iter()
        .map(|file| Ok(fs::metadata(file)?.len()))
        .sum::<std::io::Result<u64>>()?;
    if bytes > MAX_BYTES {
        return Ok(None);
    }
    for file in &files {
        // The tar wrapper is a matter of the tools alone.
        if Blob::open(file)?.tar.is_some() {
            return Ok(None);
        }
    }
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    Base::read(&name, &files).map(Some)
}

/// Bytes of the content of the bases that are built.
const BUILT_BYTES: usize = 96 << 10;

/// Content that compresses in part, for image `number`: neighbours differ in some blocks, and have holes.
fn content(number: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(BUILT_BYTES);
    for block in 0..BUILT_BYTES / 4096 {
        let mut random = Random::new(block as u64 * 7 + u64::from(block as u64 % 4 == number));
        let start = data.len();
        match random.below(4) {
            0 => {}
            1 => data.extend((0..4096).map(|_| random.bits() as u8)),
            _ => {
                while data.len() < start + 4096 {
                    let word = random.bits().to_le_bytes();
                    let times = random.below(40);
                    data.extend(word.iter().cycle().take(times));
                }
            }
        }
        data.resize(start + 4096, 0);
    }
    data
}

/// The bases that need no folder.
///
/// # Errors
///
/// The system's.
pub fn built() -> Result<Vec<Base>> {
    let folder = TempDir::new()?;
    let at = |name: &str| folder.path().join(name);
    for number in 0..3 {
        fs::write(at(&format!("{number}.raw")), content(number))?;
    }
    fs::write(at("odd.raw"), &content(0)[..BUILT_BYTES - 1337])?;
    let zfile = |algorithm, block_bytes, block_crc| zfile::Options {
        block_bytes,
        algorithm,
        block_crc,
    };
    let mut bases = Vec::new();
    let mut make = |name: &str, raws: &[&str], raw: bool, zfile: Option<zfile::Options>| {
        let mut layers = Vec::new();
        for source in raws {
            let path = at(&format!("{name}-{}", layers.len()));
            let base = layers
                .iter()
                .map(|p: &std::path::PathBuf| LayerPath::Sealed(p.clone()));
            let options = Options {
                base: base.collect(),
                raw,
                zfile,
                own_reader_only: true,
                ..Options::default()
            };
            build(&at(source), &path, &options, &())?;
            layers.push(path);
        }
        bases.push(Base::read(name, &layers)?);
        Ok::<(), Box<dyn Error>>(())
    };
    let (lz4, zstd) = (Algorithm::Lz4, Algorithm::Zstd);
    make(
        "built-raw-lz4-512-no-crc",
        &["odd.raw"],
        true,
        Some(zfile(lz4, 512, false)),
    )?;
    make(
        "built-raw-lz4-4k",
        &["odd.raw"],
        true,
        Some(zfile(lz4, 4096, true)),
    )?;
    make(
        "built-raw-lz4-64k-no-crc",
        &["odd.raw"],
        true,
        Some(zfile(lz4, 65536, false)),
    )?;
    make(
        "built-raw-zstd-16k-no-crc",
        &["odd.raw"],
        true,
        Some(zfile(zstd, 16384, false)),
    )?;
    let three = &["0.raw", "1.raw", "2.raw"];
    make("built-plain", &three[..1], false, None)?;
    make("built-three-plain", three, false, None)?;
    make(
        "built-three-lz4-4k",
        three,
        false,
        Some(zfile(lz4, 4096, true)),
    )?;
    make(
        "built-two-zstd-4k",
        &three[..2],
        false,
        Some(zfile(zstd, 4096, true)),
    )?;
    Ok(bases)
}
