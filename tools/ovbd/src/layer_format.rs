// SPDX-License-Identifier: GPL-2.0

//! What a layer is made of, by its first and its last bytes: for images of which nothing else is here.

use anyhow::Result;
use ovbd_image::{
    lsmt, tar,
    zfile::{trailer_position, Geometry, Header, HEADER_BYTES},
};
use ovbd_layers::{crc::crc32c, units, zfile::Zfile};
use serde_json::{json, Value};

/// What is read first: the headers of a tar, and that of a layer.
const FIRST_BYTES: u64 = 4096;

/// The format of a block layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerFormat {
    /// Not compressed.
    Lsmt,
    /// Compressed in blocks.
    Zfile(Geometry),
}

/// What the file of `bytes` bytes holds that `read` reads from, by first byte and number of bytes; `None` if it is no layer.
///
/// # Errors
///
/// Those of `read`, and a file that only looks like a layer.
pub fn look(bytes: u64, read: impl Fn(u64, u64) -> Result<Vec<u8>>) -> Result<Option<LayerFormat>> {
    let first = read(0, bytes.min(FIRST_BYTES))?;
    let looked = &first[..first.len().min(tar::LOOK_BYTES)];
    let (start, blob) = match tar::recognise(looked, bytes)? {
        Some(member) => (member.offset, member.bytes),
        None => (0, bytes),
    };
    let rest = usize::try_from(start)
        .ok()
        .and_then(|start| first.get(start..));
    let rest = rest.unwrap_or_default();
    if !Zfile::recognise(rest, blob) {
        return Ok(lsmt::Header::recognise(rest).then_some(LayerFormat::Lsmt));
    }
    let Some(header) = rest.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let geometry = match Header::parse(header, blob, crc32c)? {
        Header::Final(geometry) => geometry,
        Header::SeeTrailer => {
            let at = start.saturating_add(trailer_position(blob)?);
            let trailer = read(at, HEADER_BYTES as u64)?;
            let Some(trailer) = trailer.first_chunk::<HEADER_BYTES>() else {
                return Ok(None);
            };
            Geometry::parse_trailer(trailer, blob, crc32c)?
        }
    };
    Ok(Some(LayerFormat::Zfile(geometry)))
}

impl LayerFormat {
    /// For programs.
    pub fn to_json(self) -> Value {
        match self {
            Self::Lsmt => json!({ "format": "lsmt" }),
            Self::Zfile(geometry) => json!({
                "format": "zfile", "algorithm": geometry.algorithm().as_str(),
                "block_bytes": geometry.block_bytes(), "unpacked": geometry.original_bytes(),
            }),
        }
    }
}

impl std::fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lsmt => f.write_str("not compressed"),
            Self::Zfile(geometry) => write!(
                f,
                "{} in blocks of {}, {} unpacked",
                geometry.algorithm().as_str(),
                units::size(geometry.block_bytes().into()),
                units::size(geometry.original_bytes())
            ),
        }
    }
}
