// SPDX-License-Identifier: GPL-2.0

//! Test cases: a folder of layers with a `case.json` that says what reading them must give.
//!
//! A case passes when `verify`, `export` and random reads agree with it: the same bytes, an error where one
//! is expected and only there, nothing left behind by an export that fails.

pub mod base;
pub mod case;
pub mod documents;
pub mod fuzz;
pub mod gzip_indexes;
pub mod lz4;
pub mod memory;
pub mod mutate;
pub mod random;
pub mod repair;
pub mod tars;

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use ovbd_layers::{
    build::Options,
    export,
    layer::LayerPath,
    output::Rules,
    parents::Parents,
    squash::squash,
    stack_or_zfile::StackOrZfile,
    turbo::Target,
    verify::{verify, Finding},
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use case::{Case, Expect, LayerFile, Place, Probe};

/// Result of a step of a case; an error is how the case differs.
type Checked<T = ()> = Result<T, String>;

/// Bytes of the reads whose failure a case describes.
const READ_BYTES: u64 = 4096;

/// The folders of cases in `folder`, sorted; `folder` itself where it is a case.
///
/// # Errors
///
/// The system's.
pub fn find(folder: &Path) -> io::Result<Vec<PathBuf>> {
    if folder.join("case.json").exists() {
        return Ok(vec![folder.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.join("case.json").exists() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Runs the case in `folder`.
///
/// # Errors
///
/// How the case differs from what is expected.
pub fn run(folder: &Path) -> Checked {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let scratch = TempDir::new().map_err(|e| text(&e))?;
    let json = fs::read_to_string(folder.join("case.json")).map_err(|e| text(&e))?;
    let case: Case = serde_json::from_str(&json).map_err(|e| text(&e))?;
    let layers = case
        .layers
        .iter()
        .enumerate()
        .map(|(i, layer)| layer_path(folder, layer, &scratch.path().join(format!("layer{i}"))))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|e| text(&e))?;
    let run = Run {
        case: &case,
        layers: &layers,
        scratch: scratch.path(),
    };
    if case.kind == "turbo-image" {
        // Without its targets it is known for what it is.
        let bare: Vec<LayerPath> = layers.iter().map(|path| path.data().into()).collect();
        let bare = Run {
            layers: &bare,
            ..run
        };
        bare.refused_as("TurboOCI")?;
    }
    match case.expect {
        Expect::Ok | Expect::OriginalFails | Expect::OriginalWrong => run.reads_right(),
        Expect::Error => run.fails(),
        Expect::UndetectedSame | Expect::UndetectedDifferent => run.right_or_refused(),
    }
}

/// The path of a layer's files, unpacked to `scratch` where it is stored compressed.
fn layer_path(folder: &Path, layer: &LayerFile, scratch: &Path) -> io::Result<LayerPath> {
    if let (Some(data), Some(index)) = (&layer.data, &layer.index) {
        return Ok(LayerPath::Writable {
            data: folder.join(data),
            index: folder.join(index),
        });
    }
    let blob = match &layer.stored_as {
        Some(packed) => {
            let mut packed = flate2::read::GzDecoder::new(File::open(folder.join(packed))?);
            io::copy(&mut packed, &mut File::create(scratch)?)?;
            scratch.to_owned()
        }
        None => folder.join(layer.file.as_deref().unwrap_or("")),
    };
    match &layer.target {
        None => Ok(LayerPath::Sealed(blob)),
        Some(target) => {
            let target = Target::open(&folder.join(target), &()).map_err(io::Error::other)?;
            Ok(LayerPath::Joined {
                blob,
                targets: vec![target],
            })
        }
    }
}

#[derive(Clone, Copy)]
struct Run<'a> {
    case: &'a Case,
    layers: &'a [LayerPath],
    scratch: &'a Path,
}

impl Run<'_> {
    fn open(&self) -> ovbd_layers::Result<StackOrZfile> {
        StackOrZfile::open(self.layers, Parents::Ignored)
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        verify(self.layers, Parents::Ignored, &(), &mut |finding| {
            if let Finding::Problem(e) = finding {
                problems.push(e.to_string());
            }
        });
        problems
    }

    fn reads_right(&self) -> Checked {
        if let Some(problem) = self.problems().first() {
            return Err(format!("verify finds a problem: {problem}"));
        }
        let image = self.open().map_err(|e| format!("does not open: {e}"))?;
        if image.bytes() != self.case.virtual_size {
            return Err(format!("virtual size is {}", image.bytes()));
        }
        self.probes(&image)?;
        let out = self.scratch.join("out");
        export::to_file(&image, &out, Rules::default(), &())
            .map_err(|e| format!("does not export: {e}"))?;
        let mut file = File::open(&out).map_err(|e| e.to_string())?;
        let size = file.metadata().map_err(|e| e.to_string())?.len();
        if size != self.case.virtual_size {
            return Err(format!("export gives {size} bytes"));
        }
        for probe in &self.case.probes {
            file.seek(SeekFrom::Start(probe.offset))
                .map_err(|e| e.to_string())?;
            let hash = hash(&mut (&file).take(probe.length))?;
            compare(probe, &hash, "export")?;
        }
        if let Some(expected) = &self.case.sha256 {
            file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
            let hash = hash(&mut file)?;
            if hash != *expected {
                return Err(format!("export has SHA-256 {hash}"));
            }
        }
        self.squashed_reads_right(&image)
    }

    /// All layers as one read as before.
    fn squashed_reads_right(&self, image: &StackOrZfile) -> Checked {
        if let StackOrZfile::Zfile(_) = image {
            return Ok(());
        }
        let out = self.scratch.join("squashed");
        let options = Options {
            base: self.layers.to_vec(),
            parents: Parents::Ignored,
            own_reader_only: true,
            ..Options::default()
        };
        squash(&out, &options, true, &()).map_err(|e| format!("is not squashed: {e}"))?;
        let layers = [LayerPath::Sealed(out)];
        let squashed = StackOrZfile::open(&layers, Parents::Ignored)
            .map_err(|e| format!("squashed, does not open: {e}"))?;
        let whole = self.case.virtual_size.next_multiple_of(512);
        if squashed.bytes() != whole {
            return Err(format!("squashed, virtual size is {}", squashed.bytes()));
        }
        self.probes(&squashed)
            .map_err(|what| format!("squashed: {what}"))
    }

    fn probes(&self, image: &StackOrZfile) -> Checked {
        let mut reader = image.reader();
        for probe in &self.case.probes {
            let mut buffer = vec![0; probe.length as usize];
            reader
                .read(&mut buffer, probe.offset)
                .map_err(|e| format!("does not read: {e}"))?;
            compare(probe, &hex(&Sha256::digest(&buffer)), "read")?;
        }
        Ok(())
    }

    /// Exports, expecting an error; returns it.
    fn export_fails(&self) -> Checked<String> {
        let folder = self.scratch.join("failed");
        fs::create_dir(&folder).map_err(|e| e.to_string())?;
        let error = match self.open() {
            Err(e) => e,
            Ok(image) => {
                let out = folder.join("out");
                match export::to_file(&image, &out, Rules::default(), &()) {
                    Err(e) => e,
                    Ok(()) => return Err("export succeeds".to_owned()),
                }
            }
        };
        match fs::read_dir(&folder).map_err(|e| e.to_string())?.count() {
            0 => Ok(error.to_string()),
            _ => Err("a failed export left something behind".to_owned()),
        }
    }

    fn fails(&self) -> Checked {
        if self.problems().is_empty() {
            return Err("verify finds nothing".to_owned());
        }
        self.export_fails()?;
        let Some(error) = &self.case.error else {
            return Ok(());
        };
        match (error.place, self.open()) {
            (Place::Open, Err(_)) => Ok(()),
            (Place::Open, Ok(_)) => Err("opens".to_owned()),
            (Place::Read, Err(e)) => Err(format!("does not open: {e}")),
            (Place::Read, Ok(image)) => {
                let failed = failed_ranges(&image);
                match failed == error.failed_4k_ranges {
                    true => Ok(()),
                    false => Err(format!("reads fail at {failed:?}")),
                }
            }
        }
    }

    fn right_or_refused(&self) -> Checked {
        let Ok(image) = self.open() else {
            return self.export_fails().map(|_| ());
        };
        let out = self.scratch.join("out");
        if export::to_file(&image, &out, Rules::default(), &()).is_err() {
            return Ok(());
        }
        let mut file = File::open(&out).map_err(|e| e.to_string())?;
        let hash = Some(hash(&mut file)?);
        match hash == self.case.sha256 || hash == self.case.sha256_intact {
            true => Ok(()),
            false => Err(format!("export has SHA-256 {hash:?}")),
        }
    }

    fn refused_as(&self, what: &str) -> Checked {
        let error = self.export_fails()?;
        let problems = self.problems();
        match error.contains(what) && problems.iter().any(|p| p.contains(what)) {
            true => Ok(()),
            false => Err(format!("is refused as {error:?}, verify says {problems:?}")),
        }
    }
}

/// The ranges of the device of which reads of 4 KiB fail.
fn failed_ranges(image: &StackOrZfile) -> Vec<(u64, u64)> {
    let mut reader = image.reader();
    let mut failed: Vec<(u64, u64)> = Vec::new();
    let mut buffer = [0; READ_BYTES as usize];
    for at in (0..image.bytes()).step_by(READ_BYTES as usize) {
        let end = image.bytes().min(at + READ_BYTES);
        if reader.read(&mut buffer[..(end - at) as usize], at).is_ok() {
            continue;
        }
        match failed.last_mut() {
            Some((_, last)) if *last == at => *last = end,
            _ => failed.push((at, end)),
        }
    }
    failed
}

fn compare(probe: &Probe, hash: &str, what: &str) -> Checked {
    match &probe.sha256 {
        Some(expected) if expected != hash => Err(format!(
            "{what} of {} bytes at byte {} has SHA-256 {hash}",
            probe.length, probe.offset
        )),
        _ => Ok(()),
    }
}

fn hash(reader: &mut dyn Read) -> Checked<String> {
    let mut hasher = Sha256::new();
    io::copy(reader, &mut hasher).map_err(|e| e.to_string())?;
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
