// SPDX-License-Identifier: GPL-2.0

//! Making a layer over a tar: header, the tar, what a file system has besides, index and trailer.
//!
//! The tar is read once: a thread decompresses, another gives it to the tool that makes the file system and hashes it,
//! and here its pieces are hashed and it is written to the layer. Then the file system is compared with the base, and the
//! blocks that differ are looked for in the tar. In the end the file system is compared with what the finished layer reads,
//! byte for byte, before the layer gets its name.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::{Identity, UuidText, SECTOR_BYTES};

use super::{
    filesystem::{scratch_folder, Job, Kind, Maker},
    original::DiffId,
    pieces::Scanner,
    plan::{Hashed, Plan, Run, Source},
    source::TarSource,
};
use crate::{
    build::{finish_output, start_blob, Options},
    compare::{Coarseness, Comparison},
    content_hash::ContentHash,
    error::{Error, Result},
    export::each_window,
    layer::{Layer, LayerPath},
    layer_writer::LayerWriter,
    output::Output,
    parents::Parents,
    pipeline,
    report::Report,
    source::RawSource,
    stack::Stack,
    stack_or_zfile::StackOrZfile,
    zeros::{non_zero_runs, GRANULE_BYTES},
};

/// What to make besides what [`Options`] says.
#[derive(Clone, Copy, Debug)]
pub struct TarOptions {
    /// The file system.
    pub filesystem: Kind,
    /// Bytes of the tar at most.
    pub max_bytes: u64,
}

/// What was made.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// SHA-256 of the tar, which is its digest in the configuration of an image.
    pub diff_id: DiffId,
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Bytes of the file system that are not in the tar.
    pub stored_bytes: u64,
    /// Segments of the index.
    pub segments: u64,
}

/// Makes `path`, a layer over the tar `source`, which may be `-` for a pipe.
///
/// # Errors
///
/// A source that cannot be read, is no tar, is too large or changes meanwhile; a base that cannot be read or is no such
/// file system; what the file system's tool says; and those of writing. Nothing is left behind then.
pub fn build_from_tar(
    source: &Path,
    path: &Path,
    options: &Options,
    tar: TarOptions,
    report: &dyn Report,
) -> Result<Made> {
    build_next(source, path, options, tar, &mut None, report)
}

/// As [`build_from_tar`], for the layers of an image one after the other: `image` is the file system of the layers in
/// `options.base`, if it is there from the call before, and then that of the new layer too.
///
/// # Errors
///
/// As [`build_from_tar`]; there is no `image` then.
pub fn build_next(
    source: &Path,
    path: &Path,
    options: &Options,
    tar: TarOptions,
    image: &mut Option<File>,
    report: &dyn Report,
) -> Result<Made> {
    options.check().map_err(|what| Error::new(path, what))?;
    options.check_room(path)?;
    if !options.base.is_empty() && !tar.filesystem.goes_over_layers() {
        let what = format!(
            "no {} can be made over other layers (erofs can)",
            tar.filesystem.name()
        );
        return Err(Error::new(path, what));
    }
    let input = TarSource::open(source)?;
    let is_pipe = || {
        let what = "a pipe, but the layer is compared with the file system before it gets its name";
        Err(Error::new(path, what))
    };
    if path == Path::new("-") {
        return is_pipe();
    }
    let output = options.create_file(path, &[source])?;
    if output.is_stream() {
        return is_pipe();
    }
    let folder = scratch_folder(path);
    let (file, holds_base) = match image.take().filter(|_| !options.base.is_empty()) {
        Some(file) => (file, true),
        None => {
            let file = tempfile::tempfile_in(&folder);
            let fail = |e| Error::io(&folder, "create a file in", e);
            (file.map_err(fail)?, false)
        }
    };
    let base = match options.base.as_slice() {
        [] => None,
        layers => {
            let into = (!holds_base).then_some(&file);
            Some(open_base(layers, options, tar.filesystem, into, &folder)?)
        }
    };
    let building = Building {
        input: &input,
        output: &output,
        path,
        options,
        tar,
        image: &file,
        folder: &folder,
        base: base.as_deref(),
    };
    let (made, start, end) = building.build(report)?;
    building.compare(start, end)?;
    finish_output(output, options, start, end)?;
    *image = Some(file);
    Ok(made)
}

/// Opens the layers below, and writes what they hold to `image`, if it is not there already.
fn open_base(
    layers: &[LayerPath],
    options: &Options,
    kind: Kind,
    image: Option<&File>,
    folder: &Path,
) -> Result<Box<Stack>> {
    let base = StackOrZfile::Stack(Box::new(Stack::open(layers, options.parents)?));
    let fail = |e| Error::io(folder, "write a file in", e);
    if let Some(image) = image {
        image.set_len(base.bytes()).map_err(fail)?;
        each_window(&base, &(), |start, data| {
            non_zero_runs(data, |at, run| {
                image.write_all_at(run, start + at as u64).map_err(fail)
            })
        })?;
    }
    let mut first = vec![0; base.bytes().min(GRANULE_BYTES as u64) as usize];
    base.reader().read(&mut first, 0)?;
    let StackOrZfile::Stack(stack) = base else {
        return Err(Error::new(folder, "the base is no stack"));
    };
    if !kind.recognise(&first) {
        let top = stack.top().map_or(folder, Layer::path);
        let what = format!(
            "the base holds no {} (--fs says what it holds)",
            kind.name()
        );
        return Err(Error::new(top, what));
    }
    Ok(stack)
}

/// The name of an open file, for this process.
fn own_name(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

struct Building<'a> {
    input: &'a TarSource,
    output: &'a Output,
    path: &'a Path,
    options: &'a Options,
    tar: TarOptions,
    /// The file system.
    image: &'a File,
    folder: &'a Path,
    base: Option<&'a Stack>,
}

impl Building<'_> {
    /// Writes the layer; returns its first byte in the output and the one after it, too.
    fn build(&self, report: &dyn Report) -> Result<(Made, u64, u64)> {
        let below = self.base.and_then(Stack::top).and_then(Layer::uuid);
        let parent_uuid = self.options.parent(below);
        let first = Identity {
            virtual_size: 0,
            uuid: self.options.uuid.unwrap_or(UuidText::NIL),
            parent_uuid,
        };
        let (blob, start) = start_blob(self.output, self.path, self.options)?;
        let mut layer = LayerWriter::new(blob, self.path, &first)?;
        let mut scanner = Scanner::default();
        let (tar_bytes, diff_id) = self.copy_tar(&mut layer, &mut scanner, parent_uuid, report)?;
        layer.set_tar_bytes(tar_bytes);
        let pieces = scanner.finish();

        let image = RawSource::open(&own_name(self.image), true)?;
        let comparison = Comparison::new(&image, self.base);
        let mut plan = Plan::default();
        let mut hash = ContentHash::default();
        let over_base = self.base.is_some();
        pipeline::run(
            comparison.windows(),
            |window| comparison.read(window),
            |read| {
                let changes = comparison.compare(read, Coarseness::default())?;
                Ok(Hashed::new(changes, &pieces))
            },
            |hashed| {
                if let Some(blank) = hashed.changes.blank {
                    layer.set_blank(blank);
                }
                hash.add(&hashed.changes.summary);
                plan.add(&hashed, &pieces, over_base);
                comparison.put_back(hashed.changes);
                Ok(())
            },
        )?;
        drop(pieces);
        if !plan.fit(self.options.max_segments) {
            let what = format!("needs more than {} segments", self.options.max_segments);
            return Err(Error::new(self.path, what));
        }
        self.write(&plan, &mut layer)?;
        let virtual_size = image.bytes().next_multiple_of(SECTOR_BYTES);
        let uuid = match self.options.uuid {
            Some(uuid) => uuid,
            None => hash.uuid(virtual_size, parent_uuid),
        };
        let made = Made {
            diff_id,
            tar_bytes,
            stored_bytes: plan.stored_bytes(),
            segments: layer.segments(),
        };
        let end = layer.finish(&Identity {
            virtual_size,
            uuid,
            parent_uuid,
        })?;
        Ok((made, start, end))
    }

    /// Gives the tar to the layer, to the scanner and to the tool; returns its size and digest.
    fn copy_tar(
        &self,
        layer: &mut LayerWriter<'_>,
        scanner: &mut Scanner,
        parent: UuidText,
        report: &dyn Report,
    ) -> Result<(u64, DiffId)> {
        let mut maker: Option<Maker> = None;
        let mut at = 0;
        let start_maker = |first: &[u8]| {
            let kind = self.tar.filesystem;
            Maker::start(Job {
                kind,
                image: self.image,
                over_base: self.base.is_some(),
                identity: &[kind.name().as_bytes(), parent.as_str().as_bytes(), first],
                tar: self.input.plain().and_then(RawSource::file),
                folder: self.folder,
            })
        };
        let bytes = self
            .input
            .each_window(self.tar.max_bytes, report, |window| {
                scanner.feed(window);
                if !scanner.looks_right() {
                    return Err(self.no_tar());
                }
                if let Some(odd) = scanner.odd() {
                    let refused = self.tar.filesystem.check_member(odd);
                    refused.map_err(|what| Error::new(self.input.path(), what))?;
                }
                if maker.is_none() {
                    maker = Some(start_maker(window)?);
                }
                if let Some(maker) = &mut maker {
                    maker.feed(window.to_vec());
                }
                at += self.input.store(layer, window, at)?;
                Ok(())
            })?;
        if scanner.is_cut() {
            return Err(Error::new(self.input.path(), "is cut off inside a member"));
        }
        // What follows are blocks of the file system.
        let padding = at.next_multiple_of(GRANULE_BYTES as u64) - at;
        layer.unmapped(&vec![0; padding as usize])?;
        match maker {
            Some(maker) => Ok((bytes, maker.finish(scanner.extent())?)),
            None => Err(self.no_tar()),
        }
    }

    fn no_tar(&self) -> Error {
        Error::new(self.input.path(), "is no tar archive")
    }

    /// Writes what the plan says.
    fn write(&self, plan: &Plan, layer: &mut LayerWriter<'_>) -> Result<()> {
        let fail = |e| Error::io(self.folder, "read a file in", e);
        let mut buffer = Vec::new();
        for Run {
            start,
            sectors,
            source,
        } in plan.runs()
        {
            match source {
                Source::Zeros => layer.zeros(*start, *sectors)?,
                Source::Tar(at) => {
                    layer.map(*start, *sectors, ovbd_image::lsmt::DATA_START + at)?;
                }
                Source::Stored => {
                    // A part at a time, and each goes on with the run.
                    let end = start + sectors;
                    for at in (*start..end).step_by(WINDOW_SECTORS) {
                        let now = (end - at).min(WINDOW_SECTORS as u64);
                        buffer.resize((now * SECTOR_BYTES) as usize, 0);
                        self.image
                            .read_exact_at(&mut buffer, at * SECTOR_BYTES)
                            .map_err(fail)?;
                        layer.data(at, &buffer)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares what the layer reads, over its base, with the file system.
    fn compare(&self, start: u64, end: u64) -> Result<()> {
        let position = self.options.base.len();
        let layer = Layer::sealed(
            self.output.written(start, end - start)?,
            u8::try_from(position).unwrap_or(u8::MAX),
        )?;
        let mut layers = self.options.base.iter().zip(0..=u8::MAX);
        let layers: Result<Vec<Layer>> = layers
            .by_ref()
            .map(|(path, position)| Layer::open(path, position))
            .collect();
        let mut layers = layers?;
        layers.push(layer);
        let stack = Stack::new(layers, Parents::Ignored)?;
        let image = RawSource::open(&own_name(self.image), true)?;
        let comparison = Comparison::new(&image, Some(&stack));
        let differs = || {
            let what = "does not read as the file system of the tar: nothing is kept";
            Err(Error::new(self.path, what))
        };
        if stack.virtual_bytes() != image.bytes().next_multiple_of(SECTOR_BYTES) {
            return differs();
        }
        pipeline::run(
            comparison.windows(),
            |window| comparison.read(window),
            |read| comparison.compare(read, Coarseness::default()),
            |changes| match changes.runs.is_empty() {
                true => {
                    comparison.put_back(changes);
                    Ok(())
                }
                false => differs(),
            },
        )
    }
}

/// Sectors that are read at once.
const WINDOW_SECTORS: usize = 2048;
