// SPDX-License-Identifier: GPL-2.0

//! Parts of a gzip file by an index: every part from every kind of place, and what is wrong with an index is found.

mod common;

use std::{fs, path::PathBuf};

use common::{
    gzips::{set_checksum, Gzip},
    Random,
};
use ovbd_layers::{file_range::FileRange, gzip_index::GzipIndex, Result};
use tempfile::{tempdir, TempDir};

struct Case {
    folder: TempDir,
    content: Vec<u8>,
    gzip: Gzip,
}

impl Case {
    /// Content in which blocks refer back as far as can be, and blocks that end at every bit of a byte.
    fn new() -> Self {
        let mut random = Random::new(8);
        let mut content = random.bytes(32768);
        for back in [32768, 32767, 30000, 24577] {
            for _ in 0..3000 {
                content.push(content[content.len() - back]);
            }
            content.extend(random.bytes(501));
        }
        content.extend(random.text(60_000));
        let sizes = [701, 1333, 90, 2048, 517, 4001, 33, 1];
        Self {
            folder: tempdir().unwrap(),
            gzip: Gzip::new(&content, &sizes),
            content,
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn open(&self, gzip: &[u8], index: &[u8]) -> Result<GzipIndex> {
        let gzip = FileRange::open(&self.write("gzip", gzip)).unwrap();
        GzipIndex::open(&self.write("index", index), gzip)
    }

    fn check(&self, index: &GzipIndex, tar: &[u8]) -> Result<()> {
        index.check(&FileRange::open(&self.write("tar", tar)).unwrap(), &())
    }
}

#[test]
fn every_part_from_every_place() {
    let case = Case::new();
    // The file is one for others.
    let mut whole = Vec::new();
    let mut decoder = flate2::read::GzDecoder::new(&case.gzip.bytes[..]);
    std::io::copy(&mut decoder, &mut whole).unwrap();
    assert!(whole == case.content);
    let bits = |bit: usize| case.gzip.blocks.iter().any(|(_, at)| at % 8 == bit);
    assert!((0..8).all(bits));
    for compressed in [false, true] {
        let all = case.gzip.index(&case.content, compressed, |_| true);
        let some = case.gzip.index(&case.content, compressed, |n| n % 7 == 3);
        for index in [&all, &some] {
            let index = case.open(&case.gzip.bytes, index).unwrap();
            assert_eq!(index.bytes(), case.content.len() as u64);
            case.check(&index, &case.content).unwrap();
            let mut random = Random::new(4);
            let mut reads: Vec<(usize, usize)> =
                case.gzip.blocks.iter().map(|(at, _)| (*at, 700)).collect();
            reads.extend((0..200).map(|_| {
                let at = random.below(case.content.len() as u64) as usize;
                (at, random.below(9000) as usize)
            }));
            reads.push((case.content.len(), 0));
            for (at, bytes) in reads {
                let bytes = bytes.min(case.content.len() - at);
                let mut buffer = vec![0; bytes];
                index.read(&mut buffer, at as u64).unwrap();
                assert!(buffer == case.content[at..at + bytes], "{at}");
            }
            let end = case.content.len() as u64;
            assert!(index.read(&mut [0; 2], end - 1).is_err());
            assert!(index.read(&mut [0; 1], u64::MAX).is_err());
        }
    }
}

#[test]
fn what_is_wrong_with_an_index() {
    let case = Case::new();
    let good = case.gzip.index(&case.content, false, |_| true);
    let refused = |gzip: &[u8], index: &[u8], says: &str| {
        let error = case.open(gzip, index).unwrap_err();
        assert!(error.what().contains(says), "{error}");
    };
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut index = good.clone();
        change(&mut index);
        set_checksum(&mut index);
        index
    };
    refused(&case.gzip.bytes, &good[..300], "no index");
    refused(&case.gzip.bytes, &good[..5000], "another size");
    let mut flipped = good.clone();
    flipped[60] ^= 1;
    refused(&case.gzip.bytes, &flipped, "checksum");
    refused(&case.gzip.bytes, &changed(&|i| i[8] = 2), "version");
    refused(&case.gzip.bytes[1..], &good, "index of a gzip file of");
    // A second member, which the one who makes indexes does not see.
    let two = case.gzip.bytes.repeat(2);
    let length = (two.len() as u64).to_le_bytes();
    let of_two = changed(&|index| index[33..41].copy_from_slice(&length));
    refused(&two, &of_two, "more than one member");
    // More or less content than there is.
    for by in [1_i64, -1] {
        let size = (case.content.len() as i64 + by).to_le_bytes();
        refused(
            &case.gzip.bytes,
            &changed(&|index| index[49..57].copy_from_slice(&size)),
            "damaged",
        );
    }
    // A window of zeros, and a point that is a bit off: found by who has all of the content.
    let table = good.len() - 29 * case.gzip.blocks.len();
    let blank = changed(&|index| index[333 + 32768 * 9..333 + 32768 * 10].fill(0));
    let index = case.open(&case.gzip.bytes, &blank).unwrap();
    let error = case.check(&index, &case.content).unwrap_err();
    assert!(error.what().contains("gives something else"), "{error}");
    let off = changed(&|index| index[table + 29 * 9 + 24] ^= 1);
    let index = case.open(&case.gzip.bytes, &off).unwrap();
    assert!(case.check(&index, &case.content).is_err());
    let mut other = case.content.clone();
    other[70_000] ^= 1;
    let index = case.open(&case.gzip.bytes, &good).unwrap();
    assert!(case.check(&index, &other).is_err());
    assert!(case.check(&index, &other[1..]).is_err());
}

/// Errors are fine, panics are bugs, and nothing is read that is not there.
#[test]
fn damage_is_an_error_or_other_bytes() {
    let case = Case::new();
    let mut random = Random::new(21);
    for compressed in [false, true] {
        let good = case.gzip.index(&case.content, compressed, |n| n % 5 == 0);
        for number in 0..400 {
            let mut index = good.clone();
            let mut gzip = case.gzip.bytes.clone();
            match number % 3 {
                0 => index[random.below(333) as usize] ^= 1 << random.below(8),
                1 => {
                    let at = good.len() - 1 - random.below(29 * 9) as usize;
                    index[at] ^= 1 << random.below(8);
                }
                _ => {
                    let at = random.below(gzip.len() as u64) as usize;
                    gzip[at] ^= 1 << random.below(8);
                }
            }
            set_checksum(&mut index);
            if let Ok(index) = case.open(&gzip, &index) {
                let mut buffer = vec![0; 5000];
                for _ in 0..4 {
                    let _ = index.read(&mut buffer, random.below(case.content.len() as u64));
                }
                let _ = case.check(&index, &case.content);
            }
        }
    }
}
