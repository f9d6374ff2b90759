// SPDX-License-Identifier: GPL-2.0

//! TurboOCI layers: what the original writes is read with its target, whole or compressed, and nothing else is.

mod common;

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use common::{
    content, fixtures, layers, problems,
    turbo::{blob, VIRTUAL_BYTES},
    zfile, Random,
};
use ovbd_image::{
    lsmt::{Entry, ENTRY_BYTES, HEADER_BYTES, SECTOR_BYTES},
    zfile::Algorithm,
};
use ovbd_layers::{
    blob::Blob,
    build::Options,
    layer::{Layer, LayerPath},
    output::Rules,
    tar::{
        join::join,
        original::{DiffId, Original},
    },
    turbo::Target,
};
use sha2::{Digest, Sha256};
use tempfile::{tempdir, TempDir};

fn entry(start: u64, sectors: u32, stored: u64, tag: u8) -> Entry {
    Entry {
        start,
        sectors,
        stored,
        zeroed: false,
        tag,
    }
}

struct Case {
    folder: TempDir,
    data: Vec<u8>,
    target: Vec<u8>,
}

impl Case {
    fn new() -> Self {
        let mut random = Random::new(4);
        Self {
            folder: tempdir().unwrap(),
            data: random.bytes(4 * 512),
            // The last sector is not whole.
            target: random.bytes(20 * 512 + 100),
        }
    }

    fn path(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn layer(&self, entries: &[Entry], target: &[u8]) -> LayerPath {
        LayerPath::Joined {
            blob: self.path("blob", &blob(&self.data, entries)),
            targets: vec![Target::open(&self.path("target", target), &()).unwrap()],
        }
    }

    fn error(&self, entries: &[Entry]) -> String {
        let layer = self.layer(entries, &self.target);
        let error = Layer::open(&layer, 0).unwrap_err().to_string();
        assert!(!problems(&[layer]).is_empty());
        error
    }

    /// What the entries must read.
    fn wanted(&self, entries: &[Entry]) -> Vec<u8> {
        let mut wanted = vec![0; VIRTUAL_BYTES as usize];
        let mut target = self.target.clone();
        target.resize(21 * 512, 0);
        for entry in entries.iter().filter(|entry| !entry.zeroed) {
            let (from, skip) = match entry.tag {
                0 => (&self.data, HEADER_BYTES as u64),
                _ => (&target, 0),
            };
            let at = (entry.stored * SECTOR_BYTES - skip) as usize;
            let bytes = entry.sectors as usize * 512;
            let to = entry.start as usize * 512;
            wanted[to..to + bytes].copy_from_slice(&from[at..at + bytes]);
        }
        wanted
    }
}

const ENTRIES: [Entry; 5] = [
    Entry {
        start: 0,
        sectors: 2,
        stored: 10,
        zeroed: false,
        tag: 0,
    },
    Entry {
        start: 2,
        sectors: 9,
        stored: 12,
        zeroed: false,
        tag: 1,
    },
    Entry {
        start: 20,
        sectors: 8,
        stored: 1 << 40,
        zeroed: true,
        tag: 1,
    },
    Entry {
        start: 100,
        sectors: 1,
        stored: 0,
        zeroed: false,
        tag: 1,
    },
    Entry {
        start: 200,
        sectors: 1,
        stored: 8,
        zeroed: false,
        tag: 0,
    },
];

#[test]
fn the_blob_and_the_target_are_one_layer() {
    let case = Case::new();
    // Also where the index is whole sectors, and where a writable layer had others below it.
    let mut filled = ENTRIES.to_vec();
    filled.extend((0..27).map(|n| entry(300 + 2 * n, 1, n % 20, 1)));
    let mut raised = ENTRIES.to_vec();
    raised.iter_mut().for_each(|entry| entry.tag += 3);
    for entries in [&ENTRIES[..], &filled, &raised] {
        let layer = case.layer(entries, &case.target);
        assert_eq!(problems(&[layer.clone()]), [""; 0]);
        let mut plain = entries.to_vec();
        let least = plain.iter().map(|entry| entry.tag).min().unwrap();
        plain.iter_mut().for_each(|entry| entry.tag -= least);
        assert!(content(&[layer]).unwrap() == case.wanted(&plain));
    }
    // Without its target it is known for what it is.
    let bare = layers(&[&case.path("blob", &blob(&case.data, &ENTRIES))]);
    let error = Layer::open(&bare[0], 0).unwrap_err();
    assert!(error.what().contains("--target"), "{error}");
    assert!(problems(&bare)[0].contains("TurboOCI"));
}

#[test]
fn a_compressed_target_is_decompressed() {
    let case = Case::new();
    let mut gzip = Vec::new();
    // Two members, of which the original reads one.
    let (one, two) = case.target.split_at(5000);
    for part in [one, two] {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(part).unwrap();
        gzip.extend_from_slice(&encoder.finish().unwrap());
    }
    let zstd = zstd::encode_all(&case.target[..], 3).unwrap();
    for packed in [gzip, zstd] {
        let layer = case.layer(&ENTRIES, &packed);
        assert!(content(&[layer]).unwrap() == case.wanted(&ENTRIES));
        let cut = case.path("cut", &packed[..packed.len() - 9]);
        assert!(Target::open(&cut, &()).is_err());
    }
}

#[test]
fn what_is_in_neither_is_refused() {
    let case = Case::new();
    let beyond = [ENTRIES[0], entry(2, 2, 20, 1)];
    assert!(case.error(&beyond).contains("beyond the 10340 bytes"));
    let huge = [ENTRIES[0], entry(2, 1, (1 << 55) - 1, 1)];
    assert!(case.error(&huge).contains("beyond the 10340 bytes"));
    let third = [ENTRIES[0], entry(2, 1, 8, 2)];
    assert!(case.error(&third).contains("tag"));
    // Of a layer that is all target it cannot be told.
    assert!(case.error(&[entry(2, 1, 8, 1)]).contains("tag"));
    for stored in [7, 12] {
        let outside = [entry(0, 1, stored, 0), ENTRIES[1]];
        assert!(case.error(&outside).contains("outside the data section"));
    }
    let overlap = [ENTRIES[0], entry(1, 1, 8, 1)];
    assert!(case.error(&overlap).contains("overlap"));
    // The target of another layer, a cut blob, and no layer at all.
    let short = case.layer(&ENTRIES, &case.target[..512]);
    assert!(Layer::open(&short, 0).is_err());
    let sound = blob(&case.data, &ENTRIES);
    for bytes in [&sound[..sound.len() - 16], &sound[..5000], &case.target] {
        let layer = LayerPath::Joined {
            blob: case.path("blob", bytes),
            targets: vec![Target::open(&case.path("target", &case.target), &()).unwrap()],
        };
        assert!(Layer::open(&layer, 0).is_err());
        assert!(!problems(&[layer]).is_empty());
    }
}

/// No byte of index or trailer makes it read something else than an error or one of its two files.
#[test]
fn damage_is_an_error_or_other_sectors() {
    let case = Case::new();
    let sound = blob(&case.data, &ENTRIES);
    let index = sound.len() - HEADER_BYTES - ENTRIES.len() * ENTRY_BYTES;
    let mut random = Random::new(11);
    for _ in 0..2000 {
        let mut bytes = sound.clone();
        let at = index + random.below((sound.len() - index).min(220) as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
        let layer = LayerPath::Joined {
            blob: case.path("blob", &bytes),
            targets: vec![Target::open(&case.path("target", &case.target), &()).unwrap()],
        };
        // Errors are fine, panics are bugs.
        let _ = content(&[layer]);
    }
}

/// What is pulled becomes one layer, which reads the same and has the tar.
#[test]
fn both_are_made_one_layer() {
    let case = Case::new();
    let meta = case.path("meta", &blob(&case.data, &ENTRIES));
    let plain = case.path("tar", &case.target);
    let packed = case.path("zstd", &zstd::encode_all(&case.target[..], 1).unwrap());
    let wrapped = Options {
        tar: true,
        ..common::plain()
    };
    for (number, options) in [common::plain(), wrapped, zfile(Algorithm::Lz4, 4096)]
        .into_iter()
        .enumerate()
    {
        for target in [&plain, &packed] {
            let out = case.folder.path().join(format!("out{number}"));
            let made = join(&meta, target, &out, &options, 1 << 20, &()).unwrap();
            let layer = layers(&[&out]);
            assert_eq!(problems(&layer), [""; 0]);
            assert!(content(&layer).unwrap() == case.wanted(&ENTRIES));
            let opened = Layer::open(&layer[0], 0).unwrap();
            let uuid = opened.uuid().unwrap();
            assert_eq!(uuid.as_str(), "01234567-89ab-cdef-0123-456789abcdef");
            let blob = Blob::open(&out).unwrap();
            let original = Original::of(&blob).unwrap();
            assert_eq!(made.diff_id, DiffId(Sha256::digest(&case.target).into()));
            original.check(made.diff_id, &()).unwrap();
            let back = case.folder.path().join("back");
            original.to_file(&back, Rules::default(), &()).unwrap();
            assert!(fs::read(&back).unwrap() == case.target);
            fs::remove_file(back).unwrap();
            fs::remove_file(out).unwrap();
        }
    }
    // What is in neither, out of order, cut, or too large leaves nothing.
    let out = case.folder.path().join("out");
    let refuse = |entries: &[Entry], target: &[u8], limit: u64, says: &str| {
        let meta = case.path("meta", &blob(&case.data, entries));
        let target = case.path("tar", target);
        let error = join(&meta, &target, &out, &common::plain(), limit, &()).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert!(!out.exists());
    };
    let all = &case.target[..];
    refuse(&ENTRIES, all, 5000, "--max-size");
    refuse(&ENTRIES, &all[..5120], 1 << 20, "beyond the 5120 bytes");
    let overlap = [ENTRIES[0], entry(1, 1, 8, 1)];
    refuse(&overlap, all, 1 << 20, "overlap");
    refuse(&[ENTRIES[0], entry(2, 1, 8, 2)], all, 1 << 20, "tag");
    refuse(&[entry(0, 1, 7, 0), ENTRIES[1]], all, 1 << 20, "outside");
    let input = join(&meta, &plain, &plain, &common::plain(), 1 << 20, &());
    assert!(input.is_err());
}

#[test]
fn the_original_s_layer() {
    let Some(folder) = fixtures().map(|all| all.join("x-turbooci")) else {
        return;
    };
    let tar = |folder: &Path| folder.join("target0.tar");
    let target = Target::open(&tar(&folder), &()).unwrap();
    let layer = LayerPath::Joined {
        blob: folder.join("layer0"),
        targets: vec![target],
    };
    let opened = Layer::open(&layer, 0).unwrap();
    assert_eq!(opened.virtual_bytes(), 1 << 30);
    assert_eq!(problems(&[layer]), [""; 0]);
    // Another tar of the same size has the same bounds; one that is cut has not.
    let scratch = tempdir().unwrap();
    let cut = tar(scratch.path());
    fs::write(&cut, &fs::read(tar(&folder)).unwrap()[..100_000]).unwrap();
    let layer = LayerPath::Joined {
        blob: folder.join("layer0"),
        targets: vec![Target::open(&cut, &()).unwrap()],
    };
    let error = Layer::open(&layer, 0).unwrap_err();
    assert!(error.what().contains("beyond the 100000 bytes"), "{error}");
}
