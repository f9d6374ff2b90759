// SPDX-License-Identifier: GPL-2.0

//! A layer of what changed between two block devices, where it is known in which ranges they can differ.
//!
//! Only these ranges are read, from both devices, past the page cache, and compared in blocks of 4 KiB: what is known of a
//! chunk of a thin pool is that somebody wrote to it, not what. Memory is bounded by the work of a batch, plus what
//! [`LayerWriter`] keeps.

use std::path::{Path, PathBuf};

use ovbd_image::lsmt::{Identity, UuidText, SECTOR_BYTES};

use crate::{
    build::{finish_output, start_blob, Options},
    compare::{each_run, fates, Below, Coarseness, Run},
    content_hash::{ContentHash, Summary},
    direct::{Aligned, DirectFile},
    error::{Error, Result},
    layer_writer::{blank_sectors, segments_of, LayerWriter, MAX_SEGMENTS},
    output::{Output, Rules},
    pipeline::{self, Pool},
    ranges::{self, Ranges},
    report::Report,
    zeros::GRANULE_BYTES,
};

/// Bytes that are read and compared as one.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes of a range of zeros that are dealt with as one: only their blocks are counted.
const ZEROED_BYTES: u64 = 64 << 20;

/// What is known of a range before anything is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The new device may differ from the old one.
    Changed,
    /// On the old device, and in the layers below, it is zeros.
    WasZero,
    /// Whatever is below, it is to be stored: all of it.
    Whole,
    /// It reads as zeros now.
    Zeroed,
}

/// A range of bytes of the new device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte, a multiple of 4 KiB.
    pub start: u64,
    /// How many, a multiple of 4 KiB unless the device ends there.
    pub bytes: u64,
    /// What is known of it.
    pub known: Known,
}

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// The device that the layers are to give, over those below.
    pub new: &'a DirectFile,
    /// The device that the layers below give, where any range is [`Known::Changed`].
    pub old: Option<&'a DirectFile>,
    /// Ranges in order, without overlap. What is in none is as in the layers below.
    pub ranges: &'a Ranges,
    /// Write a layer also where nothing differs: it has another size.
    pub always: bool,
}

/// What was found, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Read from both devices.
    pub read: u64,
    /// Stored, before compression.
    pub data: u64,
    /// Became zero.
    pub zeroed: u64,
}

/// Layers that were written, bottom first: several where one cannot have so many segments, none where nothing differs.
#[derive(Debug, Default)]
pub struct Written {
    /// Files, and the UUID of each.
    pub layers: Vec<(PathBuf, UuidText)>,
    /// What was found.
    pub counts: Counts,
}

/// Writes what of `pair` is new into layers named `0`, `1`, ... in `folder`. `options` has the format and the parent;
/// `check` is asked now and then whether to go on.
///
/// # Errors
///
/// Those of reading and writing, and of `check`.
pub fn write(
    pair: Pair<'_>,
    folder: &Path,
    options: &Options,
    report: &dyn Report,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Written> {
    write_with(pair, folder, options, MAX_SEGMENTS, report, check)
}

/// As [`write`], with layers of at most `most` segments.
fn write_with(
    pair: Pair<'_>,
    folder: &Path,
    options: &Options,
    most: u64,
    report: &dyn Report,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Written> {
    check_ranges(&pair)?;
    let mut pieces = Pieces::of(pair.ranges);
    report.expect(pair.ranges.totals().all);
    let comparer = Comparer {
        pair,
        buffers: Pool::default(),
    };
    let mut written = Written::default();
    let mut parent = options.parent(None);
    loop {
        let path = folder.join(written.layers.len().to_string());
        let output = Output::create_file(&path, Rules::default())?;
        let first = written.layers.is_empty();
        let one = one_layer(
            &comparer,
            pieces.clone(),
            &output,
            &path,
            options,
            parent,
            most,
            report,
            check,
        )?;
        for _ in 0..one.pieces {
            pieces.next();
        }
        written.counts.read += one.counts.read;
        written.counts.data += one.counts.data;
        written.counts.zeroed += one.counts.zeroed;
        if one.counts.data + one.counts.zeroed > 0 || (first && pair.always) {
            finish_output(output, options, one.start, one.end)?;
            written.layers.push((path, one.uuid));
            parent = one.uuid;
        }
        if pieces.is_over() {
            return Ok(written);
        }
    }
}

fn check_ranges(pair: &Pair<'_>) -> Result<()> {
    let granule = GRANULE_BYTES as u64;
    let not_there =
        |start| Error::new(pair.new.path(), "a range that is not on the device").at_byte(start);
    if let Some(start) = pair.ranges.defect() {
        return Err(not_there(start));
    }
    for range in pair.ranges.iter() {
        let end = range.start + range.bytes;
        let is_there = range.start % granule == 0
            && (end % granule == 0 || end == pair.new.bytes())
            && end <= pair.new.bytes();
        if !is_there {
            return Err(not_there(range.start));
        }
        let covered = pair.old.is_some_and(|old| old.bytes() >= end);
        if range.known == Known::Changed && !covered {
            let what = "a range that the older device does not have";
            return Err(Error::new(pair.new.path(), what).at_byte(range.start));
        }
    }
    Ok(())
}

/// The ranges in portions.
#[derive(Clone)]
struct Pieces<'a> {
    ranges: ranges::Iter<'a>,
    /// What is left of the range that is next.
    rest: Option<Range>,
}

impl<'a> Pieces<'a> {
    fn of(ranges: &'a Ranges) -> Self {
        let mut ranges = ranges.iter();
        let rest = ranges.next();
        Self { ranges, rest }
    }

    fn is_over(&self) -> bool {
        self.rest.is_none()
    }
}

impl Iterator for Pieces<'_> {
    type Item = Vec<Range>;

    fn next(&mut self) -> Option<Vec<Range>> {
        let mut piece = Vec::new();
        let mut room = PIECE_BYTES;
        while let Some(range) = self.rest.filter(|_| room > 0) {
            let zeroed = range.known == Known::Zeroed;
            let bytes = range.bytes.min(if zeroed { ZEROED_BYTES } else { room });
            piece.push(Range { bytes, ..range });
            room = if zeroed { 0 } else { room - bytes };
            self.rest = match bytes == range.bytes {
                true => self.ranges.next(),
                false => Some(Range {
                    start: range.start + bytes,
                    bytes: range.bytes - bytes,
                    ..range
                }),
            };
        }
        (!piece.is_empty()).then_some(piece)
    }
}

/// What is to be stored of a piece.
struct Changes {
    runs: Vec<Run>,
    data: Vec<u8>,
    summary: Summary,
    read: u64,
    /// Bytes that the piece is about.
    bytes: u64,
}

struct Comparer<'a> {
    pair: Pair<'a>,
    buffers: Pool<(Aligned, Aligned)>,
}

impl Comparer<'_> {
    /// [`blank_sectors`] of the first block, whose range is of this kind; 0 where what is below is not known.
    fn blank(&self, known: Known) -> Result<u64> {
        let (mut new, mut old) = (Aligned::default(), Aligned::default());
        let read = |device: &DirectFile, buffer: &mut Aligned| {
            let bytes = device.bytes().min(GRANULE_BYTES as u64) as usize;
            device.read(buffer.bytes(bytes), 0).map(|()| bytes)
        };
        let bytes = read(self.pair.new, &mut new)?;
        let new = new.filled(bytes);
        match (known, self.pair.old) {
            (Known::WasZero, _) => Ok(blank_sectors(new, None)),
            (_, None) => Ok(0),
            (_, Some(device)) => {
                let bytes = read(device, &mut old)?;
                Ok(blank_sectors(new, Some(old.filled(bytes))))
            }
        }
    }

    fn compare(&self, piece: &[Range]) -> Result<Changes> {
        let mut changes = Changes {
            runs: Vec::new(),
            data: Vec::new(),
            summary: Summary::default(),
            read: 0,
            bytes: piece.iter().map(|range| range.bytes).sum(),
        };
        self.buffers.with(
            || Ok((Aligned::default(), Aligned::default())),
            |(new, old)| {
                for range in piece {
                    self.compare_range(range, new, old, &mut changes)?;
                }
                Ok(())
            },
        )?;
        Ok(changes)
    }

    fn compare_range(
        &self,
        range: &Range,
        new: &mut Aligned,
        old: &mut Aligned,
        changes: &mut Changes,
    ) -> Result<()> {
        let granules = |bytes: u64| (0..bytes).step_by(GRANULE_BYTES);
        if range.known == Known::Zeroed {
            for at in granules(range.bytes) {
                changes.summary.add((range.start + at) / SECTOR_BYTES, None);
            }
            changes.add(range.start, range.bytes, true);
            return Ok(());
        }
        let bytes = range.bytes as usize;
        let new = new.bytes(bytes);
        self.pair.new.read(new, range.start)?;
        changes.read += range.bytes;
        let old = match (range.known, self.pair.old) {
            (Known::Changed, Some(device)) => {
                let old = old.bytes(bytes);
                device.read(old, range.start)?;
                changes.read += range.bytes;
                Some(&*old)
            }
            _ => None,
        };
        let below = match (range.known, old) {
            (Known::Whole, _) => Below::Unknown,
            (_, Some(old)) => Below::Data(old),
            _ => Below::Zeros,
        };
        let first = range.start / SECTOR_BYTES;
        let last = first + range.bytes / SECTOR_BYTES;
        let fates = fates(first, new, below, &mut changes.summary);
        each_run(
            first,
            last,
            &fates,
            Coarseness::default(),
            |run, granule| {
                let bytes = run.sectors * SECTOR_BYTES;
                changes.add(run.start * SECTOR_BYTES, bytes, run.zeroed);
                if !run.zeroed {
                    let at = granule * GRANULE_BYTES;
                    changes
                        .data
                        .extend_from_slice(&new[at..at + bytes as usize]);
                }
            },
        );
        Ok(())
    }
}

impl Changes {
    fn add(&mut self, start: u64, bytes: u64, zeroed: bool) {
        let (start, sectors) = (start / SECTOR_BYTES, bytes / SECTOR_BYTES);
        match self.runs.last_mut() {
            Some(run) if run.zeroed == zeroed && run.start + run.sectors == start => {
                run.sectors += sectors;
            }
            _ => self.runs.push(Run {
                start,
                sectors,
                zeroed,
            }),
        }
    }

    /// Segments that it takes at most.
    fn segments(&self) -> u64 {
        // A run may begin inside of a segment that the one before it began.
        self.runs
            .iter()
            .map(|run| segments_of(run.sectors) + 1)
            .sum()
    }
}

/// A layer that was written but has no name yet.
struct One {
    /// Pieces that are in it.
    pieces: usize,
    counts: Counts,
    uuid: UuidText,
    start: u64,
    end: u64,
}

#[allow(clippy::too_many_arguments)]
fn one_layer(
    comparer: &Comparer<'_>,
    pieces: Pieces<'_>,
    output: &Output,
    path: &Path,
    options: &Options,
    parent_uuid: UuidText,
    most: u64,
    report: &dyn Report,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<One> {
    let virtual_size = comparer.pair.new.bytes();
    let (blob, start) = start_blob(output, path, options)?;
    let first = Identity {
        virtual_size,
        uuid: UuidText::NIL,
        parent_uuid,
    };
    let mut layer = LayerWriter::new(blob, path, &first)?;
    if let Some(range) = pieces.rest.filter(|range| range.start == 0) {
        layer.set_blank(comparer.blank(range.known)?);
    }
    let mut hash = ContentHash::default();
    let mut counts = Counts::default();
    let (mut taken, mut segments) = (0, 0);
    let mut full = false;
    pipeline::run(
        pieces,
        Ok,
        |piece| {
            check()?;
            comparer.compare(&piece)
        },
        |changes| {
            full = full || (taken > 0 && segments + changes.segments() > most);
            if full {
                // The rest is for the next layer, and the few pieces on their way are read once more.
                return Ok(());
            }
            taken += 1;
            segments += changes.segments();
            report.add(changes.bytes);
            counts.read += changes.read;
            hash.add(&changes.summary);
            let mut data = changes.data.as_slice();
            for run in &changes.runs {
                let bytes = run.sectors * SECTOR_BYTES;
                if run.zeroed {
                    counts.zeroed += bytes;
                    layer.zeros(run.start, run.sectors)?;
                } else {
                    let (now, later) = data.split_at(bytes as usize);
                    counts.data += bytes;
                    layer.data(run.start, now)?;
                    data = later;
                }
            }
            Ok(())
        },
    )?;
    let uuid = hash.uuid(virtual_size, parent_uuid);
    let end = layer.finish(&Identity { uuid, ..first })?;
    Ok(One {
        pieces: taken,
        counts,
        uuid,
        start,
        end,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{layer::LayerPath, parents::Parents, stack::Stack};

    const KIB: u64 = 1 << 10;

    fn range(start: u64, bytes: u64, known: Known) -> Range {
        Range {
            start: start * KIB,
            bytes: bytes * KIB,
            known,
        }
    }

    /// Pseudo-random bytes of a seed, the same everywhere.
    fn fill(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        (0..bytes)
            .map(|_| {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                state.wrapping_mul(0x2545_f491_4f6c_dd1d) as u8
            })
            .collect()
    }

    /// The files of two devices, in a folder of their own.
    struct Devices {
        folder: tempfile::TempDir,
        old: Vec<u8>,
        new: Vec<u8>,
    }

    impl Devices {
        fn new(bytes: u64) -> Self {
            let old = fill(1, bytes as usize);
            Self {
                folder: tempfile::tempdir().unwrap(),
                new: old.clone(),
                old,
            }
        }

        fn change(&mut self, start: u64, bytes: u64, data: Option<u64>) {
            let place = &mut self.new[(start * KIB) as usize..][..(bytes * KIB) as usize];
            match data {
                Some(seed) => place.copy_from_slice(&fill(seed, place.len())),
                None => place.fill(0),
            }
        }

        fn open(&self) -> (DirectFile, DirectFile) {
            let path = |name| self.folder.path().join(name);
            fs::write(path("old"), &self.old).unwrap();
            fs::write(path("new"), &self.new).unwrap();
            (
                DirectFile::open(&path("old")).unwrap(),
                DirectFile::open(&path("new")).unwrap(),
            )
        }

        fn delta(&self, ranges: &[Range], most: u64) -> Written {
            let (old, new) = self.open();
            let pair = Pair {
                new: &new,
                old: Some(&old),
                ranges: &ranges.iter().copied().collect(),
                always: old.bytes() != new.bytes(),
            };
            let folder = self.folder.path();
            write_with(pair, folder, &Options::default(), most, &(), &|| Ok(())).unwrap()
        }

        /// What the layers give over a full one of the old device.
        fn content(&self, written: &Written) -> Vec<u8> {
            let (old, _) = self.open();
            let base = self.folder.path().join("base");
            fs::create_dir(&base).unwrap();
            let all = [Range {
                start: 0,
                bytes: old.bytes(),
                known: Known::WasZero,
            }];
            let all = Ranges::from_iter(all);
            let pair = Pair {
                new: &old,
                old: None,
                ranges: &all,
                always: false,
            };
            let base = write(pair, &base, &Options::default(), &(), &|| Ok(())).unwrap();
            let paths: Vec<LayerPath> = base
                .layers
                .iter()
                .chain(&written.layers)
                .map(|(path, _)| LayerPath::Sealed(path.clone()))
                .collect();
            let stack = Stack::open(&paths, Parents::Ignored).unwrap();
            assert_eq!(stack.virtual_bytes(), self.new.len() as u64);
            let mut content = vec![0; self.new.len()];
            stack.reader().read(&mut content, 0).unwrap();
            content
        }
    }

    #[test]
    fn only_what_differs_is_stored() {
        let mut devices = Devices::new(4 << 20);
        devices.change(100, 4, Some(7));
        devices.change(256, 128, None);
        devices.change(1024, 64, Some(8));
        devices.change(3072, 8, None);
        let ranges = [
            range(64, 64, Known::Changed),
            range(256, 128, Known::Zeroed),
            range(1024, 64, Known::Changed),
            range(3072, 64, Known::Changed),
        ];
        let written = devices.delta(&ranges, MAX_SEGMENTS);
        assert_eq!(written.layers.len(), 1);
        let wanted = Counts {
            read: 2 * 192 * KIB,
            data: 68 * KIB,
            zeroed: 136 * KIB,
        };
        assert_eq!(written.counts, wanted);
        assert!(devices.content(&written) == devices.new);
    }

    #[test]
    fn nothing_that_differs_is_no_layer() {
        let devices = Devices::new(1 << 20);
        let written = devices.delta(&[range(0, 1024, Known::Changed)], MAX_SEGMENTS);
        assert!(written.layers.is_empty());
        assert_eq!(written.counts.data, 0);
        // Not even where no range could differ.
        assert!(devices.delta(&[], MAX_SEGMENTS).layers.is_empty());
    }

    #[test]
    fn a_device_that_grew() {
        let mut devices = Devices::new(1 << 20);
        devices.new.resize(3 << 20, 0);
        devices.change(2048, 64, Some(3));
        let ranges = [
            range(1024, 1024, Known::Zeroed),
            range(2048, 64, Known::Whole),
            range(2112, 960, Known::Zeroed),
        ];
        let written = devices.delta(&ranges, MAX_SEGMENTS);
        assert!(devices.content(&written) == devices.new);
        // Also one of which nothing is used yet.
        let mut devices = Devices::new(1 << 20);
        devices.new.resize(2 << 20, 0);
        let written = devices.delta(&[], MAX_SEGMENTS);
        assert_eq!(written.layers.len(), 1);
        assert!(devices.content(&written) == devices.new);
    }

    #[test]
    fn too_many_segments_become_several_layers() {
        let mut devices = Devices::new(8 << 20);
        for number in 0..1000 {
            devices.change(number * 8, 4, Some(number));
        }
        let ranges: Vec<Range> = (0..128)
            .map(|n| range(n * 64, 64, Known::Changed))
            .collect();
        let written = devices.delta(&ranges, 300);
        assert!(written.layers.len() > 2, "{}", written.layers.len());
        assert!(devices.content(&written) == devices.new);
        let whole = devices.delta_again(&ranges);
        assert_eq!(whole.layers.len(), 1);
        assert_eq!(whole.counts, written.counts);
    }

    impl Devices {
        fn delta_again(&self, ranges: &[Range]) -> Written {
            let (old, new) = self.open();
            let folder = self.folder.path().join("again");
            fs::create_dir(&folder).unwrap();
            let pair = Pair {
                new: &new,
                old: Some(&old),
                ranges: &ranges.iter().copied().collect(),
                always: false,
            };
            write(pair, &folder, &Options::default(), &(), &|| Ok(())).unwrap()
        }
    }

    #[test]
    fn ranges_that_cannot_be() {
        let devices = Devices::new(1 << 20);
        let (old, new) = devices.open();
        for ranges in [
            vec![range(1, 4, Known::Changed)],
            vec![range(0, 1028, Known::Changed)],
            vec![range(8, 4, Known::Changed), range(4, 4, Known::Changed)],
            vec![Range {
                start: u64::MAX - 4095,
                bytes: 8192,
                known: Known::Zeroed,
            }],
        ] {
            let pair = Pair {
                new: &new,
                old: Some(&old),
                ranges: &ranges.iter().copied().collect(),
                always: false,
            };
            let result = write(
                pair,
                devices.folder.path(),
                &Options::default(),
                &(),
                &|| Ok(()),
            );
            assert!(result.is_err(), "{ranges:?}");
        }
    }

    #[test]
    fn who_is_asked_whether_to_go_on_can_end_it() {
        let devices = Devices::new(1 << 20);
        let (old, new) = devices.open();
        let pair = Pair {
            new: &new,
            old: Some(&old),
            ranges: &Ranges::from_iter([range(0, 1024, Known::Changed)]),
            always: false,
        };
        let folder = devices.folder.path().join("none");
        fs::create_dir(&folder).unwrap();
        let no = || Err(Error::new(Path::new("x"), "interrupted"));
        assert!(write(pair, &folder, &Options::default(), &(), &no).is_err());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "nothing is left");
    }
}
