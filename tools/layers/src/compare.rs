// SPDX-License-Identifier: GPL-2.0

//! What of a raw image a layer must store: all that differs from the base, window by window.

use ovbd_image::{
    index::Source,
    lsmt::{UuidText, SECTOR_BYTES},
};

use crate::{
    content_hash::Summary,
    error::Result,
    layer::Layer,
    layer_writer::{blank_sectors, segments_of},
    pipeline::Pool,
    source::RawSource,
    stack::{Stack, StackReader, WINDOW_BYTES},
    zeros::{is_zero, GRANULE_BYTES},
};

/// Sectors of a granule.
const GRANULE_SECTORS: u64 = GRANULE_BYTES as u64 / SECTOR_BYTES;

/// Every size from a granule to a window, by twos.
const LEVELS: usize = (WINDOW_BYTES as usize / GRANULE_BYTES).trailing_zeros() as usize + 1;

/// The size of the aligned pieces that are stored whole if anything in them differs, as a power of two of granules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coarseness(usize);

impl Coarseness {
    /// Bytes of such a piece.
    pub fn bytes(self) -> usize {
        GRANULE_BYTES << self.0
    }

    /// Granules of such a piece.
    fn granules(self) -> usize {
        1 << self.0
    }
}

/// What becomes of a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is as in the base.
    Same,
    /// It became zero.
    Zeroed,
    /// It holds new data.
    Data,
}

/// What the layers below hold.
#[derive(Clone, Copy, Debug)]
pub enum Below<'a> {
    /// Nobody knows.
    Unknown,
    /// Zeros.
    Zeros,
    /// These bytes.
    Data(&'a [u8]),
}

impl<'a> Below<'a> {
    /// The bytes, where there are others than zeros.
    pub fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Below::Data(bytes) => Some(bytes),
            Below::Unknown | Below::Zeros => None,
        }
    }
}

/// What becomes of each granule of `data`, which begins at sector `start` and has what `below` has besides. What is to be
/// stored is added to `summary`.
pub fn fates(start: u64, data: &[u8], below: Below<'_>, summary: &mut Summary) -> Vec<Fate> {
    let granules = data.chunks(GRANULE_BYTES).enumerate();
    granules
        .map(|(at, granule)| {
            let zeroed = is_zero(granule);
            let same = match below {
                Below::Unknown => false,
                Below::Zeros => zeroed,
                Below::Data(below) => below[at * GRANULE_BYTES..][..granule.len()] == *granule,
            };
            if same {
                return Fate::Same;
            }
            let sector = start + at as u64 * GRANULE_SECTORS;
            summary.add(sector, (!zeroed).then_some(granule));
            if zeroed {
                Fate::Zeroed
            } else {
                Fate::Data
            }
        })
        .collect()
}

/// A run of sectors that is to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First sector of the device.
    pub start: u64,
    /// Number of sectors.
    pub sectors: u64,
    /// Whether they become zero; else data is stored.
    pub zeroed: bool,
}

/// What is to be stored of a window.
pub struct Changes {
    /// Byte of the image after the window.
    pub end: u64,
    /// All that is stored, in order.
    pub runs: Vec<Run>,
    /// Starts with the data of all runs that are not zeroed.
    pub data: Vec<u8>,
    /// What identifies the changes.
    pub summary: Summary,
    /// Of the first window: sectors at its start that are zero, in the base as well.
    pub blank: Option<u64>,
    /// Sector of the window, and what becomes of its granules.
    fates: (u64, Vec<Fate>),
}

/// Segments that a layer needs, for every coarseness.
#[derive(Clone, Debug, Default)]
pub struct SegmentCount([Counter; LEVELS]);

#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    /// The run that the next one may continue.
    open: Option<Run>,
    /// Segments of all runs before it.
    closed: u64,
}

impl SegmentCount {
    /// Adds a window, which follows all earlier ones.
    pub fn add(&mut self, changes: &Changes) {
        let (start, fates) = &changes.fates;
        let end = changes.end.div_ceil(SECTOR_BYTES);
        for (level, counter) in self.0.iter_mut().enumerate() {
            each_run(*start, end, fates, Coarseness(level), |run, _| {
                counter.add(run)
            });
        }
    }

    /// Segments at this coarseness.
    pub fn of(&self, coarseness: Coarseness) -> u64 {
        let counter = &self.0[coarseness.0];
        counter.closed + counter.open.map_or(0, |run| segments_of(run.sectors))
    }

    /// The finest at which there are at most `most` segments.
    pub fn finest_that_fits(&self, most: u64) -> Option<Coarseness> {
        (0..LEVELS)
            .map(Coarseness)
            .find(|level| self.of(*level) <= most)
    }
}

impl Counter {
    fn add(&mut self, run: Run) {
        match &mut self.open {
            Some(open) if open.zeroed == run.zeroed && open.start + open.sectors == run.start => {
                open.sectors += run.sectors;
            }
            open => {
                self.closed += open.map_or(0, |run| segments_of(run.sectors));
                *open = Some(run);
            }
        }
    }
}

/// Calls `found` with every run of pieces that are stored, and the granule where it starts: of the window from sector
/// `start` to `end` with granules of these `fates`.
pub fn each_run(
    start: u64,
    end: u64,
    fates: &[Fate],
    coarseness: Coarseness,
    mut found: impl FnMut(Run, usize),
) {
    let mut open: Option<(Run, usize)> = None;
    for (number, piece) in fates.chunks(coarseness.granules()).enumerate() {
        if piece.iter().all(|fate| *fate == Fate::Same) {
            continue;
        }
        let zeroed = piece.iter().all(|fate| *fate == Fate::Zeroed);
        let granule = number * coarseness.granules();
        let first = start + granule as u64 * GRANULE_SECTORS;
        let sectors = (piece.len() as u64 * GRANULE_SECTORS).min(end - first);
        match &mut open {
            Some((run, _)) if run.zeroed == zeroed && run.start + run.sectors == first => {
                run.sectors += sectors;
            }
            open => {
                if let Some((run, granule)) = open.take() {
                    found(run, granule);
                }
                let run = Run {
                    start: first,
                    sectors,
                    zeroed,
                };
                *open = Some((run, granule));
            }
        }
    }
    if let Some((run, granule)) = open {
        found(run, granule);
    }
}

/// A window that was read.
pub struct Window {
    number: u64,
    data: Vec<u8>,
}

/// A stack that what is new is compared with, for many threads at once.
pub struct Base<'a> {
    stack: &'a Stack,
    readers: Pool<(StackReader<'a>, Vec<u8>)>,
}

impl<'a> Base<'a> {
    /// The content of `stack`.
    pub fn new(stack: &'a Stack) -> Self {
        Self {
            stack,
            readers: Pool::default(),
        }
    }

    /// Calls `work` with what `bytes` from byte `start` on are.
    ///
    /// What lower layers hold beyond the end of the stack's device counts: it would show through.
    ///
    /// # Errors
    ///
    /// Those of reading the stack, and of `work`.
    pub fn with<R>(
        &self,
        start: u64,
        bytes: usize,
        work: impl FnOnce(Below<'_>) -> Result<R>,
    ) -> Result<R> {
        let end = start.saturating_add(bytes as u64).div_ceil(SECTOR_BYTES);
        let mut mappings = self.stack.mappings(start / SECTOR_BYTES, end);
        if !mappings.any(|mapping| matches!(mapping.source(), Source::Data { .. })) {
            return work(Below::Zeros);
        }
        self.readers.with(
            || Ok((self.stack.reader(), Vec::new())),
            |(reader, buffer)| {
                buffer.resize(bytes, 0);
                reader.read(buffer, start)?;
                work(Below::Data(buffer))
            },
        )
    }
}

/// The image and its base, read window by window.
pub struct Comparison<'a> {
    source: &'a RawSource,
    base: Option<Base<'a>>,
    buffers: Pool<Vec<u8>>,
}

impl<'a> Comparison<'a> {
    /// Compares `source` with `base`, or with zeros.
    pub fn new(source: &'a RawSource, base: Option<&'a Stack>) -> Self {
        Self {
            source,
            base: base.map(Base::new),
            buffers: Pool::default(),
        }
    }

    /// The image.
    pub fn source(&self) -> &RawSource {
        self.source
    }

    /// UUID of the topmost layer of the base.
    pub fn below(&self) -> Option<UuidText> {
        self.base.as_ref()?.stack.top().and_then(Layer::uuid)
    }

    /// Windows that can differ from the base, in order: where the image has data, and where the base has.
    pub fn windows(&self) -> Box<dyn Iterator<Item = u64> + Send + '_> {
        if self.source.is_stream() {
            return self.source.windows();
        }
        let end = self.source.bytes().div_ceil(SECTOR_BYTES);
        let mut ours = self.source.windows().peekable();
        let base = self.base.as_ref().into_iter();
        let mut theirs = base
            .flat_map(move |base| base.stack.data_windows(end))
            .peekable();
        Box::new(std::iter::from_fn(move || {
            let window = match (ours.peek(), theirs.peek()) {
                (Some(a), Some(b)) => *a.min(b),
                (Some(a), None) => *a,
                (None, b) => *b?,
            };
            ours.next_if_eq(&window);
            theirs.next_if_eq(&window);
            Some(window)
        }))
    }

    /// Reads a window.
    ///
    /// # Errors
    ///
    /// Those of reading the image.
    pub fn read(&self, number: u64) -> Result<Window> {
        let mut data = self.buffers.take().unwrap_or_default();
        self.source.read_window(number, &mut data)?;
        Ok(Window { number, data })
    }

    /// Takes the memory of changes back, once they are written.
    pub fn put_back(&self, changes: Changes) {
        self.buffers.put(changes.data);
    }

    /// Finds out what of a window must be stored.
    ///
    /// # Errors
    ///
    /// Those of reading the base.
    pub fn compare(&self, window: Window, coarseness: Coarseness) -> Result<Changes> {
        let Window { number, mut data } = window;
        let start = number * WINDOW_BYTES;
        let end = start + data.len() as u64;
        // The last sector is stored whole.
        data.resize(data.len().next_multiple_of(SECTOR_BYTES as usize), 0);
        let first = start / SECTOR_BYTES;
        let mut summary = Summary::default();
        let mut blank = None;
        let mut compare = |below: Below<'_>| {
            if number == 0 {
                blank = Some(blank_sectors(&data, below.bytes()));
            }
            Ok(fates(first, &data, below, &mut summary))
        };
        let found = match &self.base {
            Some(base) => base.with(start, data.len(), compare)?,
            None => compare(Below::Zeros)?,
        };
        let mut runs = Vec::new();
        let mut kept = 0;
        let last = end.div_ceil(SECTOR_BYTES);
        each_run(first, last, &found, coarseness, |run, granule| {
            runs.push(run);
            if !run.zeroed {
                let at = granule * GRANULE_BYTES;
                let bytes = (run.sectors * SECTOR_BYTES) as usize;
                if kept != at {
                    data.copy_within(at..at + bytes, kept);
                }
                kept += bytes;
            }
        });
        Ok(Changes {
            end,
            runs,
            data,
            summary,
            blank,
            fates: (first, found),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(fates: &str, level: usize) -> Vec<(u64, u64, bool)> {
        let fates: Vec<Fate> = fates
            .chars()
            .map(|c| match c {
                '.' => Fate::Same,
                '0' => Fate::Zeroed,
                _ => Fate::Data,
            })
            .collect();
        let mut found = Vec::new();
        let end = fates.len() as u64 * GRANULE_SECTORS;
        each_run(0, end, &fates, Coarseness(level), |run, granule| {
            assert_eq!(run.start, granule as u64 * GRANULE_SECTORS);
            found.push((run.start / 8, run.sectors / 8, run.zeroed));
        });
        found
    }

    #[test]
    fn runs_of_every_coarseness() {
        assert_eq!(
            runs("x.x.0000..", 0),
            [(0, 1, false), (2, 1, false), (4, 4, true)]
        );
        assert_eq!(runs("x.x.0000..", 1), [(0, 4, false), (4, 4, true)]);
        assert_eq!(runs("x.x.0000..", 2), [(0, 4, false), (4, 4, true)]);
        assert_eq!(
            runs("x.x.00000.", 2),
            [(0, 4, false), (4, 4, true), (8, 2, false)]
        );
        assert_eq!(runs("x.x.0000..", 3), [(0, 8, false)]);
        assert_eq!(runs("....", 0), []);
    }

    #[test]
    fn counts_are_those_of_the_runs() {
        let mut counter = Counter::default();
        for start in [0, 16256, 40000] {
            let run = Run {
                start,
                sectors: 16256,
                zeroed: false,
            };
            counter.add(run);
        }
        assert_eq!(
            counter.closed + segments_of(counter.open.unwrap().sectors),
            3
        );
        assert_eq!(segments_of(16257), 2);
    }
}
