// SPDX-License-Identifier: GPL-2.0

//! Making a layer, or a ZFile, from a raw image.
//!
//! The image is read in windows of 1 MiB, and every window is compared with the base in blocks of 4 KiB. One
//! thread reads ahead and one writes behind all those that compare and compress, a batch of windows at a
//! time. Memory is bounded by the batch, plus 16 bytes per segment and 4 per compressed block of the result.

use std::{
    path::{Path, PathBuf},
    sync::mpsc::sync_channel,
    thread,
};

use ovbd_image::{
    lsmt::{Identity, UuidText, SECTOR_BYTES},
    tar,
    zfile::{Algorithm, Options as ZfileOptions, MAX_BLOCK_BYTES},
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::{
    codec::Compressor,
    error::{Error, Result},
    layer::LayerPath,
    layer_writer::{BlobWriter, LayerWriter},
    output::{Output, Rules, Stream},
    parents::Parents,
    pool::Pool,
    report::Report,
    source::RawSource,
    stack::{Stack, StackReader, WINDOW_BYTES},
    zeros::{is_zero, GRANULE_BYTES},
    zfile_writer::ZfileWriter,
};

/// Smallest block size of a new ZFile.
pub const MIN_BLOCK_BYTES: u32 = 512;

/// Windows of a batch per thread.
const WINDOWS_PER_THREAD: usize = 2;

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
            tar: false,
            uuid: None,
            parent_uuid: None,
            replace: false,
            parents: Parents::All,
        }
    }
}

impl Options {
    /// Checks what does not depend on any file.
    ///
    /// # Errors
    ///
    /// Why the options cannot be used.
    pub fn check(&self) -> std::result::Result<(), String> {
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

/// Makes `path` from the raw image `source`.
///
/// # Errors
///
/// A source that cannot be read or that changes meanwhile, a base that cannot be read, an image with more
/// segments than a layer can have, and those of writing. Nothing is left behind then.
pub fn build(source: &Path, path: &Path, options: &Options, report: &dyn Report) -> Result<()> {
    options.check().map_err(|what| Error::new(path, what))?;
    let raw = RawSource::open(source)?;
    if raw.bytes() == 0 && !options.raw {
        return Err(Error::new(source, "is empty"));
    }
    let base = match options.base.as_slice() {
        [] => None,
        layers => Some(Stack::open(layers, options.parents)?),
    };
    let base_files = options.base.iter().flat_map(LayerPath::files);
    let inputs: Vec<PathBuf> = base_files.chain([source]).map(Path::to_owned).collect();
    let rules = Rules {
        replace: options.replace,
        inputs: &inputs,
        ..Rules::default()
    };
    let output = Output::create_file(path, rules)?;
    let (blob, start) = start_blob(&output, path, options)?;
    let input = Windows {
        source: &raw,
        base: base.as_ref(),
        readers: Pool::default(),
        buffers: Pool::default(),
    };
    let end = if options.raw {
        compress_all(&input, blob, report)?
    } else {
        write_layer(&input, blob, path, options, report)?
    };
    raw.check_unchanged()?;
    finish_output(output, options, start, end)
}

/// Starts the blob in `output`, which is called `path` in errors; returns it and its first byte.
pub fn start_blob<'a>(
    output: &'a Output,
    path: &'a Path,
    options: &Options,
) -> Result<(BlobWriter<'a>, u64)> {
    let start = if options.tar {
        tar::HEADER_BYTES as u64
    } else {
        0
    };
    let blob = match options.zfile {
        None => BlobWriter::Plain(Stream::new(output, start)),
        Some(zfile) => {
            let level = options.level.filter(|level| *level != 0);
            let writer = ZfileWriter::new(output, path, start, zfile, level)?;
            BlobWriter::Zfile(Box::new(writer))
        }
    };
    Ok((blob, start))
}

/// Puts the wrapper around a blob from byte `start` to `end`, and gives the output its name.
pub fn finish_output(output: Output, options: &Options, start: u64, end: u64) -> Result<()> {
    if options.tar {
        output.write_at(&tar::header(end - start), 0)?;
        let padded = end.next_multiple_of(tar::BLOCK_BYTES as u64);
        output.set_size(padded + 2 * tar::BLOCK_BYTES as u64)?;
    }
    output.finish()
}

fn compress_all(input: &Windows<'_>, mut blob: BlobWriter<'_>, report: &dyn Report) -> Result<u64> {
    let windows = 0..input.source.bytes().div_ceil(WINDOW_BYTES);
    in_batches(
        windows,
        |window| input.read(window),
        Ok,
        |data| {
            report.add(data.len() as u64);
            let written = blob.write(&data);
            input.buffers.put(data);
            written
        },
    )?;
    blob.finish()
}

fn write_layer<'a>(
    input: &Windows<'_>,
    blob: BlobWriter<'a>,
    path: &'a Path,
    options: &Options,
    report: &dyn Report,
) -> Result<u64> {
    let virtual_size = input.source.bytes();
    let parent_uuid = options
        .parent_uuid
        .or_else(|| input.base?.top()?.uuid())
        .unwrap_or(UuidText::NIL);
    let mut content = Sha256::new();
    content.update(virtual_size.to_le_bytes());
    content.update(parent_uuid.as_str());
    let mut layer = LayerWriter::new(blob, path, virtual_size, options.uuid, parent_uuid)?;
    let mut done = 0;
    in_batches(
        input.changed_windows(),
        |window| Ok((window, input.read(window)?)),
        |(window, data)| input.compare(window, data),
        |changes| {
            report.add(changes.end - done);
            done = changes.end;
            if !changes.runs.is_empty() {
                content.update(changes.digest.to_le_bytes());
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
            input.buffers.put(changes.data);
            Ok(())
        },
    )?;
    report.add(virtual_size - done);
    let identity = Identity {
        virtual_size,
        uuid: options.uuid.unwrap_or_else(|| derive_uuid(content)),
        parent_uuid,
    };
    layer.finish(&identity)
}

/// A UUID of version 8 (custom) from a hash of the content.
pub fn derive_uuid(content: Sha256) -> UuidText {
    let hash = content.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid_text(uuid::Uuid::new_v8(bytes))
}

/// A UUID as the original writes it: in upper case.
pub fn uuid_text(uuid: uuid::Uuid) -> UuidText {
    let mut buffer = uuid::Uuid::encode_buffer();
    let text = uuid.hyphenated().encode_upper(&mut buffer);
    UuidText::new(text.as_bytes()).unwrap_or(UuidText::NIL)
}

/// Calls `read` for every window on a thread of its own, `prepare` for what was read on all threads, and
/// `consume` for every result in order.
fn in_batches<R: Send, T: Send>(
    windows: impl Iterator<Item = u64> + Send,
    read: impl Fn(u64) -> Result<R> + Send,
    prepare: impl Fn(R) -> Result<T> + Sync,
    mut consume: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let size = WINDOWS_PER_THREAD * rayon::current_num_threads();
    let (queue, ready) = sync_channel(size);
    // The closure owns `ready`: once it returns, with an error or not, the thread cannot go on reading.
    thread::scope(move |scope| {
        scope.spawn(move || {
            for window in windows {
                if queue.send(read(window)).is_err() {
                    break;
                }
            }
        });
        loop {
            let batch: Vec<Result<R>> = ready.iter().take(size).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let prepared: Vec<Result<T>> =
                batch.into_par_iter().map(|item| prepare(item?)).collect();
            prepared.into_iter().try_for_each(|item| consume(item?))?;
        }
    })
}

/// A run of sectors of a window that is to be stored.
struct Run {
    start: u64,
    sectors: u64,
    zeroed: bool,
}

/// What is to be stored of a window.
struct Changes {
    /// Byte of the image after the window.
    end: u64,
    runs: Vec<Run>,
    /// Starts with the data of all runs that are not zeroed.
    data: Vec<u8>,
    /// Hash of runs and data.
    digest: u128,
}

/// The image and its base, read window by window.
struct Windows<'a> {
    source: &'a RawSource,
    base: Option<&'a Stack>,
    readers: Pool<(StackReader<'a>, Vec<u8>)>,
    buffers: Pool<Vec<u8>>,
}

impl Windows<'_> {
    /// Windows that can differ from the base, in order: where the image has data, and where the base has.
    fn changed_windows(&self) -> impl Iterator<Item = u64> + Send + '_ {
        let end = self.source.bytes().div_ceil(SECTOR_BYTES);
        let mut ours = self.source.windows().peekable();
        let mut theirs = self
            .base
            .into_iter()
            .flat_map(move |base| base.data_windows(end))
            .peekable();
        std::iter::from_fn(move || {
            let window = match (ours.peek(), theirs.peek()) {
                (Some(a), Some(b)) => *a.min(b),
                (Some(a), None) => *a,
                (None, b) => *b?,
            };
            ours.next_if_eq(&window);
            theirs.next_if_eq(&window);
            Some(window)
        })
    }

    /// Reads a window; the last one may be shorter.
    fn read(&self, window: u64) -> Result<Vec<u8>> {
        let at = window * WINDOW_BYTES;
        let mut data = self.buffers.take().unwrap_or_default();
        data.resize((self.source.bytes() - at).min(WINDOW_BYTES) as usize, 0);
        self.source.read(&mut data, at)?;
        Ok(data)
    }

    /// Finds out what of the `data` of a window must be stored.
    fn compare(&self, window: u64, mut data: Vec<u8>) -> Result<Changes> {
        let start = window * WINDOW_BYTES;
        let end = start + data.len() as u64;
        // The last sector is stored whole.
        data.resize(data.len().next_multiple_of(SECTOR_BYTES as usize), 0);
        let mut runs: Vec<Run> = Vec::new();
        let mut kept = 0;
        // The hash only has to tell contents apart, at a fraction of the cost of compressing them.
        let mut hash = Xxh3::new();
        self.with_base(start, data.len(), |base| {
            for at in (0..data.len()).step_by(GRANULE_BYTES) {
                let to = data.len().min(at + GRANULE_BYTES);
                let granule = &data[at..to];
                let zeroed = is_zero(granule);
                let same = base.map_or(zeroed, |base| base[at..to] == *granule);
                if same {
                    continue;
                }
                let first = (start + at as u64) / SECTOR_BYTES;
                let sectors = (to - at) as u64 / SECTOR_BYTES;
                match runs.last_mut() {
                    Some(run) if run.zeroed == zeroed && run.start + run.sectors == first => {
                        run.sectors += sectors;
                    }
                    _ => runs.push(Run {
                        start: first,
                        sectors,
                        zeroed,
                    }),
                }
                if !zeroed {
                    hash.update(granule);
                    if kept != at {
                        data.copy_within(at..to, kept);
                    }
                    kept += to - at;
                }
            }
            Ok(())
        })?;
        for run in &runs {
            hash.update(&run.start.to_le_bytes());
            hash.update(&run.sectors.to_le_bytes());
            hash.update(&[u8::from(run.zeroed)]);
        }
        Ok(Changes {
            end,
            runs,
            data,
            digest: hash.digest128(),
        })
    }

    /// Calls `work` with `bytes` of the base from byte `start` on.
    ///
    /// What lower layers hold beyond the end of the base's device counts: it would show through.
    fn with_base(
        &self,
        start: u64,
        bytes: usize,
        work: impl FnOnce(Option<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        let Some(base) = self.base else {
            return work(None);
        };
        self.readers.with(
            || Ok((base.reader(), Vec::new())),
            |(reader, buffer)| {
                buffer.resize(bytes, 0);
                reader.read(buffer, start)?;
                work(Some(buffer))
            },
        )
    }
}
