// SPDX-License-Identifier: GPL-2.0

//! The stack of layers: what the constructor reads from the devices and keeps.
//!
//! All headers and trailers are read at once, then the indexes in batches, so that the I/O of many
//! layers overlaps while memory stays bounded: 16 bytes for each index entry that covers something,
//! beside one batch of raw indexes, then beside the merged index, and that twice when the former are
//! freed. An image can say that it has far more entries than it has bytes, as padding compresses
//! well; so nothing is allocated for what a trailer says but the batch. `rust/image` checks every
//! byte and does the merge.

use super::{
    codec::{
        Digest,
        DigestValue, //
    },
    dax::{
        Memory,
        Options, //
    },
    device_mapper::{
        dm_err,
        Args,
        Constructor,
        CtrContext,
        CtrError,
        TargetDevice,
        PAGE_SECTORS, //
    },
    image::{
        self,
        index::{
            directory_len,
            Index, //
        },
        layer_index::{
            count_segments,
            IndexReader, //
        },
        lsmt::{
            topmost_size,
            Header,
            Trailer,
            ENTRY_BYTES,
            HEADER_BYTES,
            MAX_LAYER_ENTRIES, //
        },
        merge,
        segment::{
            PackedSegment,
            Segment, //
        },
    },
    lower_read::{
        gfp_table,
        read_metadata_batch,
        ReadRequest, //
    },
    merged::{
        Merged,
        PushError, //
    },
    Overlaybd,
};
use core::fmt::Write;
use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// Bytes of raw indexes that are read together. No index is larger.
const BATCH_BYTES: u64 = MAX_LAYER_ENTRIES * ENTRY_BYTES as u64;

/// Bytes of a sector as a power of two.
const SECTOR_SHIFT: u32 = 9;

/// A block of a blob that holds a header or a trailer.
type Block = [u8; HEADER_BYTES];

/// One layer of the stack.
pub(super) struct Layer {
    /// The device that holds the blob, from its first sector on.
    pub(super) device: TargetDevice,
    /// Exact length of the blob in bytes.
    pub(super) blob_bytes: u64,
    /// Sectors of the merged device whose data this layer provides.
    pub(super) owned: u64,
}

impl Layer {
    /// Sectors that the blob takes, the last one perhaps in part.
    pub(super) fn sectors(&self) -> u64 {
        self.blob_bytes.div_ceil(1 << SECTOR_SHIFT)
    }

    /// Logs what is wrong with layer `number` and gives the error for device mapper.
    fn refuse(&self, number: usize, error: image::error::Error) -> CtrError {
        dm_err!(
            Overlaybd,
            "layer {number} ({}): {} at byte {}",
            self.device.name(),
            error.reason().as_str(),
            error.offset()
        );
        CtrError::invalid(error.reason().as_cstr())
    }

    /// The same for an error of the device or of memory.
    pub(super) fn fail(&self, number: usize, message: &'static CStr, errno: Error) -> CtrError {
        dm_err!(
            Overlaybd,
            "layer {number} ({}): {} ({errno:?})",
            self.device.name(),
            message.to_str().unwrap_or("error")
        );
        CtrError::new(errno, message)
    }
}

/// A merged stack of layers.
///
/// # Invariants
///
/// - every segment of `index` has a layer number below `layers.len()`;
/// - its stored sectors are inside that layer's blob, which was inside the device.
pub(super) struct Stack {
    layers: KVec<Layer>,
    index: Index<KVVec<PackedSegment>, KVVec<u32>>,
    virtual_sectors: u64,
    /// Sectors of the largest logical block of the layers' devices, minus 1.
    block_mask: u64,
    /// Of what identifies the layers, see [`digest_layers`].
    digest: DigestValue,
    /// The memory of the layers, where it may be accessed directly.
    memory: Option<Memory>,
}

impl Stack {
    /// Reads and merges the layers that a table line names: `<#layers> <dev> <bytes> ...`, with options.
    ///
    /// `limit` is the number of index entries that is allowed before and after the merge.
    pub(super) fn load(
        ctx: &mut Constructor<'_>,
        mut args: Args<'_>,
        limit: u64,
    ) -> Result<Self, CtrError> {
        let mut layers = open_layers(ctx, &mut args)?;
        let options = Options::parse(ctx, args)?;
        let trailers = read_trailers(ctx, &layers)?;
        let entries = trailers.iter().map(|trailer| trailer.entries).sum::<u64>();
        if entries > limit {
            dm_err!(
                Overlaybd,
                "the layers have {entries} index entries, max_segments allows {limit}"
            );
            return Err(CtrError::new(E2BIG, c"Too many index entries"));
        }
        let sizes = trailers.iter().map(|trailer| trailer.virtual_size);
        let virtual_sectors = topmost_size(sizes).div_ceil(1 << SECTOR_SHIFT);

        let indexes = read_indexes(ctx, &layers, &trailers)?;
        let segments = merge_layers(indexes, virtual_sectors, limit)?;
        count_owned(&mut layers, &segments);
        let block_mask = check_alignment(ctx, &layers, &segments)?;
        let digest = digest_layers(&layers, &trailers);
        let memory = Memory::claim(ctx, options, &layers, &segments)?;

        let directory = KVVec::from_elem(0, directory_len(&segments), gfp_table())?;
        let index = Index::build(segments, directory)
            .map_err(|_| CtrError::invalid(c"Cannot build index"))?;
        // INVARIANT: The reader of layer `n` gives its segments number `n` and checks that their
        // data is in the blob, and neither merge nor index changes them.
        Ok(Self {
            layers,
            index,
            virtual_sectors,
            block_mask,
            digest,
            memory,
        })
    }

    /// The layers, bottom first.
    pub(super) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Layer `number`, 0 = bottom.
    #[inline]
    pub(super) fn layer(&self, number: u8) -> Option<&Layer> {
        self.layers.get(usize::from(number))
    }

    /// The merged index.
    #[inline]
    pub(super) fn index(&self) -> &Index<KVVec<PackedSegment>, KVVec<u32>> {
        &self.index
    }

    /// Sectors that `layer` takes in whole logical blocks of the mapped device.
    ///
    /// Device mapper wants areas in these units, those on devices with smaller blocks too. Blobs
    /// end anywhere; that they are inside their devices is known. No block of a device with direct
    /// access is larger than a page, not even one of the device of zeros.
    pub(super) fn area(&self, layer: &Layer) -> u64 {
        let page_mask = self.memory.as_ref().map_or(0, |_| PAGE_SECTORS - 1);
        layer.sectors() & !(self.block_mask | page_mask)
    }

    /// The memory of the layers, where it may be accessed directly.
    #[inline]
    pub(super) fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// The digest of what identifies all layers.
    pub(super) fn digest(&self) -> DigestValue {
        self.digest
    }

    /// Virtual size in sectors, the last one perhaps in part.
    pub(super) fn virtual_sectors(&self) -> u64 {
        self.virtual_sectors
    }
}

/// Parses the table line and opens the devices.
fn open_layers(ctx: &mut Constructor<'_>, args: &mut Args<'_>) -> Result<KVec<Layer>, CtrError> {
    let count = args.number::<usize>(c"Invalid number of layers")?;
    if count == 0 || count > merge::MAX_LAYERS {
        return Err(CtrError::invalid(c"Number of layers must be 1 to 255"));
    }
    let mut layers = KVec::with_capacity(count, GFP_KERNEL)?;
    for number in 0..count {
        let path = args.next(c"Missing layer device")?;
        let blob_bytes = args.number::<u64>(c"Invalid layer length")?;
        let device = ctx.device(path).map_err(|errno| {
            dm_err!(
                Overlaybd,
                "layer {number}: cannot open {} ({errno:?})",
                path.to_str().unwrap_or("device")
            );
            CtrError::new(errno, c"Cannot open layer device")
        })?;
        let size = ctx
            .device_sectors(&device)
            .context(c"Cannot use layer device")?;
        let layer = Layer {
            device,
            blob_bytes,
            owned: 0,
        };
        if layer.sectors() > size {
            return Err(layer.fail(
                number,
                c"Layer length is beyond the end of its device",
                EINVAL,
            ));
        }
        layers.push(layer, GFP_KERNEL)?;
    }
    Ok(layers)
}

/// Reads and checks the headers and trailers of all layers.
fn read_trailers(ctx: &Constructor<'_>, layers: &[Layer]) -> Result<KVec<Trailer>, CtrError> {
    let mut headers = KVVec::<Block>::from_elem([0; HEADER_BYTES], layers.len(), gfp_table())?;
    let mut blocks = KVVec::<Block>::from_elem([0; HEADER_BYTES], layers.len(), gfp_table())?;
    let mut requests = KVec::with_capacity(layers.len() * 2, GFP_KERNEL)?;
    for (number, (layer, (header, block))) in layers
        .iter()
        .zip(headers.iter_mut().zip(blocks.iter_mut()))
        .enumerate()
    {
        let position =
            Trailer::position(layer.blob_bytes).map_err(|error| layer.refuse(number, error))?;
        requests.push(ReadRequest::new(&layer.device, 0, header), GFP_KERNEL)?;
        requests.push(ReadRequest::new(&layer.device, position, block), GFP_KERNEL)?;
    }
    read_metadata_batch(ctx, &mut requests).context(c"Cannot read layers")?;
    for (number, (layer, pair)) in layers.iter().zip(requests.chunks_exact(2)).enumerate() {
        for request in pair {
            request
                .result()
                .map_err(|errno| layer.fail(number, c"Cannot read header or trailer", errno))?;
        }
    }
    drop(requests);

    let mut trailers = KVec::with_capacity(layers.len(), GFP_KERNEL)?;
    for (number, (layer, (header, block))) in
        layers.iter().zip(headers.iter().zip(&blocks)).enumerate()
    {
        let refuse = |error| layer.refuse(number, error);
        Header::parse_data(header).map_err(refuse)?;
        let trailer = Trailer::parse(block, layer.blob_bytes).map_err(refuse)?;
        trailers.push(trailer, GFP_KERNEL)?;
    }
    Ok(trailers)
}

/// Why an index cannot be taken over.
enum IndexError {
    Image(image::error::Error),
    Memory,
}

impl From<image::error::Error> for IndexError {
    fn from(error: image::error::Error) -> Self {
        Self::Image(error)
    }
}

impl From<AllocError> for IndexError {
    fn from(_: AllocError) -> Self {
        Self::Memory
    }
}

/// Reads and checks the indexes of all layers, bottom first.
fn read_indexes(
    ctx: &Constructor<'_>,
    layers: &[Layer],
    trailers: &[Trailer],
) -> Result<KVec<KVVec<PackedSegment>>, CtrError> {
    let mut indexes = KVec::with_capacity(layers.len(), GFP_KERNEL)?;
    let mut unread = trailers;
    while !unread.is_empty() {
        let batch = unread.split_at(batch_len(unread)).0;
        let first = indexes.len();
        let layers = layers.get(first..).unwrap_or(&[]);
        read_batch(ctx, first, layers, batch, &mut indexes)?;
        unread = unread.get(batch.len()..).unwrap_or(&[]);
    }
    Ok(indexes)
}

/// How many of the next layers have indexes of at most [`BATCH_BYTES`] together, at least one.
fn batch_len(trailers: &[Trailer]) -> usize {
    let mut bytes = 0u64;
    trailers
        .iter()
        .take_while(|trailer| {
            bytes = bytes.saturating_add(trailer.index_bytes());
            bytes <= BATCH_BYTES
        })
        .count()
        .max(1)
}

/// Reads the indexes of `trailers`, which belong to `layers` from number `first` on.
fn read_batch(
    ctx: &Constructor<'_>,
    first: usize,
    layers: &[Layer],
    trailers: &[Trailer],
    indexes: &mut KVec<KVVec<PackedSegment>>,
) -> Result<(), CtrError> {
    let mut buffers = KVec::with_capacity(trailers.len(), GFP_KERNEL)?;
    for trailer in trailers {
        let buffer = KVVec::from_elem(0u8, trailer.index_bytes() as usize, gfp_table())?;
        buffers.push(buffer, GFP_KERNEL)?;
    }
    let mut requests = KVec::with_capacity(trailers.len(), GFP_KERNEL)?;
    for (layer, (trailer, buffer)) in layers.iter().zip(trailers.iter().zip(&mut buffers)) {
        let request = ReadRequest::new(&layer.device, trailer.index_offset, buffer);
        requests.push(request, GFP_KERNEL)?;
    }
    read_metadata_batch(ctx, &mut requests).context(c"Cannot read indexes")?;
    for (at, (layer, request)) in layers.iter().zip(&requests).enumerate() {
        request
            .result()
            .map_err(|errno| layer.fail(first + at, c"Cannot read index", errno))?;
    }
    drop(requests);

    for (at, (layer, (trailer, buffer))) in
        layers.iter().zip(trailers.iter().zip(&buffers)).enumerate()
    {
        let number = first + at;
        let segments =
            decode_index(trailer, number as u8, buffer).map_err(|error| match error {
                IndexError::Image(error) => layer.refuse(number, error),
                IndexError::Memory => layer.fail(number, c"Not enough memory for index", ENOMEM),
            })?;
        indexes.push(segments, GFP_KERNEL)?;
    }
    Ok(())
}

/// Checks the bytes of an index and gives its segments.
fn decode_index(
    trailer: &Trailer,
    number: u8,
    bytes: &[u8],
) -> Result<KVVec<PackedSegment>, IndexError> {
    let mut segments = KVVec::with_capacity(count_segments(bytes), gfp_table())?;
    let mut reader = IndexReader::new(trailer, number);
    reader.feed(bytes, |segment: Segment| -> Result<(), IndexError> {
        Ok(segments.push(PackedSegment::from(segment), gfp_table())?)
    })?;
    reader.finish()?;
    Ok(segments)
}

/// Merges the indexes, which are freed, up to sector `end`.
fn merge_layers(
    indexes: KVec<KVVec<PackedSegment>>,
    end: u64,
    limit: u64,
) -> Result<KVVec<PackedSegment>, CtrError> {
    const UNSORTED: CtrError = CtrError::invalid(c"Cannot merge indexes");
    const NO_MEMORY: CtrError = CtrError::new(ENOMEM, c"Not enough memory for merged index");

    let lanes = merge::lanes_needed(indexes.len());
    let mut scratch = KVVec::from_elem(merge::Lane::default(), lanes, gfp_table())?;
    let entries = indexes.iter().map(|index| index.len()).sum();
    let mut merged = Merged::new(limit, entries).map_err(|_| NO_MEMORY)?;
    // A layer may have entries beyond its own size, and they show under a larger one. The size of
    // the stack alone cuts them.
    merge::merge(&indexes, &mut scratch, |segment| {
        segment
            .before(end)
            .map_or(Ok(()), |segment| merged.push(segment))
    })
    .map_err(|error| match error {
        merge::MergeError::Sink(PushError::TooMany) => {
            dm_err!(
                Overlaybd,
                "the merged index has more segments than max_segments allows, {limit}"
            );
            CtrError::new(E2BIG, c"Too many merged segments")
        }
        merge::MergeError::Sink(PushError::Memory) => NO_MEMORY,
        _ => UNSORTED,
    })?;
    drop(indexes);
    merged.join().map_err(|_| NO_MEMORY)
}

/// Counts for each layer the sectors that it provides in the merged device.
fn count_owned(layers: &mut [Layer], segments: &[PackedSegment]) {
    for segment in segments.iter().filter(|segment| !segment.zeroed()) {
        if let Some(layer) = layers.get_mut(usize::from(segment.layer())) {
            layer.owned = layer.owned.saturating_add(segment.sectors().into());
        }
    }
}

/// The digest of one line for each layer, bottom first: device, length in bytes and UUID, or `-`
/// where the layer has none.
fn digest_layers(layers: &[Layer], trailers: &[Trailer]) -> DigestValue {
    let mut digest = Digest::start();
    for (layer, trailer) in layers.iter().zip(trailers) {
        let uuid = trailer.uuid.as_ref().map_or("-", |uuid| uuid.as_str());
        // A digest takes everything.
        let _ = writeln!(
            digest,
            "{} {} {uuid}",
            layer.device.name(),
            layer.blob_bytes
        );
    }
    digest.finish()
}

/// Refuses a layer on a device with large logical blocks that a bio, cut at the ends of segments,
/// would not fit. Returns the sectors of the largest logical block, minus 1.
fn check_alignment(
    ctx: &Constructor<'_>,
    layers: &[Layer],
    segments: &[PackedSegment],
) -> Result<u64, CtrError> {
    let mut masks = KVec::with_capacity(layers.len(), GFP_KERNEL)?;
    for layer in layers {
        let block = ctx
            .logical_block_size(&layer.device)
            .context(c"Cannot use layer device")?;
        masks.push(
            u64::from(block >> SECTOR_SHIFT).saturating_sub(1),
            GFP_KERNEL,
        )?;
    }
    let block_mask = masks.iter().fold(0, |all, mask| all | mask);
    if block_mask == 0 {
        return Ok(0);
    }
    // Only data goes to a device. Where its segments start and end is where bios are cut.
    for segment in segments.iter().filter(|segment| !segment.zeroed()) {
        let number = usize::from(segment.layer());
        let (Some(layer), Some(mask)) = (layers.get(number), masks.get(number)) else {
            continue;
        };
        if (segment.start() | segment.end() | segment.stored()) & mask != 0 {
            return Err(layer.fail(
                number,
                c"Segments are not aligned to the logical blocks of the layer device",
                EINVAL,
            ));
        }
    }
    Ok(block_mask)
}
