// SPDX-License-Identifier: GPL-2.0

//! Checking every checksum, bound and invariant of a stack, and listing all that is wrong.
//!
//! What is read is checked as every reader checks it. Beyond that, all that the format fixes is compared: header with
//! trailer, the length of the file, and what only fills up. A layer without checksums can be checked no further: its
//! content is not verified, and the verdict says so.

mod lsmt;
mod tar;
mod zfile;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    blob::{unwrap_tar, Blob, Content},
    error::{Error, Place, Result},
    file_range::FileRange,
    joined::Joined,
    layer::{Layer, LayerPath},
    parents::Parents,
    report::Report,
    stack::{check_count, Stack},
    turbo::Target,
    zeros::is_zero,
    zfile::Zfile,
};

/// Findings of one kind in one file that are listed; others are counted.
const LISTED: u64 = 20;

/// Bytes that are looked at at a time.
const LOOK_BYTES: usize = 64 << 10;

/// Something worth telling about a stack.
#[derive(Debug)]
pub enum Finding {
    /// Something is wrong.
    Problem(Error),
    /// Something is unusual, but everything reads as it should.
    Warning(Error),
}

/// What can be said of a stack in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing is wrong.
    Sound,
    /// Something is wrong.
    Damaged,
    /// Nothing is wrong with what could be read, but not all could.
    Unreadable,
}

/// What was checked and found.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// In a word.
    pub state: State,
    /// Layers that were looked at.
    pub layers: usize,
    /// Blocks whose checksum or decompression was checked.
    pub blocks: u64,
    /// Index entries that were checked.
    pub entries: u64,
    /// Things that are wrong.
    pub problems: u64,
    /// Things that could not be read.
    pub unreadable: u64,
    /// Files whose content has no checksums: whether it changed cannot be told.
    pub unverified: Vec<PathBuf>,
}

impl Verdict {
    /// Counts something that is wrong.
    fn count(&mut self, error: &Error) {
        match error.io_error() {
            Some(_) => self.unreadable += 1,
            None => self.problems += 1,
        }
    }

    /// Says in a word what was counted.
    fn conclude(&mut self) {
        self.state = match (self.problems, self.unreadable) {
            (0, 0) => State::Sound,
            (0, _) => State::Unreadable,
            _ => State::Damaged,
        };
    }

    /// Adds something that was found beside what [`verify`] looks for, and tells it to `sink`.
    pub fn add(&mut self, finding: Finding, sink: &mut dyn FnMut(Finding)) {
        if let Finding::Problem(error) = &finding {
            self.count(error);
            self.conclude();
        }
        sink(finding);
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |n: u64, what: &str| match n {
            1 => format!("1 {what}"),
            n => format!("{n} {what}s"),
        };
        let layers = count(self.layers as u64, "layer");
        match self.state {
            State::Sound => write!(f, "{layers} sound")?,
            State::Damaged => write!(f, "{layers} with {}", count(self.problems, "problem"))?,
            State::Unreadable => write!(f, "{layers}, not all of it readable")?,
        }
        let entries = match self.entries {
            1 => "1 index entry".to_owned(),
            n => format!("{n} index entries"),
        };
        write!(f, ": {}, {entries}", count(self.blocks, "compressed block"))?;
        match self.unverified.len() as u64 {
            0 => Ok(()),
            n => write!(
                f,
                "; no checksums in {}: content not verified",
                count(n, "layer")
            ),
        }
    }
}

/// Collects what is found.
struct Findings<'a> {
    sink: &'a mut dyn FnMut(Finding),
    verdict: Verdict,
    /// How often each thing was found in each file.
    repeated: HashMap<(PathBuf, String), u64>,
}

impl Findings<'_> {
    fn problem(&mut self, error: Error) {
        self.verdict.count(&error);
        let key = (error.path().to_owned(), error.what().to_owned());
        let count = self.repeated.entry(key).or_default();
        *count += 1;
        if *count <= LISTED {
            (self.sink)(Finding::Problem(error));
        }
    }

    fn warning(&mut self, error: Error) {
        (self.sink)(Finding::Warning(error));
    }

    /// The value, or `None` after the error was noted.
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.problem(error)).ok()
    }

    /// Says how much was not listed.
    fn finish(mut self) -> Verdict {
        let mut more: Vec<_> = self
            .repeated
            .drain()
            .filter(|(_, count)| *count > LISTED)
            .collect();
        more.sort();
        for ((path, what), count) in more {
            let what = format!("{what}: {} more of these", count - LISTED);
            (self.sink)(Finding::Problem(Error::new(&path, what)));
        }
        self.verdict.conclude();
        self.verdict
    }
}

/// Checks the layers `paths`, bottom first, and their stack, and tells everything that is found to `sink`.
///
/// A single ZFile may hold anything; everything else must be layers.
pub fn verify(
    paths: &[LayerPath],
    parents: Parents,
    report: &dyn Report,
    sink: &mut dyn FnMut(Finding),
) -> Verdict {
    let mut findings = Findings {
        sink,
        verdict: Verdict {
            state: State::Sound,
            layers: paths.len(),
            blocks: 0,
            entries: 0,
            problems: 0,
            unreadable: 0,
            unverified: Vec::new(),
        },
        repeated: HashMap::new(),
    };
    findings.note(check_count(paths));
    for path in paths {
        match path {
            LayerPath::Sealed(path) => sealed(path, &[], paths.len() == 1, report, &mut findings),
            // A device whose blob is still being fetched would be read by whoever fetches it.
            LayerPath::Part { path, .. } => {
                findings.verdict.unverified.push(path.clone());
            }
            LayerPath::Joined { blob, targets } => {
                sealed(blob, targets, false, report, &mut findings);
                let paths = targets.iter().map(|target| target.path().to_owned());
                findings.verdict.unverified.extend(paths);
            }
            LayerPath::Writable { data, index } => {
                lsmt::check_pair(data, index, report, &mut findings);
                findings.verdict.unverified.push(data.clone());
            }
        }
    }
    // Only a stack whose layers are right can be wrong as a stack.
    if findings.verdict.problems + findings.verdict.unreadable == 0 {
        stack(paths, parents, &mut findings);
    }
    findings.finish()
}

fn stack(paths: &[LayerPath], parents: Parents, findings: &mut Findings<'_>) {
    if let [LayerPath::Sealed(path)] = paths {
        match Blob::open(path).and_then(|opened| opened.is_layer()) {
            Ok(true) => {}
            // A ZFile around something else; there is no stack.
            Ok(false) => return,
            Err(e) => return findings.problem(e),
        }
    }
    let Some(stack) = findings.note(Stack::open(paths, parents)) else {
        return;
    };
    if stack
        .layers()
        .iter()
        .all(|layer| layer.virtual_bytes() == 0)
    {
        let top = stack.top().map_or(Path::new(""), Layer::path);
        findings.warning(Error::new(top, "no layer records a virtual size"));
    }
}

/// Checks the blob at `path`, of a layer with its `targets`; `alone` is whether it may be a ZFile around anything.
fn sealed(
    path: &Path,
    targets: &[Target],
    alone: bool,
    report: &dyn Report,
    findings: &mut Findings<'_>,
) {
    let Some(file) = findings.note(FileRange::open(path)) else {
        return;
    };
    let Some((member, blob)) = findings.note(unwrap_tar(&file)) else {
        return;
    };
    // A device is as large as it is: what follows the blob means nothing.
    let is_device = file
        .file()
        .metadata()
        .is_ok_and(|found| found.file_type().is_block_device());
    if let Some(member) = member {
        tar::check_end(&file, member, is_device, findings);
    }
    let Some(first) = findings.note(blob.first(512)) else {
        return;
    };
    if !Zfile::recognise(&first, blob.bytes()) {
        findings.verdict.unverified.push(path.to_owned());
        check_layer(Content::Plain(blob), targets, &HashSet::new(), findings);
        report.add(file.bytes());
        return;
    }
    match Zfile::open(blob.clone()) {
        Ok(zfile) => {
            let may_be_longer = is_device && member.is_none();
            zfile::check_ends(&zfile, may_be_longer, findings);
            if !zfile.geometry().has_block_crc() {
                findings.verdict.unverified.push(path.to_owned());
            }
            let bad = zfile::check_blocks(&zfile, report, findings);
            let content = Content::Zfile(Box::new(zfile));
            let opened = Blob {
                file_bytes: file.bytes(),
                tar: None,
                content,
            };
            // A content that cannot be recognised because its first block is bad was noted already.
            match opened.is_layer() {
                Ok(false) if alone => {}
                Ok(_) => check_layer(opened.content, targets, &bad, findings),
                Err(e) if is_noted(&e, &bad) => {}
                Err(e) => findings.problem(e),
            }
        }
        Err(error) => {
            let header_is_bad = error
                .place()
                .is_some_and(|at| matches!(at, Place::File(at) if at < blob.start() + 512));
            findings.problem(error);
            if header_is_bad {
                zfile::check_trailer(&blob, findings);
            }
        }
    }
}

/// Checks the layer in a blob, and its `targets` where it has any; `bad` are the compressed blocks that were found.
fn check_layer(
    content: Content,
    targets: &[Target],
    bad: &HashSet<u64>,
    findings: &mut Findings<'_>,
) {
    let content = match targets {
        [] => content,
        targets => match Joined::open(content, targets) {
            Ok(joined) => Content::Joined(Box::new(joined)),
            Err(error) if is_noted(&error, bad) => return,
            Err(error) => return findings.problem(error),
        },
    };
    lsmt::check(&content, bad, findings);
}

fn is_noted(error: &Error, bad: &HashSet<u64>) -> bool {
    matches!(error.place(), Some(Place::File(at)) if bad.contains(&at))
}

/// Checks that the bytes `from..to`, which `read` reads, are zero; the byte of the first that is not.
fn first_non_zero(
    from: u64,
    to: u64,
    mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
) -> Result<Option<u64>> {
    let mut buffer = vec![0; to.saturating_sub(from).min(LOOK_BYTES as u64) as usize];
    let mut at = from;
    while at < to {
        let n = (to - at).min(buffer.len() as u64) as usize;
        let part = &mut buffer[..n];
        read(part, at)?;
        if !is_zero(part) {
            let inside = part.iter().position(|byte| *byte != 0);
            return Ok(Some(at + inside.unwrap_or(0) as u64));
        }
        at += n as u64;
    }
    Ok(None)
}
