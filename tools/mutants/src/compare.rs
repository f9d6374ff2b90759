// SPDX-License-Identifier: GPL-2.0

//! One image through the kernel and through the tools, layer by layer and then as a stack.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_layers::{
    blob::{Blob, Content},
    layer::LayerPath,
    parents::Parents,
    stack::Stack,
    zfile::{Cursor, Zfile},
};

use crate::device::{Buffer, Mapped, Mapper, Slot};

/// Bytes of the reads that a device is read with.
const READ_BYTES: u64 = 64 << 10;

/// Reads of one device at most; of larger ones the start, the end and what has data is read.
const MAX_READS: usize = 16;

/// What the devices of ZFiles are called.
const NAMES: [&str; 4] = ["mutant-0", "mutant-1", "mutant-2", "mutant-3"];

/// How a mutant went.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Neither accepts it.
    Refused,
    /// Both give the same bytes.
    Same,
    /// Both give the same bytes, and fail for the same sectors.
    SameErrors,
    /// They differ.
    Different(String),
}

impl Outcome {
    /// What to call it in a count.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Refused => "refused",
            Outcome::Same => "read",
            Outcome::SameErrors => "read with errors",
            Outcome::Different(_) => "different",
        }
    }
}

/// Reads mutants.
#[derive(Default)]
pub struct Reader {
    buffer: Buffer,
}

/// Either the mutant ends here, or it goes on.
type Step<T> = std::result::Result<T, Outcome>;

impl Reader {
    /// Reads the layers at `paths`, which `slots` hold too and whose bytes are `blobs`.
    pub fn compare(
        &mut self,
        paths: &[PathBuf],
        slots: &[Slot],
        blobs: &[Vec<u8>],
    ) -> Result<Outcome> {
        let mut zfiles = Vec::new();
        let mut params = format!("{}", paths.len());
        let mut errors = false;
        for (number, ((path, slot), blob)) in paths.iter().zip(slots).zip(blobs).enumerate() {
            if !Zfile::recognise(blob, blob.len() as u64) {
                params += &format!(" {} {}", slot.device, blob.len());
                continue;
            }
            let name = NAMES.get(number).context("too many layers")?;
            match self.zfile(name, path, slot, blob)? {
                Err(outcome) => return Ok(outcome),
                Ok((mapped, bytes, failed)) => {
                    params += &format!(" {} {bytes}", mapped.node);
                    zfiles.push(mapped);
                    errors |= failed;
                }
            }
        }
        let layers: Vec<LayerPath> = paths.iter().map(|p| LayerPath::Sealed(p.clone())).collect();
        let stack = Stack::open(&layers, Parents::Ignored);
        // A device has at least a sector; there is none of an empty stack.
        let sectors = stack.as_ref().map_or(1, Stack::sectors).max(1);
        let mapped = Mapper.create("mutant", sectors, "overlaybd", &params)?;
        let empty = stack.as_ref().is_ok_and(|stack| stack.virtual_bytes() == 0);
        Ok(match (stack, mapped) {
            (_, Err(_)) if empty => Outcome::Refused,
            // A ZFile that holds no layer has been read all the same.
            (Err(_), Err(_)) if errors => Outcome::SameErrors,
            (Err(_), Err(_)) if !zfiles.is_empty() => Outcome::Same,
            (Err(_), Err(_)) => Outcome::Refused,
            (Ok(stack), Ok(mapped)) => {
                let mut reader = stack.reader();
                let ranges = stack_ranges(&stack);
                let mut tool = |buffer: &mut [u8], at| reader.read(buffer, at).is_ok();
                // The device has whole sectors, and shows all that the layers hold in the last one.
                let bytes = stack.sectors() * SECTOR_BYTES;
                match self.device(&mapped, bytes, &ranges, &mut tool) {
                    Err(outcome) => outcome,
                    Ok(failed) if failed || errors => Outcome::SameErrors,
                    Ok(_) => Outcome::Same,
                }
            }
            (Ok(_), Err(refusal)) => {
                Outcome::Different(format!("the kernel refuses the stack: {refusal}"))
            }
            (Err(e), Ok(_)) => Outcome::Different(format!("only the tools refuse the stack: {e}")),
        })
    }

    /// Compares dm-zfile over a layer with the tools; returns its device, its bytes, and whether some cannot
    /// be read.
    fn zfile(
        &mut self,
        name: &'static str,
        path: &Path,
        slot: &Slot,
        blob: &[u8],
    ) -> Result<Step<(Mapped, u64, bool)>> {
        let opened = Blob::open(path);
        let bytes = match &opened {
            Ok(opened) => opened.content.bytes(),
            // Nobody knows how long the table should be; what a careless reader of the header would take.
            Err(_) => blob
                .get(56..64)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(SECTOR_BYTES, u64::from_le_bytes)
                .min(1 << 40),
        };
        let params = format!("{} {}", slot.device, blob.len());
        let mapped = Mapper.create(name, bytes.div_ceil(SECTOR_BYTES).max(1), "zfile", &params)?;
        Ok(match (opened, mapped) {
            (Ok(_), Err(_)) if bytes == 0 => Err(Outcome::Refused),
            (Err(_), Err(_)) => Err(Outcome::Refused),
            (Ok(opened), Ok(mapped)) => {
                let Content::Zfile(file) = &opened.content else {
                    return Ok(Err(Outcome::Different("the tools see no ZFile".to_owned())));
                };
                let mut cursor = Cursor::default();
                let mut tool = |buffer: &mut [u8], at| file.read(&mut cursor, buffer, at).is_ok();
                self.device(&mapped, bytes, &ranges(bytes), &mut tool)
                    .map(|failed| (mapped, bytes, failed))
            }
            (Ok(_), Err(refusal)) => Err(Outcome::Different(format!(
                "the kernel refuses the ZFile: {refusal}"
            ))),
            (Err(e), Ok(_)) => Err(Outcome::Different(format!(
                "only the tools refuse the ZFile: {e}"
            ))),
        })
    }

    /// Compares the ranges that start at `ranges`; returns whether some of it cannot be read.
    fn device(
        &mut self,
        mapped: &Mapped,
        bytes: u64,
        ranges: &[u64],
        tool: &mut dyn FnMut(&mut [u8], u64) -> bool,
    ) -> Step<bool> {
        let mut failed = false;
        for start in ranges {
            let sectors_end = bytes.next_multiple_of(SECTOR_BYTES);
            let end = (start + READ_BYTES).min(sectors_end);
            failed |= self.range(mapped, bytes, *start, end, tool)?;
        }
        Ok(failed)
    }

    /// Compares the bytes `start..end`, whole sectors. A range that fails on both sides is divided until it is
    /// clear that they fail for the same sectors.
    fn range(
        &mut self,
        mapped: &Mapped,
        bytes: u64,
        start: u64,
        end: u64,
        tool: &mut dyn FnMut(&mut [u8], u64) -> bool,
    ) -> Step<bool> {
        let len = (end - start) as usize;
        // The end of the last sector reads as zeros.
        let mut expected = vec![0; len];
        let inside = (bytes.min(end) - start) as usize;
        let readable = tool(&mut expected[..inside], start);
        let different =
            |how: String| Err(Outcome::Different(format!("bytes {start} to {end}: {how}")));
        match (mapped.read(&mut self.buffer, start, len), readable) {
            (Ok(data), true) => match data.iter().zip(&expected).position(|(a, b)| a != b) {
                None => Ok(false),
                Some(at) => different(format!(
                    "byte {} is {:#x}, the tools say {:#x}",
                    start + at as u64,
                    data[at],
                    expected[at]
                )),
            },
            (Err(e), true) => different(format!("only the kernel fails: {e}")),
            (Ok(_), false) => different("only the tools fail".to_owned()),
            (Err(e), false) if e.raw_os_error() != Some(rustix::io::Errno::IO.raw_os_error()) => {
                different(format!("fails with {e}"))
            }
            (Err(_), false) if len as u64 > SECTOR_BYTES => {
                let middle = start + (len as u64 / 2).next_multiple_of(SECTOR_BYTES);
                self.range(mapped, bytes, start, middle, tool)?;
                self.range(mapped, bytes, middle, end, tool)?;
                Ok(true)
            }
            (Err(_), false) => Ok(true),
        }
    }
}

/// Where to read a device of `bytes`: everywhere, or at both ends of a large one.
fn ranges(bytes: u64) -> Vec<u64> {
    let all = bytes.div_ceil(READ_BYTES);
    let half = MAX_READS as u64 / 2;
    let chosen: Box<dyn Iterator<Item = u64>> = match all <= MAX_READS as u64 {
        true => Box::new(0..all),
        false => Box::new((0..half).chain(all - half..all)),
    };
    chosen.map(|number| number * READ_BYTES).collect()
}

/// Where to read a stack: as [`ranges`], and where it has data.
fn stack_ranges(stack: &Stack) -> Vec<u64> {
    let mut chosen = ranges(stack.virtual_bytes());
    if stack.virtual_bytes().div_ceil(READ_BYTES) <= MAX_READS as u64 {
        return chosen;
    }
    let starts = stack
        .mappings(0, stack.sectors())
        .map(|mapping| mapping.start() * SECTOR_BYTES);
    // A little before, so that the step from one mapping to the next is read.
    let starts =
        starts.map(|start| start.saturating_sub(READ_BYTES / 2) / SECTOR_BYTES * SECTOR_BYTES);
    chosen.extend(starts.take(MAX_READS));
    chosen
}
