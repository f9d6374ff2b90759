// SPDX-License-Identifier: GPL-2.0

//! What a fuzzer does with bytes in memory: the part of the formats that the kernel's targets share, without any
//! file. Millions of runs take minutes.

use ovbd_image::{
    index::{directory_len, Index, Source},
    jump_table::{JumpTable, JumpTableReader, JUMP_GROUP},
    layer_index::IndexReader,
    lsmt,
    merge::{lanes_needed, merge, Lane},
    segment::PackedSegment,
    tar, zfile, Error,
};
use ovbd_layers::crc::crc32c;

/// Sectors that are looked up in a merged index at most.
const MAX_LOOKUPS: usize = 64;

/// Parses `data` as everything that it can be; wrong results and panics are bugs, errors are not.
pub fn parse(data: &[u8]) {
    let bytes = data.len() as u64;
    if let Ok(Some(member)) = tar::recognise(&data[..data.len().min(tar::LOOK_BYTES)], bytes) {
        let end = member.offset.checked_add(member.bytes);
        assert!(
            end.is_some_and(|end| end <= bytes),
            "a member beyond the end"
        );
    }
    if let Ok(Some(index)) = layer(data) {
        stack(&index);
    }
    // What it says, and what it says about a file that is larger.
    for bytes in [bytes, 1 << 40] {
        let _ = compressed(data, bytes);
    }
}

/// The segments of a layer, in the middle of a stack of itself.
fn layer(data: &[u8]) -> Result<Option<[Vec<PackedSegment>; 2]>, Error> {
    let bytes = data.len() as u64;
    let at = lsmt::Trailer::position(bytes)? as usize;
    let (Some(first), Some(last)) = (data.first_chunk(), data[at..].first_chunk()) else {
        return Ok(None);
    };
    lsmt::Header::parse_data(first)?;
    let trailer = lsmt::Trailer::parse(last, bytes)?;
    let index = &data[trailer.index_offset as usize..][..trailer.index_bytes() as usize];
    let mut layers = [Vec::new(), Vec::new()];
    for (number, segments) in (0..).zip(&mut layers) {
        let mut reader = IndexReader::new(&trailer, number);
        reader.feed(index, |segment| {
            let end = segment.stored() + u64::from(segment.sectors());
            assert!(
                segment.zeroed() || end * lsmt::SECTOR_BYTES <= trailer.index_offset,
                "data outside"
            );
            segments.push(PackedSegment::from(segment));
            Ok::<(), Error>(())
        })?;
        reader.finish()?;
    }
    // The upper layer has every other segment.
    let mut keep = false;
    layers[1].retain(|_| {
        keep = !keep;
        keep
    });
    Ok(Some(layers))
}

/// Merges two layers and looks sectors up, in the index and one segment after the other.
fn stack(layers: &[Vec<PackedSegment>; 2]) {
    let mut lanes = vec![Lane::default(); lanes_needed(layers.len())];
    let mut merged = Vec::new();
    merge(layers, &mut lanes, |segment| {
        merged.push(segment);
        Ok::<(), ()>(())
    })
    .expect("both are in order");
    let directory = vec![0; directory_len(&merged)];
    let index = Index::build(merged, directory).expect("the merge is in order");
    let places = layers[0]
        .iter()
        .flat_map(|segment| [segment.start(), segment.end() - 1, segment.end()]);
    for sector in places.take(MAX_LOOKUPS) {
        let owner = layers.iter().rev().find_map(|layer| {
            layer
                .iter()
                .find(|segment| (segment.start()..segment.end()).contains(&sector))
        });
        let expected = match owner {
            None => Source::Hole,
            Some(owner) if owner.zeroed() => Source::Zero {
                layer: owner.layer(),
            },
            Some(owner) => Source::Data {
                layer: owner.layer(),
                stored: owner.stored() + (sector - owner.start()),
            },
        };
        assert_eq!(index.lookup(sector).source(), expected, "sector {sector}");
    }
}

/// Header or trailer and jump table of a ZFile of `bytes` of which `data` is the start and the end.
fn compressed(data: &[u8], bytes: u64) -> Result<(), Error> {
    let Some(first) = data.first_chunk() else {
        return Ok(());
    };
    let geometry = match zfile::Header::parse(first, bytes, crc32c)? {
        zfile::Header::Final(geometry) => geometry,
        zfile::Header::SeeTrailer => {
            let Some(last) = data.last_chunk() else {
                return Ok(());
            };
            zfile::Geometry::parse_trailer(last, bytes, crc32c)?
        }
    };
    let table = usize::try_from(geometry.index_offset())
        .ok()
        .and_then(|start| data.get(start..));
    let Some(table) =
        table.and_then(|table| table.get(..usize::try_from(geometry.index_bytes()).ok()?))
    else {
        return Ok(());
    };
    let mut reader = JumpTableReader::new(&geometry, crc32c);
    let (mut lengths, mut bases, mut extents) = (Vec::new(), Vec::new(), Vec::new());
    reader.feed(table, |extent| {
        if lengths.len() % JUMP_GROUP == 0 {
            bases.push(extent.offset);
        }
        lengths.push(extent.bytes);
        extents.push(extent);
        Ok::<(), Error>(())
    })?;
    reader.finish()?;
    let jump = JumpTable::new(lengths, bases).expect("they belong together");
    for (block, extent) in (0..).zip(&extents) {
        assert_eq!(jump.extent(block), Some(*extent), "block {block}");
        let end = extent.offset + u64::from(extent.bytes);
        assert!(end <= geometry.index_offset(), "a block in the jump table");
        if let Some(stored) = data.get(extent.offset as usize..end as usize) {
            let _ = geometry.payload(stored, crc32c);
        }
    }
    assert_eq!(
        jump.extent(extents.len() as u64),
        None,
        "a block after the last"
    );
    Ok(())
}
