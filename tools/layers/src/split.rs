// SPDX-License-Identifier: GPL-2.0

//! One layer as several, each with a part of the device: whoever sends them begins anew with one of them at most. A stack of
//! them costs no more than the layer did, because no two have the same sector.

use std::path::Path;

use ovbd_image::{
    index::Source,
    lsmt::{Identity, UuidText, SECTOR_BYTES},
};

use crate::{
    build::{finish_output, start_blob, Options},
    content_hash::ContentHash,
    error::Result,
    layer_writer::{blank_sectors, LayerWriter},
    output::{Output, Rules},
    report::Report,
    stack::Stack,
};

/// Sectors of the blocks of 4 KiB that layers are made of.
const BLOCK_SECTORS: u64 = 4096 / SECTOR_BYTES;
/// Sectors that are read at once.
const WINDOW_SECTORS: u64 = (1 << 20) / SECTOR_BYTES;

/// Sectors from the first to the one after the last.
pub type Range = std::ops::Range<u64>;

/// The runs of blocks that hold data in `range`, in order.
fn data_runs(stack: &Stack, range: Range) -> impl Iterator<Item = Range> + '_ {
    let mut done = range.start;
    stack
        .mappings(range.start, range.end)
        .filter(|mapping| matches!(mapping.source(), Source::Data { .. }))
        .filter_map(move |mapping| {
            let start = mapping.start() / BLOCK_SECTORS * BLOCK_SECTORS;
            let end = mapping.end().next_multiple_of(BLOCK_SECTORS).min(range.end);
            let run = start.max(done)..end;
            done = done.max(end);
            (!run.is_empty()).then_some(run)
        })
}

/// Parts of the device, in order and all of it, with at most `most` bytes of data each, whole blocks and one at least.
pub fn parts(stack: &Stack, most: u64) -> Vec<Range> {
    let most = (most / SECTOR_BYTES / BLOCK_SECTORS).max(1) * BLOCK_SECTORS;
    let (mut parts, mut start, mut held) = (Vec::new(), 0, 0);
    for mut run in data_runs(stack, 0..stack.sectors()) {
        while held + (run.end - run.start) > most {
            let cut = run.start + (most - held);
            parts.push(start..cut);
            (start, held, run.start) = (cut, 0, cut);
        }
        held += run.end - run.start;
    }
    parts.push(start..stack.sectors());
    parts
}

/// Makes the layer `path` of what `part` of the stack holds; `options` say how, without a base. Returns its UUID.
///
/// # Errors
///
/// Those of reading and writing. Nothing is left behind then.
pub fn write_part(
    stack: &Stack,
    part: Range,
    path: &Path,
    options: &Options,
    report: &dyn Report,
) -> Result<UuidText> {
    let output = Output::create_file(path, Rules::default())?;
    let (blob, start) = start_blob(&output, path, options)?;
    let parent_uuid = options.parent(None);
    let mut identity = Identity {
        virtual_size: stack.virtual_bytes(),
        uuid: options.uuid.unwrap_or(UuidText::NIL),
        parent_uuid,
    };
    let mut layer = LayerWriter::new(blob, path, &identity)?;
    let (mut hash, mut reader) = (ContentHash::default(), stack.reader());
    let mut data = Vec::new();
    for run in data_runs(stack, part) {
        for at in run.clone().step_by(WINDOW_SECTORS as usize) {
            let sectors = WINDOW_SECTORS.min(run.end - at);
            data.resize((sectors * SECTOR_BYTES) as usize, 0);
            reader.read(&mut data, at * SECTOR_BYTES)?;
            if at == 0 {
                layer.set_blank(blank_sectors(&data, None));
            }
            layer.blocks(at, &data, &mut hash)?;
            report.add(data.len() as u64);
        }
    }
    identity.uuid = options
        .uuid
        .unwrap_or_else(|| hash.uuid(identity.virtual_size, parent_uuid));
    let end = layer.finish(&identity)?;
    finish_output(output, options, start, end)?;
    Ok(identity.uuid)
}
