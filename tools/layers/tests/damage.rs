// SPDX-License-Identifier: GPL-2.0

//! Damaged files end in an error or in the right content, never in a panic or in wrong content that a
//! checksum would have shown.

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use common::{content, layers, make, problems, raw_image, whole_sectors, Random};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::{build::Options, output::Rules, parents::Parents};
use tempfile::tempdir;

fn small(folder: &Path, options: &Options) -> (Vec<u8>, Vec<u8>) {
    let (raw, blob) = (folder.join("raw"), folder.join("blob"));
    let mut random = Random::new(9);
    let mut data = random.text(5000);
    data.resize(20_000, 0);
    data.extend(random.bytes(700));
    fs::write(&raw, &data).unwrap();
    make(&raw, &blob, options);
    if !options.raw {
        data = whole_sectors(data);
    }
    (data, fs::read(&blob).unwrap())
}

fn kinds() -> Vec<Options> {
    let zfile = |algorithm, raw, tar| Options {
        zfile: Some(ZfileOptions {
            block_bytes: 4096,
            algorithm,
            block_crc: true,
        }),
        raw,
        tar,
        replace: true,
        ..Options::default()
    };
    vec![
        zfile(Algorithm::Lz4, false, false),
        zfile(Algorithm::Zstd, true, false),
        zfile(Algorithm::Lz4, false, true),
        Options {
            zfile: None,
            replace: true,
            ..Options::default()
        },
    ]
}

/// Whether a tar or final header makes the end of the file irrelevant from this byte on.
fn needed(blob: &[u8], options: &Options) -> usize {
    match (options.tar, options.zfile) {
        (true, _) => blob.len() - 1024,
        (false, Some(_)) => blob.len() - 512,
        (false, None) => blob.len(),
    }
}

#[test]
fn truncated_at_every_length() {
    for options in kinds() {
        let folder = tempdir().unwrap();
        let (data, blob) = small(folder.path(), &options);
        let path = folder.path().join("cut");
        let needed = needed(&blob, &options);
        fs::write(&path, &blob).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        for length in (0..blob.len()).rev() {
            file.set_len(length as u64).unwrap();
            let cut = layers(&[&path]);
            match content(&cut) {
                Ok(read) => {
                    assert!(
                        length >= needed - 512,
                        "{length} of {} {options:?}",
                        blob.len()
                    );
                    assert!(read == data, "{length} {options:?}");
                }
                Err(e) => {
                    assert!(e.to_string().contains("cut: "), "{e}");
                    assert_ne!(problems(&cut), [""; 0], "{length} {options:?}");
                }
            }
        }
    }
}

#[test]
fn one_byte_flipped_anywhere() {
    for options in kinds() {
        let folder = tempdir().unwrap();
        let (data, blob) = small(folder.path(), &options);
        let path = folder.path().join("flipped");
        fs::write(&path, &blob).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let mut random = Random::new(10);
        for (at, byte) in blob.iter().enumerate() {
            let flipped = byte ^ (1 << random.below(8));
            file.write_all_at(&[flipped], at as u64).unwrap();
            let stack = layers(&[&path]);
            let found = problems(&stack);
            let read = content(&stack);
            if options.zfile.is_some() {
                // Everything that counts has a checksum.
                if let Ok(read) = &read {
                    assert!(*read == data, "byte {at} {options:?}");
                }
            }
            if found.is_empty() {
                assert!(read.is_ok(), "byte {at}: verify does not find {read:?}");
            }
            file.write_all_at(&[*byte], at as u64).unwrap();
        }
    }
}

#[test]
fn many_bytes_changed() {
    let mut random = Random::new(11);
    for options in kinds() {
        let folder = tempdir().unwrap();
        let (_, blob) = small(folder.path(), &options);
        let path = folder.path().join("changed");
        fs::write(&path, &blob).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        for _ in 0..1500 {
            let mut changed = blob.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(changed.len() as u64 - 8) as usize;
                let value = match random.below(4) {
                    0 => 0,
                    1 => u64::MAX,
                    2 => 1 << random.below(64),
                    _ => random.next(),
                };
                let n = 1 << random.below(4);
                changed[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
            }
            file.write_all_at(&changed, 0).unwrap();
            let stack = layers(&[&path]);
            let found = problems(&stack);
            if content(&stack).is_err() {
                assert_ne!(found, [""; 0]);
            }
        }
    }
}

#[test]
fn a_failed_export_leaves_nothing() {
    let folder = tempdir().unwrap();
    let raw = folder.path().join("raw");
    raw_image(&raw, 3 << 20, 12);
    let blob = folder.path().join("blob");
    make(&raw, &blob, &Options::default());
    let mut bytes = fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let image =
        ovbd_layers::stack_or_zfile::StackOrZfile::open(&layers(&[&blob]), Parents::Ignored)
            .unwrap();
    let out = folder.path().join("out");
    let error = ovbd_layers::export::to_file(&image, &out, Rules::default(), &()).unwrap_err();
    assert!(
        error.to_string().contains("CRC mismatch at byte"),
        "{error}"
    );
    assert_eq!(common::names(folder.path()), ["blob", "raw"]);
}
