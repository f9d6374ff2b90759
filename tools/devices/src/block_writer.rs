// SPDX-License-Identifier: GPL-2.0

//! Making a layer of the chunks of an exception store: of their blocks of 4 KiB, those that differ from the stack below.
//!
//! How many segments that takes is known only when all is read, and a layer can have a million. So that no commit fails
//! late, the runs of chunks are known before: each of them stored whole must fit. As long as there is room for that, blocks
//! are told apart; where there is none, what is between those that differ is stored too.

use std::path::Path;

use ovbd_image::lsmt::SECTOR_BYTES;

use ovbd_layers::{
    compare::{self, each_run, fates, Base, Below, Coarseness, Fate},
    content_hash::{ContentHash, Summary},
    direct::{Aligned, DirectFile},
    error::Result,
    layer_writer::{blank_sectors, segments_of, LayerWriter},
    pipeline::Pool,
    zeros::GRANULE_BYTES,
};

/// Sectors of a block: what of it differs from the stack below is stored whole.
const BLOCK_SECTORS: u64 = GRANULE_BYTES as u64 / SECTOR_BYTES;

/// Sectors from the first to the one after the last.
type Run = std::ops::Range<u64>;

/// The whole blocks of a device of `sectors` in which there is something of `chunks`, which are in order.
pub fn runs(chunks: impl Iterator<Item = Run>, sectors: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for chunk in chunks {
        let start = chunk.start - chunk.start % BLOCK_SECTORS;
        let end = chunk.end.next_multiple_of(BLOCK_SECTORS).min(sectors);
        match runs.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Segments that all `runs` take if they are stored whole.
pub fn segments(runs: &[Run]) -> u64 {
    runs.iter()
        .map(|run| segments_of(run.end - run.start))
        .sum()
}

/// What is still to be stored.
struct Rest {
    runs: std::vec::IntoIter<Run>,
    /// End of the run that is being stored.
    end: u64,
    /// Segments of all runs after it.
    later: u64,
}

impl Rest {
    fn new(runs: Vec<Run>) -> Self {
        Self {
            later: segments(&runs),
            runs: runs.into_iter(),
            end: 0,
        }
    }

    /// The end of the run that has the sector before `end`.
    fn advance(&mut self, end: u64) -> u64 {
        while self.end < end {
            let Some(run) = self.runs.next() else {
                break;
            };
            self.later -= segments_of(run.end - run.start);
            self.end = run.end;
        }
        self.end.max(end)
    }
}

/// The stack below, which what was written is compared with.
pub enum Origin<'a> {
    /// The device that it is, and memory for what is read of it.
    Device(DirectFile, Pool<Aligned>),
    /// The layers that it consists of.
    Layers(Base<'a>),
}

impl Origin<'_> {
    /// The device `path`.
    ///
    /// # Errors
    ///
    /// Those of opening it.
    pub fn device(path: &Path) -> Result<Self> {
        Ok(Self::Device(DirectFile::open(path)?, Pool::default()))
    }

    /// Calls `work` with what a run holds.
    fn with<R>(&self, run: &Run, work: impl FnOnce(Below<'_>) -> R) -> Result<R> {
        let (start, bytes) = (run.start * SECTOR_BYTES, bytes_of(run));
        match self {
            Self::Layers(layers) => layers.with(start, bytes, |below| Ok(work(below))),
            Self::Device(device, memory) => memory.with(
                || Ok(Aligned::default()),
                |memory| {
                    let buffer = memory.bytes(bytes);
                    device.read(buffer, start)?;
                    Ok(work(Below::Data(buffer)))
                },
            ),
        }
    }
}

/// Whole blocks of the device, some of them next to each other.
pub struct Blocks {
    /// Sectors, and the byte of the memory at which they begin.
    runs: Vec<(Run, usize)>,
    memory: Aligned,
    /// Bytes of the memory that they take.
    bytes: usize,
}

impl Blocks {
    /// Blocks of these `runs`, which are in order, in `memory`. They hold what is in `below`, or nothing in
    /// particular where every sector of them is put.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn new(runs: Vec<Run>, below: Option<&Origin<'_>>, mut memory: Aligned) -> Result<Self> {
        let mut bytes = 0;
        let place = |run: Run| {
            let at = bytes;
            bytes += bytes_of(&run);
            (run, at)
        };
        let runs = runs.into_iter().map(place).collect();
        memory.bytes(bytes);
        let mut blocks = Self {
            runs,
            memory,
            bytes,
        };
        if let Some(below) = below {
            blocks.read(below)?;
        }
        Ok(blocks)
    }

    fn read(&mut self, below: &Origin<'_>) -> Result<()> {
        let all = self.memory.bytes(self.bytes);
        for (run, at) in &self.runs {
            let bytes = &mut all[*at..][..bytes_of(run)];
            below.with(run, |below| match below.bytes() {
                Some(old) => bytes.copy_from_slice(old),
                None => bytes.fill(0),
            })?;
        }
        Ok(())
    }

    /// Where `bytes` from `sector` on belong, which the blocks have but for what is behind the device's end.
    pub fn place(&mut self, sector: u64, bytes: usize) -> &mut [u8] {
        let after = self.runs.partition_point(|(run, _)| run.start <= sector);
        let (run, at) = &self.runs[after - 1];
        let room = ((run.end - sector) * SECTOR_BYTES) as usize;
        let first = at + ((sector - run.start) * SECTOR_BYTES) as usize;
        &mut self.memory.bytes(self.bytes)[first..][..bytes.min(room)]
    }

    /// Blocks that follow each other, and what they hold.
    pub fn each(&self) -> impl Iterator<Item = (&Run, &[u8])> {
        let all = self.memory.filled(self.bytes);
        let runs = self.runs.iter();
        runs.map(move |(run, at)| (run, &all[*at..][..bytes_of(run)]))
    }

    /// Finds out what of them differs from the stack.
    ///
    /// # Errors
    ///
    /// Those of reading the stack.
    pub fn compare(self, below: &Origin<'_>) -> Result<Compared> {
        let mut summary = Summary::default();
        let mut blank = None;
        let mut found = Vec::new();
        for (run, new) in self.each() {
            let fates = below.with(run, |old| {
                if run.start == 0 {
                    blank = Some(blank_sectors(new, old.bytes()));
                }
                fates(run.start, new, old, &mut summary)
            })?;
            found.push(fates);
        }
        Ok(Compared {
            blocks: self,
            fates: found,
            summary,
            blank,
        })
    }
}

/// Blocks, and what becomes of each.
pub struct Compared {
    blocks: Blocks,
    /// Of the blocks that follow each other.
    fates: Vec<Vec<Fate>>,
    /// What identifies those that differ.
    summary: Summary,
    /// Where the device begins with them: sectors at its start that are zero, in the stack as well.
    blank: Option<u64>,
}

impl Compared {
    /// How many bytes were compared.
    pub fn bytes(&self) -> u64 {
        self.blocks.bytes as u64
    }

    /// The memory, for others.
    pub fn into_memory(self) -> Aligned {
        self.blocks.memory
    }
}

/// Stores blocks that differ from the stack below.
pub struct BlockWriter<'a> {
    layer: LayerWriter<'a>,
    /// Hash of all that differs.
    content: ContentHash,
    rest: Rest,
    /// Segments that the layer can have.
    most: u64,
    /// Bytes that were stored though they do not differ.
    same: u64,
}

/// What [`BlockWriter`] made.
pub struct Written<'a> {
    /// The layer, without its end.
    pub layer: LayerWriter<'a>,
    /// Hash of all that differs.
    pub content: ContentHash,
    /// Bytes that were stored though they do not differ, for want of segments.
    pub same: u64,
}

impl<'a> BlockWriter<'a> {
    /// Writes to `layer`. All that is added is in one of the `runs`, whose [`segments`] are `most` at most.
    pub fn new(layer: LayerWriter<'a>, runs: Vec<Run>, most: u64) -> Self {
        Self {
            layer,
            content: ContentHash::default(),
            rest: Rest::new(runs),
            most,
            same: 0,
        }
    }

    /// Stores what differs of blocks, which follow all earlier ones.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn add(&mut self, blocks: &Compared) -> Result<()> {
        self.content.add(&blocks.summary);
        if let Some(blank) = blocks.blank {
            self.layer.set_blank(blank);
        }
        for ((run, new), fates) in blocks.blocks.each().zip(&blocks.fates) {
            self.store(run, new, fates)?;
        }
        Ok(())
    }

    /// What was made.
    pub fn finish(self) -> Written<'a> {
        Written {
            layer: self.layer,
            content: self.content,
            same: self.same,
        }
    }

    fn store(&mut self, run: &Run, new: &[u8], fates: &[Fate]) -> Result<()> {
        let run_end = self.rest.advance(run.end);
        let mut changed: Vec<compare::Run> = Vec::new();
        each_run(
            run.start,
            run.end,
            fates,
            Coarseness::default(),
            |run, _| {
                changed.push(run);
            },
        );
        let finest: u64 = changed.iter().map(|run| segments_of(run.sectors)).sum();
        let whole =
            self.layer.segments() + finest + segments_of(run_end - run.end) + self.rest.later;
        if whole > self.most {
            let same = fates.iter().filter(|fate| **fate != Fate::Data).count();
            self.same += (same * GRANULE_BYTES) as u64;
            return self.layer.data(run.start, new);
        }
        for part in changed {
            if part.zeroed {
                self.layer.zeros(part.start, part.sectors)?;
            } else {
                let at = ((part.start - run.start) * SECTOR_BYTES) as usize;
                let bytes = (part.sectors * SECTOR_BYTES) as usize;
                self.layer.data(part.start, &new[at..][..bytes])?;
            }
        }
        Ok(())
    }
}

fn bytes_of(run: &Run) -> usize {
    ((run.end - run.start) * SECTOR_BYTES) as usize
}

#[cfg(test)]
mod tests {
    use std::{fs, fs::File, os::unix::fs::FileExt, path::Path};

    use ovbd_image::lsmt::{Identity, UuidText};
    use ovbd_layers::{
        build::{build, finish_output, start_blob, Options},
        layer::LayerPath,
        layer_writer::MAX_SEGMENTS,
        output::{Output, Rules},
        parents::Parents,
        stack::Stack,
    };

    use super::*;

    fn sectors_of(data: &[u8]) -> u64 {
        data.len() as u64 / SECTOR_BYTES
    }

    /// Writes `chunks`, first sectors and data, over what is in the file `below` to the layer `out` of at most `most`
    /// segments; returns its UUID and the bytes that it has for want of segments.
    fn write(below: &Path, chunks: &[(u64, Vec<u8>)], most: u64, out: &Path) -> (UuidText, u64) {
        let bytes = fs::metadata(below).unwrap().len();
        let below = Origin::device(below).unwrap();
        let options = Options::default();
        let output = Output::create_file(out, Rules::default()).unwrap();
        let (blob, begin) = start_blob(&output, out, &options).unwrap();
        let identity = Identity {
            virtual_size: bytes,
            uuid: UuidText::NIL,
            parent_uuid: UuidText::NIL,
        };
        let layer = LayerWriter::new(blob, out, &identity).unwrap();
        let ranges = chunks.iter().map(|(at, data)| *at..*at + sectors_of(data));
        let runs = runs(ranges, bytes / SECTOR_BYTES);
        let mut writer = BlockWriter::new(layer, runs, most);
        let block = |chunk: &(u64, Vec<u8>)| chunk.0 / BLOCK_SECTORS;
        for part in chunks.chunk_by(|one, other| block(one) == block(other) || block(one) % 3 != 0)
        {
            let ranges = part.iter().map(|(at, data)| *at..*at + sectors_of(data));
            let runs = super::runs(ranges, bytes / SECTOR_BYTES);
            let mut blocks = Blocks::new(runs, Some(&below), Aligned::default()).unwrap();
            for (at, data) in part {
                let place = blocks.place(*at, data.len());
                place.copy_from_slice(&data[..place.len()]);
            }
            let compared = blocks.compare(&below).unwrap();
            writer.add(&compared).unwrap();
        }
        let written = writer.finish();
        let Written {
            layer,
            content,
            same,
        } = written;
        let end = layer.finish(&identity).unwrap();
        finish_output(output, &options, begin, end).unwrap();
        (content.uuid(bytes, UuidText::NIL), same)
    }

    #[test]
    fn scattered_blocks_become_fewer_segments_where_these_do_not_suffice() {
        const BYTES: usize = (2 << 20) + 4096 - 512;
        let folder = tempfile::tempdir().unwrap();
        let [raw, base] = ["raw", "base"].map(|name| folder.path().join(name));
        let mut random = 1_u64;
        let mut below = |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        for chunk_sectors in [1_u64, 4, 8, 128, 512] {
            let mut old: Vec<u8> = (0..BYTES).map(|_| below(255) as u8 + 1).collect();
            old[512 * 3000..].fill(0);
            fs::write(&raw, &old).unwrap();
            let options = Options {
                replace: true,
                ..Options::default()
            };
            build(&raw, &base, &options, &()).unwrap();
            let mut new = old.clone();
            let mut chunks: Vec<(u64, Vec<u8>)> = Vec::new();
            let bytes = (chunk_sectors * SECTOR_BYTES) as usize;
            for (number, part) in new.chunks_mut(bytes).enumerate() {
                if below(3) == 0 {
                    continue;
                }
                for block in part.chunks_mut(GRANULE_BYTES) {
                    match below(3) {
                        0 => block.fill(0),
                        1 => block[0] ^= 1,
                        _ => {}
                    }
                }
                // The last chunk reaches beyond the end.
                let mut data = part.to_vec();
                data.resize(bytes, 9);
                chunks.push((number as u64 * chunk_sectors, data));
            }
            let ranges = chunks.iter().map(|(at, data)| *at..*at + sectors_of(data));
            let least = segments(&runs(ranges, BYTES as u64 / SECTOR_BYTES));
            let check = |most: u64| {
                let out = folder.path().join("out");
                let (uuid, same) = write(&raw, &chunks, most, &out);
                let paths = [base.clone(), out.clone()].map(LayerPath::Sealed);
                let stack = Stack::open(&paths, Parents::Ignored).unwrap();
                let mut read = vec![0; BYTES];
                stack.reader().read(&mut read, 0).unwrap();
                assert!(read == new, "{chunk_sectors} {most}");
                let segments = stack.layers()[1].segments().len() as u64;
                fs::remove_file(out).unwrap();
                assert!(segments <= most, "{chunk_sectors}: {segments} of {most}");
                (uuid, same, segments)
            };
            let (uuid, same, finest) = check(MAX_SEGMENTS);
            assert_eq!(same, 0);
            for most in (least..finest).step_by(3) {
                let (other, same, _) = check(most);
                assert!(same > 0, "{chunk_sectors} {most}");
                assert_eq!(other, uuid, "it is the same change");
            }
        }
    }

    #[test]
    fn runs_are_of_whole_blocks() {
        let of = |chunks: &[Run]| runs(chunks.iter().cloned(), 1003);
        assert_eq!(of(&[1..2, 9..10, 24..25]), [0..16, 24..32]);
        assert_eq!(of(&[0..8, 16..24, 24..32]), [0..8, 16..32]);
        assert_eq!(of(&[0..2, 896..1024]), [0..8, 896..1003]);
        assert_eq!(segments(&[0..16256, 20000..40000]), 3);
    }

    /// A device of 3 TiB whose first bytes were written, 2 sectors after the start of what is below.
    #[test]
    fn large_layers_do_not_start_at_sector_0() {
        for (first_chunk, below, start) in [(0, 0, 2), (0, 9, 1), (2, 0, 2)] {
            let folder = tempfile::tempdir().unwrap();
            let [device, out] = ["device", "out"].map(|name| folder.path().join(name));
            let file = File::create(&device).unwrap();
            file.set_len(3 << 40).unwrap();
            file.write_all_at(&[below], 512).unwrap();
            // Chunks of one sector: what is not in them is as below.
            let chunk = |number| (number, vec![if number < 2 { 0 } else { 7 }; 512]);
            let chunks: Vec<_> = (first_chunk..8).map(chunk).collect();
            write(&device, &chunks, MAX_SEGMENTS, &out);
            let stack = Stack::open(&[LayerPath::Sealed(out)], Parents::All).unwrap();
            let first = stack.segments()[0];
            assert_eq!((first.start(), first.sectors()), (start, 8 - start as u32));
        }
    }
}
