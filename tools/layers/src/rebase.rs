// SPDX-License-Identifier: GPL-2.0

//! Making of a layer one over another stack, with the same changes.
//!
//! What the layer changed is compared with what the new stack has instead of the old one, in blocks of 4 KiB, and only
//! where the layer owns something. A block that both changed, not to the same, cannot be merged here: nobody knows what is
//! in it.

use std::path::Path;

use ovbd_image::{
    lsmt::{Identity, UuidText, SECTOR_BYTES},
    segment::PackedSegment,
};

use crate::{
    build::{finish_output, start_blob, Options},
    content_hash::ContentHash,
    error::{Error, Result},
    layer::{Layer, LayerPath},
    layer_writer::{blank_sectors, LayerWriter},
    parents::Parents,
    pipeline::{self, Pool},
    report::Report,
    stack::{check_count, windows_of, Stack, StackReader, WINDOW_BYTES},
    zeros::GRANULE_BYTES,
};

/// What is known of a layer, and where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The layer.
    pub layer: &'a LayerPath,
    /// The stack that it was made over, bottom first. The one that it goes on is in the options.
    pub from: &'a [LayerPath],
}

/// The layer that was made.
#[derive(Clone, Copy, Debug)]
pub struct Rebased {
    /// Its UUID.
    pub uuid: UuidText,
    /// The UUID of the layer below.
    pub parent_uuid: UuidText,
    /// Bytes of the device.
    pub virtual_bytes: u64,
    /// Bytes that it changes.
    pub changed_bytes: u64,
    /// Bytes that are left out: the layer stored them and they are the same below it.
    pub same_bytes: u64,
}

/// Makes `path` of the layer, over the stack in `options.base`; `-` is standard output.
///
/// # Errors
///
/// Layers that cannot be read, a block or the size of the device that is changed in two ways, and those of writing.
/// Nothing is left behind then.
pub fn rebase(
    request: Request<'_>,
    path: &Path,
    options: &Options,
    report: &dyn Report,
) -> Result<Rebased> {
    options.check().map_err(|what| Error::new(path, what))?;
    options.check_room(path)?;
    let bases = Bases::open(request, options)?;
    let virtual_bytes = bases.virtual_bytes()?;
    let inputs: Vec<&Path> = (request.from.iter().chain([request.layer]))
        .flat_map(LayerPath::files)
        .collect();
    let output = options.create(path, &inputs)?;
    let (blob, start) = start_blob(&output, path, options)?;
    let mut identity = Identity {
        virtual_size: virtual_bytes,
        uuid: options.uuid.unwrap_or(UuidText::NIL),
        parent_uuid: options.parent(bases.to.top().and_then(Layer::uuid)),
    };
    let mut layer = LayerWriter::new(blob, path, &identity)?;
    layer.set_blank(bases.blank()?);
    let mut hash = ContentHash::default();
    let mut total = Changes::default();
    report.expect(bases.segments().iter().map(bytes_of).sum());
    let buffers = Pool::default();
    pipeline::run(
        bases.windows(),
        Ok,
        |window| {
            let make = || Ok(Buffers::new(&bases));
            buffers.with(make, |buffers| {
                bases.compare(window, virtual_bytes, buffers)
            })
        },
        |changes| {
            for (start, data) in &changes.stored {
                layer.blocks(*start, data, &mut hash)?;
                total.changed += data.len() as u64;
            }
            total.same += changes.same;
            total.collisions += changes.collisions;
            total.first = total.first.or(changes.first);
            report.add(changes.owned);
            Ok(())
        },
    )?;
    if let Some(first) = total.first {
        let what = format!(
            "cannot go on {}: {} blocks of {GRANULE_BYTES} bytes that it changed are not as they were below it, the first",
            bases.to.top().map_or(Path::new("-"), Layer::path).display(),
            total.collisions,
        );
        return Err(Error::new(bases.layer().path(), what).at_byte(first));
    }
    if options.uuid.is_none() {
        identity.uuid = hash.uuid(virtual_bytes, identity.parent_uuid);
    }
    let end = layer.finish(&identity)?;
    finish_output(output, options, start, end)?;
    Ok(Rebased {
        uuid: identity.uuid,
        parent_uuid: identity.parent_uuid,
        virtual_bytes,
        changed_bytes: total.changed,
        same_bytes: total.same,
    })
}

fn bytes_of(segment: &PackedSegment) -> u64 {
    u64::from(segment.sectors()) * SECTOR_BYTES
}

/// What is compared.
struct Bases {
    /// The stack that the layer was made over.
    from: Stack,
    /// The same with the layer.
    whole: Stack,
    /// The stack that it goes on.
    to: Stack,
}

impl Bases {
    fn open(request: Request<'_>, options: &Options) -> Result<Self> {
        let mut paths = request.from.to_vec();
        paths.push(request.layer.clone());
        check_count(&paths)?;
        let whole = Stack::open(&paths, options.parents)?;
        let below = whole.layers().len() - 1;
        // They are in order: that was checked with the layer.
        let from = Stack::new(whole.layers()[..below].to_vec(), Parents::Ignored)?;
        let to = Stack::open(&options.base, options.parents)?;
        Ok(Self { from, whole, to })
    }

    /// The layer.
    fn layer(&self) -> &Layer {
        &self.whole.layers()[self.whole.layers().len() - 1]
    }

    fn segments(&self) -> &[PackedSegment] {
        self.layer().segments()
    }

    /// The size that the device has with both changes.
    fn virtual_bytes(&self) -> Result<u64> {
        let [from, whole, to] = [&self.from, &self.whole, &self.to].map(Stack::virtual_bytes);
        match (whole == from, to == from || to == whole) {
            (true, _) => Ok(to),
            (_, true) => Ok(whole),
            _ => {
                let what = format!(
                    "makes {whole} bytes of a device of {from}, and the stack it goes on has {to}"
                );
                Err(Error::new(self.layer().path(), what))
            }
        }
    }

    /// The numbers of the windows in which the layer owns something, in order.
    fn windows(&self) -> impl Iterator<Item = u64> + Send + '_ {
        let segments = self.segments().iter();
        windows_of(segments.map(|segment| segment.start()..segment.end()))
    }

    /// [`blank_sectors`] of the device.
    fn blank(&self) -> Result<u64> {
        let (mut new, mut below) = ([0; GRANULE_BYTES], [0; GRANULE_BYTES]);
        self.whole.reader().read(&mut new, 0)?;
        self.to.reader().read(&mut below, 0)?;
        Ok(blank_sectors(&new, Some(&below)))
    }

    /// What of a window the new layer, of a device of so many bytes, holds.
    fn compare(
        &self,
        window: u64,
        virtual_bytes: u64,
        buffers: &mut Buffers<'_>,
    ) -> Result<Changes> {
        const GRANULE_SECTORS: u64 = GRANULE_BYTES as u64 / SECTOR_BYTES;
        let start = window * WINDOW_BYTES;
        let end = (start + WINDOW_BYTES) / SECTOR_BYTES;
        let segments = self.segments();
        let first = segments.partition_point(|segment| segment.end() <= start / SECTOR_BYTES);
        let owned = segments[first..]
            .iter()
            .take_while(|segment| segment.start() < end);
        let mut changes = Changes::default();
        let mut touched = [false; WINDOW_BYTES as usize / GRANULE_BYTES];
        for segment in owned {
            let from = segment.start().max(start / SECTOR_BYTES);
            let to = segment.end().min(end);
            changes.owned += (to - from) * SECTOR_BYTES;
            let inside = |sector: u64| ((sector - start / SECTOR_BYTES) / GRANULE_SECTORS) as usize;
            touched[inside(from)..=inside(to - 1)].fill(true);
        }
        buffers.read(start)?;
        let device = virtual_bytes.next_multiple_of(SECTOR_BYTES);
        let granules = buffers.granules().enumerate();
        for (number, (old, new, below)) in granules.filter(|(number, _)| touched[*number]) {
            let at = start + (number * GRANULE_BYTES) as u64;
            if new == old || new == below {
                changes.same += GRANULE_BYTES as u64;
            } else if old != below || at >= device {
                changes.collisions += 1;
                changes.first.get_or_insert(at);
            } else {
                let bytes = (device - at).min(GRANULE_BYTES as u64) as usize;
                let data = new[..bytes].to_vec();
                changes.stored.push((at / SECTOR_BYTES, data));
            }
        }
        Ok(changes)
    }
}

/// What was found, in bytes.
#[derive(Default)]
struct Changes {
    /// Blocks to store, by their first sector.
    stored: Vec<(u64, Vec<u8>)>,
    /// Bytes of these.
    changed: u64,
    /// What the layer owned.
    owned: u64,
    /// Left out, in whole blocks.
    same: u64,
    /// Blocks that cannot be merged, and the first byte of the first.
    collisions: u64,
    first: Option<u64>,
}

/// One window of the three stacks.
struct Buffers<'a>([(StackReader<'a>, Vec<u8>); 3]);

impl<'a> Buffers<'a> {
    fn new(bases: &'a Bases) -> Self {
        let stacks = [&bases.from, &bases.whole, &bases.to];
        Self(stacks.map(|stack| (stack.reader(), vec![0; WINDOW_BYTES as usize])))
    }

    fn read(&mut self, start: u64) -> Result<()> {
        let mut all = self.0.iter_mut();
        all.try_for_each(|(reader, data)| reader.read(data, start))
    }

    /// The blocks below the layer, with it, and of the stack that it goes on.
    fn granules(&self) -> impl Iterator<Item = (&[u8], &[u8], &[u8])> {
        let [old, new, below] = &self.0;
        let two = old.1.chunks(GRANULE_BYTES).zip(new.1.chunks(GRANULE_BYTES));
        two.zip(below.1.chunks(GRANULE_BYTES))
            .map(|((old, new), below)| (old, new, below))
    }
}
