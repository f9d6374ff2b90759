// SPDX-License-Identifier: GPL-2.0 OR MIT

//! The formats against models, and no parser panics, whatever it is given.

use ovbd_image::{
    jump_table::{JumpTable, JumpTableReader, JUMP_GROUP},
    layer_index::IndexReader,
    log::{resolve, LogEntry, LogReader},
    lsmt::{topmost_size, Entry, Header, Identity, Trailer, UuidText, ENTRY_BYTES, HEADER_BYTES},
    segment::{Segment, MAX_VIRTUAL_SECTORS},
    tar,
    zfile::{self, Algorithm, Geometry, Options, Totals},
    Error, Reason,
};
use proptest::prelude::*;

/// CRC-32C bit by bit, without inversion.
fn crc32c(mut crc: u32, bytes: &[u8]) -> u32 {
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    crc
}

const IDENTITY: Identity = Identity {
    virtual_size: 1 << 30,
    uuid: UuidText::NIL,
    parent_uuid: UuidText::NIL,
};

fn trailer(index_offset: u64, entries: u64, blob_bytes: u64) -> Result<Trailer, Error> {
    Trailer::parse(&IDENTITY.trailer(index_offset, entries), blob_bytes)
}

#[test]
fn reasons_have_one_text() {
    let mut texts: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
    for reason in Reason::ALL {
        assert_eq!(reason.as_cstr().to_str(), Ok(reason.as_str()));
    }
    texts.sort_unstable();
    texts.dedup();
    assert_eq!(texts.len(), Reason::ALL.len());
}

#[test]
fn trailer_limits() {
    let reason = |result: Result<Trailer, Error>| result.unwrap_err().reason();
    assert!(trailer(4096, 256, 3 * 4096).is_ok());
    assert_eq!(
        reason(trailer(4096, 257, 3 * 4096)),
        Reason::LsmtIndexOutside
    );
    assert_eq!(reason(trailer(4104, 1, 3 * 4096)), Reason::LsmtIndexOffset);
    assert_eq!(reason(trailer(0, 1, 3 * 4096)), Reason::LsmtIndexOffset);
    assert_eq!(reason(trailer(4096, 1, 4096)), Reason::LsmtTooShort);
    assert_eq!(
        reason(trailer(4096, 1 << 40, u64::MAX)),
        Reason::LsmtTooManyEntries
    );
    assert_eq!(reason(trailer(!511, 2, u64::MAX)), Reason::LsmtIndexOutside);
    assert_eq!(reason(trailer(4096, 3, 3 * 4096 + 16)), Reason::TurboLayer);
}

#[test]
fn index_goes_on_after_an_error() {
    let entry = |start, sectors, stored| Entry {
        start,
        sectors,
        stored,
        zeroed: false,
        tag: 0,
    };
    let data = 100 * 512;
    let mut reader = IndexReader::new(&trailer(data, 5, data + 4096 + 4096).unwrap(), 3);
    let mut push = |entry: Entry| reader.push(&entry.encode()).map_err(|e| e.reason());
    assert_eq!(push(entry(10, 5, 8)), Ok(Segment::new(10, 5, 8, 3, false)));
    assert_eq!(push(entry(14, 5, 13)), Err(Reason::LsmtOrder));
    assert_eq!(push(Entry::PADDING), Ok(None));
    assert_eq!(push(entry(20, 5, 96)), Err(Reason::LsmtDataOutside));
    assert_eq!(
        push(entry(30, 5, 95)),
        Ok(Segment::new(30, 5, 95, 3, false))
    );
    assert_eq!(push(Entry::PADDING), Err(Reason::LsmtIndexTruncated));
}

#[test]
fn entries_beyond_the_virtual_size_are_kept() {
    let sectors = IDENTITY.virtual_size / 512;
    let data_end = 4096 + 20 * 512;
    let sealed = trailer(data_end, 32, data_end + 512 + 4096).unwrap();
    let mut header = IDENTITY.header();
    header[28..32].copy_from_slice(&1_u32.to_le_bytes());
    header[32..40].copy_from_slice(&4096_u64.to_le_bytes());
    let mut log = LogReader::new(&header, 4096 + 32, data_end, 1).unwrap();
    for (start, fits) in [
        (sectors - 1, true),
        (sectors, true),
        (1 << 40, true),
        (MAX_VIRTUAL_SECTORS - 10, true),
        (MAX_VIRTUAL_SECTORS - 9, false),
    ] {
        let entry = Entry {
            start,
            sectors: 10,
            stored: 8,
            zeroed: false,
            tag: 0,
        };
        let expected = match fits {
            true => Ok(Segment::new(start, 10, 8, 1, false)),
            false => Err(Reason::LsmtEntryOutside),
        };
        let read = IndexReader::new(&sealed, 1).push(&entry.encode());
        assert_eq!(read.map_err(|e| e.reason()), expected);
        let logged = log.push(&entry.encode()).map_err(|e| e.reason());
        assert_eq!(
            logged.map(|entry| entry.map(|entry| entry.segment)),
            expected
        );
    }
}

#[test]
fn a_stack_has_the_topmost_size() {
    for (sizes, size) in [
        (&[][..], 0),
        (&[0, 0], 0),
        (&[9], 9),
        (&[9, 5], 5),
        (&[5, 9, 0, 0], 9),
    ] {
        assert_eq!(topmost_size(sizes.iter().copied()), size);
    }
}

#[test]
fn tar_header_is_recognised() {
    for bytes in [1, 9, 10, 83_321, 99_999_999, 1 << 40, u64::MAX / 4] {
        let header = tar::header(bytes);
        let member = tar::recognise(&header, u64::MAX).unwrap().unwrap();
        assert_eq!((member.offset, member.bytes), (1536, bytes));
        let short = tar::recognise(&header, 1536 + bytes - 1).unwrap_err();
        assert_eq!(short.reason(), Reason::TarTruncated);
    }
}

fn arbitrary_entry() -> impl Strategy<Value = Entry> {
    (
        0..1_u64 << 50,
        0..1_u32 << 14,
        0..1_u64 << 55,
        any::<bool>(),
        any::<u8>(),
    )
        .prop_map(|(start, sectors, stored, zeroed, tag)| Entry {
            start,
            sectors,
            stored,
            zeroed,
            tag,
        })
}

/// A log on a small device: positions collide often.
fn small_log() -> impl Strategy<Value = Vec<Segment>> {
    let write = (0..200_u64, 1..60_u32, 0..5000_u64, any::<bool>()).prop_map(
        |(start, sectors, stored, zeroed)| {
            Segment::new(start, sectors, stored, 7, zeroed).expect("inside all limits")
        },
    );
    prop::collection::vec(write, 0..80)
}

proptest! {
    #[test]
    fn entries_round_trip(entry in arbitrary_entry()) {
        prop_assert_eq!(Entry::decode(&entry.encode()), entry);
    }

    #[test]
    fn last_write_wins(log in small_log()) {
        let mut model = vec![None; 300];
        for segment in &log {
            for sector in segment.start()..segment.end() {
                let at = segment.stored() + (sector - segment.start());
                model[sector as usize] = Some((segment.zeroed(), at));
            }
        }
        let mut entries: Vec<LogEntry> = log
            .iter()
            .zip(0..)
            .map(|(segment, order)| LogEntry { segment: *segment, order })
            .collect();
        let mut scratch = vec![0; entries.len()];
        let mut resolved: Vec<Segment> = Vec::new();
        resolve(&mut entries, &mut scratch, |segment| {
            resolved.push(segment);
            Ok::<(), Error>(())
        }).unwrap();
        prop_assert!(resolved.len() < 2 * log.len().max(1));
        let mut found = vec![None; 300];
        let mut end = 0;
        for segment in resolved {
            prop_assert!(segment.start() >= end);
            end = segment.end();
            for sector in segment.start()..end {
                let at = segment.stored() + (sector - segment.start());
                found[sector as usize] = Some((segment.zeroed(), at));
            }
        }
        prop_assert_eq!(found, model);
    }

    #[test]
    fn jump_table_adds_up(lengths in prop::collection::vec(5..4612_u32, 0..200)) {
        let bytes: u64 = lengths.iter().map(|n| u64::from(*n)).sum();
        let options = Options { block_bytes: 4096, algorithm: Algorithm::Lz4, block_crc: true };
        let table: Vec<u8> = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
        let totals = Totals {
            original_bytes: lengths.len() as u64 * 4096,
            index_offset: 512 + bytes,
            blocks: lengths.len() as u64,
            index_crc: crc32c(0, &table),
        };
        let file_bytes = 512 + bytes + table.len() as u64 + 512;
        let block = options.trailer(&totals, crc32c);
        let geometry = Geometry::parse_trailer(&block, file_bytes, crc32c).unwrap();
        let header = options.header(&totals, crc32c);
        match zfile::Header::parse(&header, file_bytes, crc32c).unwrap() {
            zfile::Header::Final(same) => prop_assert_eq!(same, geometry),
            zfile::Header::SeeTrailer => prop_assert!(false),
        }
        let mut reader = JumpTableReader::new(&geometry, crc32c);
        let (mut stored, mut bases, mut extents) = (vec![], vec![], vec![]);
        for chunk in table.chunks(28) {
            reader.feed(chunk, |extent| {
                if stored.len() % JUMP_GROUP == 0 {
                    bases.push(extent.offset);
                }
                stored.push(extent.bytes);
                extents.push(extent);
                Ok::<(), Error>(())
            }).unwrap();
        }
        reader.finish().unwrap();
        let table = JumpTable::new(stored, bases).unwrap();
        for (block, extent) in extents.iter().enumerate() {
            prop_assert_eq!(table.extent(block as u64), Some(*extent));
            let span = table.span(0, block as u64);
            prop_assert_eq!(span, Some((512, extent.offset + u64::from(extent.bytes))));
        }
        prop_assert_eq!(table.extent(extents.len() as u64), None);
    }

    #[test]
    fn parsers_do_not_panic(
        mut bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES),
        from in 0..4_usize,
        file_bytes in prop_oneof![any::<u64>(), 0..20_000_u64, (0..4096_u64).prop_map(|n| u64::MAX - n)],
    ) {
        // A right magic lets the rest be looked at.
        let options = Options { block_bytes: 4096, algorithm: Algorithm::Zstd, block_crc: true };
        let totals = Totals { original_bytes: 0, index_offset: 512, blocks: 0, index_crc: 0 };
        let start: &[u8] = match from {
            0 => &IDENTITY.header()[..32],
            1 => &IDENTITY.trailer(0, 0)[..32],
            2 => &options.header(&totals, crc32c)[..28],
            _ => &tar::header(77)[..512],
        };
        bytes[..start.len()].copy_from_slice(start);
        let block: [u8; HEADER_BYTES] = bytes.clone().try_into().unwrap();
        let small: [u8; 512] = bytes[..512].try_into().unwrap();
        let entry: [u8; ENTRY_BYTES] = bytes[100..116].try_into().unwrap();
        let _ = Header::parse_data(&block);
        if let Ok(trailer) = Trailer::parse(&block, file_bytes) {
            let _ = IndexReader::new(&trailer, 0).feed(&bytes, |_| Ok::<(), Error>(()));
        }
        if let Ok(trailer) = trailer(4096, 1, 3 * 4096) {
            let _ = IndexReader::new(&trailer, 0).push(&entry);
        }
        if let Ok(mut log) = LogReader::new(&block, file_bytes, file_bytes, 0) {
            let _ = log.feed(&bytes, |_| Ok::<(), Error>(()));
        }
        let _ = zfile::Header::parse(&small, file_bytes, crc32c);
        if let Ok(geometry) = Geometry::parse_trailer(&small, file_bytes, crc32c) {
            let _ = JumpTableReader::new(&geometry, crc32c).feed(&bytes, |_| Ok::<(), Error>(()));
        }
        let _ = tar::recognise(&bytes[..tar::LOOK_BYTES], file_bytes);
    }
}
