// SPDX-License-Identifier: GPL-2.0

//! Making a layer, or a ZFile, from a raw image.
//!
//! The image is read in windows of 1 MiB, and every window is compared with the base in blocks of 4 KiB
//! ([`crate::compare`]). One thread reads ahead and one writes behind all those that compare and compress, a batch of
//! windows at a time. Memory is bounded by the batch, plus 16 bytes per segment and 4 per compressed block of the
//! result.
//!
//! A layer can have a million segments. An image with more of them is read to its end all the same, to find the
//! shortest gaps whose storing makes it fit, and then once more.

use std::path::{Path, PathBuf};

use ovbd_image::{
    lsmt::{Identity, UuidText, SECTOR_BYTES},
    merge::MAX_LAYERS,
    tar,
    zfile::{Algorithm, Options as ZfileOptions, MAX_BLOCK_BYTES},
};

use crate::{
    codec::Compressor,
    compare::{Changes, Coarseness, Comparison, SegmentCount},
    content_hash::ContentHash,
    error::{Error, Result},
    layer::LayerPath,
    layer_writer::{check_dax_size, check_size, BlobWriter, LayerWriter, MAX_SEGMENTS},
    output::{Output, Rules, Stream},
    parents::Parents,
    pipeline,
    report::Report,
    source::RawSource,
    stack::{Stack, WINDOW_BYTES},
    zfile_writer::{check_blocks, Settings, ZfileWriter},
};

/// Smallest block size of a new ZFile.
pub const MIN_BLOCK_BYTES: u32 = 512;

/// What to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Layers below, bottom first; only the difference to them is stored.
    pub base: Vec<LayerPath>,
    /// Compress the image itself, without making a layer of it.
    pub raw: bool,
    /// Compression; an uncompressed layer where there is none.
    pub zfile: Option<ZfileOptions>,
    /// Compression level; the original's where there is none.
    pub level: Option<i32>,
    /// Lay the layer out for direct access to the memory that it is put in.
    pub dax: bool,
    /// Put the result into the tar wrapper.
    pub tar: bool,
    /// UUID of the layer; derived from the content where there is none.
    pub uuid: Option<UuidText>,
    /// UUID of the layer below; that of the topmost base layer where there is none.
    pub parent_uuid: Option<UuidText>,
    /// Replace an existing file.
    pub replace: bool,
    /// Take the layers of the base as they are given, whatever their parents.
    pub parents: Parents,
    /// Take a source that is mounted for writing.
    pub allow_mounted: bool,
    /// Write also what only our own readers can read.
    pub own_reader_only: bool,
    /// Segments of the layer at most: of more, short gaps are stored.
    pub max_segments: u64,
}

impl Default for Options {
    /// A ZFile as the original makes it by default.
    fn default() -> Self {
        Self {
            base: Vec::new(),
            raw: false,
            zfile: Some(ZfileOptions {
                block_bytes: 4096,
                algorithm: Algorithm::Lz4,
                block_crc: true,
            }),
            level: None,
            dax: false,
            tar: false,
            uuid: None,
            parent_uuid: None,
            replace: false,
            parents: Parents::All,
            allow_mounted: false,
            own_reader_only: false,
            max_segments: MAX_SEGMENTS,
        }
    }
}

impl Options {
    /// The parent that the layer records, over a layer with the UUID `below`.
    pub fn parent(&self, below: Option<UuidText>) -> UuidText {
        self.parent_uuid.or(below).unwrap_or(UuidText::NIL)
    }

    /// Begins the layer in `blob`; `dense` is for one without layers below. The rest is as for [`LayerWriter::new`].
    ///
    /// # Errors
    ///
    /// Those of [`LayerWriter::new`].
    pub fn begin_layer<'a>(
        &self,
        blob: BlobWriter<'a>,
        path: &'a Path,
        first: &Identity,
        dense: bool,
    ) -> Result<LayerWriter<'a>> {
        let mut layer = LayerWriter::new(blob, path, first)?;
        if self.dax {
            layer.lay_out_for_dax(dense)?;
        }
        Ok(layer)
    }

    /// Refuses a base on which no layer fits; the error is about `path`.
    ///
    /// # Errors
    ///
    /// That one.
    pub fn check_room(&self, path: &Path) -> Result<()> {
        // The new layer is one more.
        if self.base.len() < MAX_LAYERS {
            return Ok(());
        }
        let what = format!(
            "a stack has at most {MAX_LAYERS} layers, so none fits on a base of {}",
            self.base.len()
        );
        Err(Error::new(path, what))
    }

    /// Begins what is made: a file, which replaces neither a layer of the base nor one of `inputs`, or standard output.
    /// These and standard input are `-`.
    ///
    /// # Errors
    ///
    /// Those of [`Output::create_file`].
    pub fn create(&self, path: &Path, inputs: &[&Path]) -> Result<Output> {
        match path == Path::new("-") {
            true => Output::standard(),
            false => self.create_file(path, inputs),
        }
    }

    /// As [`Options::create`], always a file.
    ///
    /// # Errors
    ///
    /// Those of [`Output::create_file`].
    pub fn create_file(&self, path: &Path, inputs: &[&Path]) -> Result<Output> {
        let base = self.base.iter().flat_map(LayerPath::files);
        let inputs: Vec<PathBuf> = base
            .chain(inputs.iter().copied())
            .filter(|input| *input != Path::new("-"))
            .map(Path::to_owned)
            .collect();
        let rules = Rules {
            replace: self.replace,
            inputs: &inputs,
            ..Rules::default()
        };
        Output::create_file(path, rules)
    }

    /// Checks what does not depend on any file.
    ///
    /// # Errors
    ///
    /// Why the options cannot be used.
    pub fn check(&self) -> std::result::Result<(), String> {
        if self.dax && (self.raw || self.zfile.is_some() || self.tar) {
            return Err(
                "only an uncompressed layer without a wrapper can be accessed directly".to_owned(),
            );
        }
        let Some(zfile) = &self.zfile else {
            return match (self.raw, self.level) {
                (true, _) => Err("only a ZFile can be made around raw bytes".to_owned()),
                (_, Some(_)) => Err("an uncompressed layer has no compression level".to_owned()),
                _ => Ok(()),
            };
        };
        let block = zfile.block_bytes;
        if !block.is_power_of_two() || !(MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&block) {
            return Err(format!(
                "block size {block} is not a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
            ));
        }
        let levels = Compressor::levels(zfile.algorithm);
        match self.level {
            Some(level) if !levels.contains(&level) => Err(format!(
                "{} has levels {} to {}",
                zfile.algorithm.as_str(),
                levels.start(),
                levels.end()
            )),
            _ => Ok(()),
        }
    }
}

/// Makes `path` from the raw image `source`; each may be `-` for a pipe.
///
/// # Errors
///
/// A source that cannot be read, that may be written or that changes meanwhile, a base that cannot be read or is in the
/// wrong order, an image that a layer cannot hold, and those of writing. Nothing is left behind then.
pub fn build(source: &Path, path: &Path, options: &Options, report: &dyn Report) -> Result<()> {
    options.check().map_err(|what| Error::new(path, what))?;
    let raw = RawSource::open(source, options.allow_mounted)?;
    check_source(&raw, options)?;
    options.check_room(path)?;
    let base = match options.base.as_slice() {
        [] => None,
        layers => Some(Stack::open(layers, options.parents)?),
    };
    let output = options.create(path, &[source])?;
    if !raw.is_stream() {
        report.expect(raw.bytes());
    }
    // Any bytes can be compressed.
    if let (false, Some(kind)) = (options.raw, raw.foreign_kind()?) {
        let what = format!("is {kind}, and taken for a raw image byte by byte");
        report.warn(&Error::new(raw.path(), what));
    }
    let (start, end) = match options.raw {
        true => compress_all(&raw, &output, path, options, report)?,
        false => {
            let comparison = Comparison::new(&raw, base.as_ref());
            write_layer(&comparison, &output, path, options, report)?
        }
    };
    raw.check_unchanged()?;
    finish_output(output, options, start, end)
}

/// Refuses what cannot become a layer, as far as it is known before anything is written.
fn check_source(raw: &RawSource, options: &Options) -> Result<()> {
    match options.zfile {
        Some(zfile) if options.raw => {
            let blocks = raw.bytes().div_ceil(u64::from(zfile.block_bytes));
            check_blocks(raw.path(), blocks)
        }
        _ if raw.bytes() == 0 && !raw.is_stream() => Err(Error::new(raw.path(), "is empty")),
        _ if options.dax => check_dax_size(raw.path(), raw.bytes()),
        _ => check_size(raw.path(), raw.bytes()),
    }
}

/// Starts the blob in `output`, which is called `path` in errors; returns it and its first byte.
///
/// # Errors
///
/// A tar wrapper in a pipe: its header has the size, which is known at the end. And those of writing.
pub fn start_blob<'a>(
    output: &'a Output,
    path: &'a Path,
    options: &Options,
) -> Result<(BlobWriter<'a>, u64)> {
    if options.tar && output.is_stream() {
        let what = "a pipe, but the tar wrapper starts with the size, which only a file gets";
        return Err(Error::new(path, what));
    }
    let start = if options.tar {
        tar::HEADER_BYTES as u64
    } else {
        0
    };
    let blob = match options.zfile {
        None => BlobWriter::Plain(Stream::new(output, start)),
        Some(zfile) => {
            let settings = Settings {
                options: zfile,
                level: options.level,
                own_reader_only: options.own_reader_only,
            };
            let writer = ZfileWriter::new(output, path, start, settings)?;
            BlobWriter::Zfile(Box::new(writer))
        }
    };
    Ok((blob, start))
}

/// Bytes of a tar wrapper with a blob of `blob_bytes` in it: header, blob, padding and the end of a tar.
pub fn wrapped_bytes(blob_bytes: u64) -> u64 {
    let end = tar::HEADER_BYTES as u64 + blob_bytes;
    end.next_multiple_of(tar::BLOCK_BYTES as u64) + 2 * tar::BLOCK_BYTES as u64
}

/// Puts the wrapper around a blob from byte `start` to `end`, and gives the output its name.
///
/// # Errors
///
/// Those of writing.
pub fn finish_output(output: Output, options: &Options, start: u64, end: u64) -> Result<()> {
    if options.tar {
        output.write_at(&tar::header(end - start), 0)?;
        output.set_size(wrapped_bytes(end - start))?;
    }
    output.finish()
}

/// Makes a ZFile around the image; returns its first byte and the one after it.
fn compress_all(
    raw: &RawSource,
    output: &Output,
    path: &Path,
    options: &Options,
    report: &dyn Report,
) -> Result<(u64, u64)> {
    let (mut blob, start) = start_blob(output, path, options)?;
    let buffers = pipeline::Pool::<Vec<u8>>::default();
    let mut at = 0;
    let read = |window| {
        let mut data = buffers.take().unwrap_or_default();
        raw.read_window(window, &mut data)?;
        Ok((window * WINDOW_BYTES, data))
    };
    pipeline::run(raw.windows(), read, Ok, |(first, data)| {
        // Windows that are left out are holes.
        blob.zeros(first - at)?;
        blob.write(&data)?;
        let end = first + data.len() as u64;
        report.add(end - at);
        at = end;
        buffers.put(data);
        Ok(())
    })?;
    blob.zeros(raw.bytes() - at)?;
    report.add(raw.bytes() - at);
    Ok((start, blob.finish()?))
}

/// Makes a layer; returns its first byte and the one after it.
fn write_layer(
    comparison: &Comparison<'_>,
    output: &Output,
    path: &Path,
    options: &Options,
    report: &dyn Report,
) -> Result<(u64, u64)> {
    let finest = Coarseness::default();
    let written = write_as_coarse(comparison, finest, output, path, options, report)?;
    let needs = match written {
        Written::Whole(start, end) => return Ok((start, end)),
        Written::TooManySegments(count) => count,
    };
    let segments = needs.of(finest);
    let most = options.max_segments;
    let refuse = |why: &str| {
        let what = format!("needs {segments} segments, of which a layer can have {most}{why}");
        Err(Error::new(path, what))
    };
    if comparison.source().is_stream() || output.is_stream() {
        return refuse("; from a file to a file short gaps are stored so that it fits");
    }
    let Some(coarseness) = needs.finest_that_fits(most) else {
        return refuse(", however large the gaps that are stored");
    };
    let what = format!(
        "{segments} segments, of which a layer can have {most}: gaps below {} bytes are stored",
        coarseness.bytes()
    );
    report.warn(&Error::new(path, what));
    report.expect(2 * comparison.source().bytes());
    output.set_size(0)?;
    match write_as_coarse(comparison, coarseness, output, path, options, report)? {
        Written::Whole(start, end) => Ok((start, end)),
        Written::TooManySegments(_) => Err(Error::new(path, "the image changed meanwhile")),
    }
}

/// What became of a layer.
enum Written {
    /// It is there: its first byte, and the one after it.
    Whole(u64, u64),
    /// It needs more segments than a layer can have. What was written is of no use.
    TooManySegments(Box<SegmentCount>),
}

fn write_as_coarse(
    comparison: &Comparison<'_>,
    coarseness: Coarseness,
    output: &Output,
    path: &Path,
    options: &Options,
    report: &dyn Report,
) -> Result<Written> {
    let source = comparison.source();
    let (blob, start) = start_blob(output, path, options)?;
    let parent_uuid = options.parent(comparison.below());
    let first = Identity {
        virtual_size: match source.is_stream() {
            true => 0,
            false => source.bytes(),
        },
        uuid: options.uuid.unwrap_or(UuidText::NIL),
        parent_uuid,
    };
    // What does not fit is only counted.
    let dense = options.base.is_empty();
    let mut layer = Some(options.begin_layer(blob, path, &first, dense)?);
    let mut hash = ContentHash::default();
    let mut count = SegmentCount::default();
    let mut done = 0;
    pipeline::run(
        comparison.windows(),
        |window| comparison.read(window),
        |read| comparison.compare(read, coarseness),
        |changes| {
            report.add(changes.end - done);
            done = changes.end;
            count.add(&changes);
            if count.of(coarseness) > options.max_segments {
                layer = None;
            }
            if let Some(layer) = &mut layer {
                hash.add(&changes.summary);
                write_changes(layer, &changes)?;
            }
            comparison.put_back(changes);
            Ok(())
        },
    )?;
    let virtual_size = source.bytes();
    if virtual_size == 0 {
        return Err(Error::new(source.path(), "is empty"));
    }
    report.add(virtual_size - done);
    let Some(layer) = layer else {
        return Ok(Written::TooManySegments(Box::new(count)));
    };
    let identity = Identity {
        virtual_size,
        uuid: options
            .uuid
            .unwrap_or_else(|| hash.uuid(virtual_size, parent_uuid)),
        parent_uuid,
    };
    Ok(Written::Whole(start, layer.finish(&identity)?))
}

fn write_changes(layer: &mut LayerWriter<'_>, changes: &Changes) -> Result<()> {
    if let Some(blank) = changes.blank {
        layer.set_blank(blank);
    }
    let mut data = changes.data.as_slice();
    for run in &changes.runs {
        if run.zeroed {
            layer.zeros(run.start, run.sectors)?;
        } else {
            let (now, later) = data.split_at((run.sectors * SECTOR_BYTES) as usize);
            layer.data(run.start, now)?;
            data = later;
        }
    }
    Ok(())
}
