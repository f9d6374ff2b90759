// SPDX-License-Identifier: GPL-2.0

//! What layers are and what they own, as a table for people or as JSON.

use std::{
    fmt::{self, Write},
    path::PathBuf,
};

use ovbd_image::{
    direct::{check, largest_page},
    index::Source,
    lsmt::{HEADER_BYTES, SECTOR_BYTES},
    merge::MAX_LAYERS,
    segment::PackedSegment,
};
use serde::Serialize;

use crate::{
    blob::Content,
    error::name,
    layer::{Layer, LayerKind},
    layer_writer::{DAX_ALIGNMENT, DAX_PAGE},
    stack::Stack,
    stack_or_zfile::StackOrZfile,
    tar::original::tar_bytes,
    units::size,
    zfile::Zfile,
};

/// A stack, or a single ZFile that holds no layer. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Info {
    /// A stack of layers.
    Stack(StackInfo),
    /// A ZFile around anything else.
    Zfile {
        /// Path of the file.
        path: PathBuf,
        /// What it is.
        zfile: ZfileInfo,
    },
}

/// What a stack is. Sizes are in bytes.
#[derive(Debug, Serialize)]
pub struct StackInfo {
    /// Size of the device.
    pub virtual_bytes: u64,
    /// Segments of the merged index.
    pub segments: usize,
    /// Memory of the merged index.
    pub index_bytes: usize,
    /// Bytes of the device that some layer stores.
    pub data_bytes: u64,
    /// Bytes of the device that some layer made zero.
    pub zeroed_bytes: u64,
    /// Bytes of the device that no layer owns.
    pub hole_bytes: u64,
    /// How it can be accessed directly, if it can.
    pub dax: Option<DaxInfo>,
    /// Bottom first.
    pub layers: Vec<LayerInfo>,
}

/// Direct access to the memory of a stack.
#[derive(Debug, Serialize)]
pub struct DaxInfo {
    /// Size of the largest pages that it can have, at most 2 MiB.
    pub page_bytes: u64,
    /// Whether there are sectors without data, for which there must be a device of zeros.
    pub needs_zeros: bool,
}

/// What a layer is. Sizes are in bytes.
#[derive(Debug, Serialize)]
pub struct LayerInfo {
    /// Path of the file with the data.
    pub path: PathBuf,
    /// `lsmt`, `zfile`, `turbo`, `erofs` or `writable`.
    pub format: &'static str,
    /// Size of the file.
    pub file_bytes: u64,
    /// Whether the blob is in a tar wrapper.
    pub tar: bool,
    /// How it is compressed.
    pub zfile: Option<ZfileInfo>,
    /// The original tars that it points into.
    pub targets: Vec<PathBuf>,
    /// Virtual size as recorded; 0 where the layer below decides.
    pub virtual_bytes: u64,
    /// UUID.
    pub uuid: Option<String>,
    /// UUID of the layer below.
    pub parent_uuid: Option<String>,
    /// Whether the layer below is the parent; nothing where one of the two UUIDs is missing.
    pub parent_matches: Option<bool>,
    /// Segments of its index.
    pub segments: usize,
    /// Data that its segments map.
    pub data_bytes: u64,
    /// Zeroed bytes that its segments map.
    pub zeroed_bytes: u64,
    /// Size of the original tar that the data section begins with.
    pub original_tar_bytes: Option<u64>,
    /// Size of the data section.
    pub stored_bytes: u64,
    /// Bytes of the device that come from this layer.
    pub owned_bytes: u64,
    /// Size of the largest pages with which it can be accessed directly, at most 2 MiB, if it can.
    pub dax_page_bytes: Option<u64>,
}

/// How a ZFile is compressed. Sizes are in bytes.
#[derive(Debug, Serialize)]
pub struct ZfileInfo {
    /// `lz4` or `zstd`.
    pub algorithm: &'static str,
    /// Size of a block.
    pub block_bytes: u32,
    /// Number of blocks.
    pub blocks: u64,
    /// Size before compression.
    pub original_bytes: u64,
    /// Size of header, blocks, jump table and trailer.
    pub compressed_bytes: u64,
    /// Original size by compressed size.
    pub ratio: f64,
    /// Whether every block has a CRC.
    pub block_crc: bool,
    /// Whether header and jump table have one.
    pub digest: bool,
    /// Whether the header has the final values, so that the trailer is not needed.
    pub final_header: bool,
}

impl Info {
    /// Looks at an open image.
    pub fn new(image: &StackOrZfile) -> Self {
        match image {
            StackOrZfile::Stack(stack) => Info::Stack(StackInfo::new(stack)),
            StackOrZfile::Zfile(zfile) => Info::Zfile {
                path: zfile.input().path().to_owned(),
                zfile: ZfileInfo::new(zfile),
            },
        }
    }
}

impl StackInfo {
    fn new(stack: &Stack) -> Self {
        let mut owned = vec![0; stack.layers().len()];
        let (mut data, mut zeroed, mut hole) = (0, 0, 0);
        for mapping in stack.mappings(0, stack.sectors()) {
            let bytes = mapping.sectors() * SECTOR_BYTES;
            match mapping.source() {
                Source::Hole => hole += bytes,
                Source::Zero { .. } => zeroed += bytes,
                Source::Data { layer, .. } => {
                    data += bytes;
                    owned[usize::from(layer)] += bytes;
                }
            }
        }
        let mut below = None;
        let layers = stack
            .layers()
            .iter()
            .zip(owned)
            .map(|(layer, owned)| {
                let info = LayerInfo::new(layer, below, owned);
                below = Some(layer);
                info
            })
            .collect();
        Self {
            virtual_bytes: stack.virtual_bytes(),
            segments: stack.segments().len(),
            index_bytes: stack.index_bytes(),
            data_bytes: data,
            zeroed_bytes: zeroed,
            hole_bytes: hole,
            dax: DaxInfo::new(stack),
            layers,
        }
    }
}

/// Whether the bytes of a layer in memory are those that its segments map.
fn is_memory(layer: &Layer) -> bool {
    matches!(
        (layer.kind(), layer.content()),
        (LayerKind::Sealed(_), Content::Plain(_))
    ) && layer.opened().tar.is_none()
}

/// Bytes of the largest pages with which segments can be accessed directly before sector `end`, and whether there are
/// some without data.
fn dax_pages(segments: &[PackedSegment], end: u64) -> Option<(u64, bool)> {
    let smallest = DAX_PAGE / SECTOR_BYTES;
    let end = end / smallest * smallest;
    let hole = check(segments, end, smallest, &mut [0; MAX_LAYERS]).ok()?;
    let page = largest_page(segments, end, DAX_ALIGNMENT / SECTOR_BYTES);
    Some((page * SECTOR_BYTES, hole.is_some()))
}

impl DaxInfo {
    fn new(stack: &Stack) -> Option<Self> {
        let end = stack.sectors();
        if end % (DAX_PAGE / SECTOR_BYTES) != 0 || !stack.layers().iter().all(is_memory) {
            return None;
        }
        let (page_bytes, needs_zeros) = dax_pages(stack.segments(), end)?;
        Some(Self {
            page_bytes,
            needs_zeros,
        })
    }
}

impl LayerInfo {
    fn new(layer: &Layer, below: Option<&Layer>, owned_bytes: u64) -> Self {
        let sum = |zeroed| -> u64 {
            let segments = layer.segments().iter().filter(|s| s.zeroed() == zeroed);
            segments
                .map(|s| u64::from(s.sectors()) * SECTOR_BYTES)
                .sum()
        };
        let (format, end) = match (layer.kind(), layer.content()) {
            (LayerKind::Writable { .. }, content) => ("writable", content.bytes()),
            (LayerKind::Sealed(trailer), Content::Plain(_)) => ("lsmt", trailer.index_offset),
            (LayerKind::Sealed(trailer), Content::Zfile(_)) => ("zfile", trailer.index_offset),
            (LayerKind::Sealed(_), Content::Joined(joined)) => (joined.kind(), joined.own_bytes()),
        };
        let parent = layer.parent_uuid();
        let parent_matches = below
            .and_then(Layer::uuid)
            .zip(parent)
            .map(|(uuid, parent)| uuid.as_str().eq_ignore_ascii_case(parent.as_str()));
        Self {
            path: layer.path().to_owned(),
            format,
            file_bytes: layer.opened().file_bytes,
            tar: layer.opened().tar.is_some(),
            zfile: match layer.content() {
                Content::Zfile(zfile) => Some(ZfileInfo::new(zfile)),
                Content::Joined(joined) => match joined.head() {
                    Content::Zfile(zfile) => Some(ZfileInfo::new(zfile)),
                    _ => None,
                },
                Content::Plain(_) => None,
            },
            targets: match layer.content() {
                Content::Joined(joined) => {
                    let paths = joined.targets().iter().map(|part| part.target.path());
                    paths.map(std::path::Path::to_owned).collect()
                }
                _ => Vec::new(),
            },
            virtual_bytes: layer.virtual_bytes(),
            uuid: layer.uuid().map(|uuid| uuid.as_str().to_owned()),
            parent_uuid: parent.map(|uuid| uuid.as_str().to_owned()),
            parent_matches,
            segments: layer.segments().len(),
            data_bytes: sum(false),
            zeroed_bytes: sum(true),
            original_tar_bytes: match layer.kind() {
                LayerKind::Sealed(_) => tar_bytes(layer.content()).ok().flatten(),
                LayerKind::Writable { .. } => None,
            },
            stored_bytes: end.saturating_sub(HEADER_BYTES as u64),
            owned_bytes,
            dax_page_bytes: match is_memory(layer) {
                true => {
                    let end = layer.segments().last().map_or(0, |last| last.end());
                    dax_pages(layer.segments(), end).map(|(bytes, _)| bytes)
                }
                false => None,
            },
        }
    }
}

impl ZfileInfo {
    fn new(zfile: &Zfile) -> Self {
        let geometry = zfile.geometry();
        let compressed_bytes = zfile.input().bytes();
        Self {
            algorithm: geometry.algorithm().as_str(),
            block_bytes: geometry.block_bytes(),
            blocks: geometry.blocks(),
            original_bytes: geometry.original_bytes(),
            compressed_bytes,
            ratio: ratio(geometry.original_bytes(), compressed_bytes),
            block_crc: geometry.has_block_crc(),
            digest: geometry.has_digest(),
            final_header: zfile.has_final_header(),
        }
    }
}

/// Rounded to two digits, so that it prints the same everywhere.
fn ratio(original: u64, compressed: u64) -> f64 {
    (original as f64 * 100.0 / compressed.max(1) as f64).round() / 100.0
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Info::Stack(stack) => write!(f, "{stack}"),
            Info::Zfile { path, zfile } => {
                writeln!(f, "file:        {} (no layer)", name(path))?;
                writeln!(f, "size:        {}", size(zfile.original_bytes))?;
                writeln!(f, "compression: {zfile}")
            }
        }
    }
}

impl fmt::Display for ZfileInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}{}, {} blocks, {} of {}, ratio {:.2}{}",
            self.algorithm,
            size(u64::from(self.block_bytes)),
            if self.block_crc { "" } else { " without CRC" },
            self.blocks,
            size(self.compressed_bytes),
            size(self.original_bytes),
            self.ratio,
            if self.digest { "" } else { ", no digests" },
        )
    }
}

impl fmt::Display for StackInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "virtual size: {} ({} bytes)",
            size(self.virtual_bytes),
            self.virtual_bytes
        )?;
        writeln!(
            f,
            "content:      {} data, {} zeroed, {} hole",
            size(self.data_bytes),
            size(self.zeroed_bytes),
            size(self.hole_bytes)
        )?;
        writeln!(
            f,
            "merged index: {} segments, {} of memory",
            self.segments,
            size(self.index_bytes as u64)
        )?;
        if let Some(dax) = &self.dax {
            writeln!(
                f,
                "direct access: pages of {}{}",
                size(dax.page_bytes),
                if dax.needs_zeros { ", and zeros" } else { "" }
            )?;
        }
        let mut rows = vec![[
            "layer",
            "format",
            "compression",
            "file",
            "ratio",
            "virtual",
            "segments",
            "data",
            "zeroed",
            "owned",
        ]
        .map(str::to_owned)];
        for (number, layer) in self.layers.iter().enumerate() {
            let zfile = layer.zfile.as_ref();
            rows.push([
                number.to_string(),
                format!("{}{}", layer.format, if layer.tar { " in tar" } else { "" }),
                zfile.map_or("-".to_owned(), |z| {
                    format!("{} {}", z.algorithm, size(u64::from(z.block_bytes)))
                }),
                size(layer.file_bytes),
                zfile.map_or("-".to_owned(), |z| format!("{:.2}", z.ratio)),
                size(layer.virtual_bytes),
                layer.segments.to_string(),
                size(layer.data_bytes),
                size(layer.zeroed_bytes),
                size(layer.owned_bytes),
            ]);
        }
        writeln!(f)?;
        table(f, &rows)?;
        writeln!(f)?;
        for (number, layer) in self.layers.iter().enumerate() {
            let none = "-".to_owned();
            let parent = match layer.parent_matches {
                Some(false) => " (not the layer below)",
                _ => "",
            };
            let tar = match layer.original_tar_bytes {
                Some(bytes) => format!("\n  original tar of {bytes} bytes"),
                None => String::new(),
            };
            let targets = layer.targets.iter().fold(String::new(), |text, target| {
                format!("{text}\n  target {}", name(target))
            });
            writeln!(
                f,
                "layer {number}: {}\n  uuid {}\n  parent {}{parent}{tar}{targets}",
                name(&layer.path),
                layer.uuid.as_ref().unwrap_or(&none),
                layer.parent_uuid.as_ref().unwrap_or(&none),
            )?;
        }
        Ok(())
    }
}

/// Prints rows with columns as wide as they must be; the first three are aligned to the left.
fn table<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            match column {
                0..=2 => write!(line, "{cell:width$}  ")?,
                _ => write!(line, "{cell:>width$}  ")?,
            }
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}
