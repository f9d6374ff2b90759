// SPDX-License-Identifier: GPL-2.0

//! What verify finds of damage that no reader stumbles over, and what it says that it cannot find.

mod common;

use std::{fs, path::Path};

use common::{layers, make, raw_image, Random};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::{
    build::Options,
    parents::Parents,
    verify::{verify, Finding, State, Verdict},
};
use tempfile::{tempdir, TempDir};

/// The verdict, and the lines of all problems.
fn look(path: &Path) -> (Verdict, Vec<String>) {
    let mut lines = Vec::new();
    let verdict = verify(
        &layers(&[path]),
        Parents::UnlessAlone,
        &(),
        &mut |finding| {
            let (Finding::Problem(e) | Finding::Warning(e)) = finding;
            lines.push(e.to_string());
        },
    );
    (verdict, lines)
}

struct Blob {
    folder: TempDir,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(options: &Options) -> Self {
        let folder = tempdir().unwrap();
        let [raw, out] = ["raw", "blob"].map(|name| folder.path().join(name));
        raw_image(&raw, 2 << 20, 5);
        make(&raw, &out, options);
        let bytes = fs::read(&out).unwrap();
        let blob = Self { folder, bytes };
        let (verdict, lines) = blob.with(|_| {});
        assert_eq!(verdict.state, State::Sound, "{lines:?}");
        assert_eq!(lines, [""; 0]);
        blob
    }

    /// Looks at the blob after a change.
    fn with(&self, change: impl FnOnce(&mut Vec<u8>)) -> (Verdict, Vec<String>) {
        let mut bytes = self.bytes.clone();
        change(&mut bytes);
        let path = self.folder.path().join("changed");
        fs::write(&path, bytes).unwrap();
        look(&path)
    }

    /// Checks that a change is damage, and that a line says so.
    fn damaged(&self, line: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let (verdict, lines) = self.with(change);
        assert_eq!(verdict.state, State::Damaged, "{line}");
        assert!(
            lines.iter().any(|found| found.contains(line)),
            "{line}: {lines:?}"
        );
    }
}

fn plain() -> Options {
    Options {
        zfile: None,
        ..Options::default()
    }
}

fn zfile(block_crc: bool) -> Options {
    Options {
        zfile: Some(ZfileOptions {
            block_bytes: 4096,
            algorithm: Algorithm::Lz4,
            block_crc,
        }),
        ..Options::default()
    }
}

#[test]
fn the_ends_of_a_zfile() {
    let blob = Blob::new(&zfile(true));
    let length = blob.bytes.len();
    blob.damaged("wrong ZFile trailer magic", |bytes| {
        bytes[length - 512] ^= 1
    });
    blob.damaged("ZFile trailer digest mismatch", |bytes| {
        bytes[length - 1] ^= 1
    });
    blob.damaged("cut off: 10 bytes are missing", |bytes| {
        bytes.truncate(length - 10)
    });
    blob.damaged("cut off: 512 bytes are missing", |bytes| {
        bytes.truncate(length - 512)
    });
    blob.damaged("something follows the end of the ZFile", |bytes| {
        bytes.push(0)
    });
    blob.damaged("something follows the end of the ZFile", |bytes| {
        bytes.extend(Random::new(1).bytes(1_700_000));
    });
    // The trailer of another one.
    let other = Blob::new(&zfile(false));
    blob.damaged("header and trailer differ", |bytes| {
        bytes.truncate(length - 512);
        bytes.extend_from_slice(&other.bytes[other.bytes.len() - 512..]);
    });
}

#[test]
fn what_fills_up_a_layer() {
    let blob = Blob::new(&plain());
    let length = blob.bytes.len();
    let fills = "bytes that fill up header, index or trailer are not zero";
    for at in [390, 1000, 4095, length - 1, length - 4096 + 390] {
        blob.damaged(fills, |bytes| bytes[at] ^= 1);
    }
    // The last entry of the index is padding: its second word, and its length.
    for at in [length - 4096 - 1, length - 4096 - 8, length - 4096 - 9] {
        let (verdict, lines) = blob.with(|bytes| bytes[at] ^= 0x10);
        assert_eq!(verdict.state, State::Damaged, "{at}: {lines:?}");
    }
    blob.damaged(
        "header and trailer differ in their virtual sizes",
        |bytes| bytes[48 + 2] ^= 1,
    );
    blob.damaged("wrong LSMT trailer magic", |bytes| {
        bytes.truncate(length - 10)
    });
    blob.damaged("wrong LSMT trailer magic", |bytes| {
        bytes.resize(length + 1_700_000, 0)
    });
}

#[test]
fn the_end_of_a_tar() {
    for options in [plain(), zfile(true)] {
        let blob = Blob::new(&Options {
            tar: true,
            ..options
        });
        let length = blob.bytes.len();
        blob.damaged("cut off: the tar archive has", |bytes| {
            bytes.truncate(length - 10)
        });
        blob.damaged("something follows the layer", |bytes| bytes[length - 1] = 1);
        blob.damaged("something follows the layer", |bytes| {
            bytes.extend(Random::new(1).bytes(1_700_000));
        });
        // tar itself ends with more zeros.
        let (verdict, lines) = blob.with(|bytes| bytes.extend([0; 10240]));
        assert_eq!(verdict.state, State::Sound, "{lines:?}");
    }
}

#[test]
fn what_has_no_checksums_is_not_called_verified() {
    for options in [plain(), zfile(false)] {
        let blob = Blob::new(&options);
        let (verdict, _) = blob.with(|_| {});
        assert_eq!(verdict.unverified.len(), 1);
        let text = verdict.to_string();
        assert!(
            text.ends_with("no checksums in 1 layer: content not verified"),
            "{text}"
        );
    }
    let (verdict, _) = Blob::new(&zfile(true)).with(|_| {});
    assert!(verdict.unverified.is_empty());
    assert!(verdict.blocks > 10 && verdict.entries == 256);
    assert!(
        verdict.to_string().starts_with("1 layer sound: "),
        "{verdict}"
    );
}

#[test]
fn many_findings_are_counted() {
    let blob = Blob::new(&zfile(true));
    let data = blob.bytes.len() / 2;
    let (verdict, lines) = blob.with(|bytes| bytes[512..data].fill(0xaa));
    assert!(verdict.problems > 50, "{}", verdict.problems);
    let crc: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("CRC mismatch"))
        .collect();
    assert_eq!(crc.len(), 21);
    assert!(
        crc[20].contains("ZFile block CRC mismatch: "),
        "{}",
        crc[20]
    );
    assert!(crc[20].ends_with(" more of these"), "{}", crc[20]);
}

#[test]
fn what_cannot_be_read_is_not_called_damaged() {
    let folder = tempdir().unwrap();
    let (verdict, lines) = look(&folder.path().join("missing"));
    assert_eq!(verdict.state, State::Unreadable, "{lines:?}");
    // Damage is known all the same.
    let blob = Blob::new(&plain());
    let path = folder.path().join("damaged");
    fs::write(&path, &blob.bytes[..5000]).unwrap();
    let both = layers(&[&folder.path().join("missing"), &path]);
    let verdict = verify(&both, Parents::Ignored, &(), &mut |_| {});
    assert_eq!(verdict.state, State::Damaged);
}
