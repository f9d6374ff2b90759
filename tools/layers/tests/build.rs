// SPDX-License-Identifier: GPL-2.0

//! What is built reads back as it was, in every format, on top of any base, on any number of threads.

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use common::{
    change, content, fixtures, layers, make, on_threads, problems, raw_image, whole_sectors, Random,
};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::{
    blob::{Blob, Content},
    build::{build, Options},
    codec::Compressor,
    layer::LayerPath,
    parents::Parents,
    stack::WINDOW_BYTES,
    stack_or_zfile::StackOrZfile,
    zfile::{Cursor, ReadAhead},
};
use tempfile::tempdir;

const BYTES: u64 = (5 << 20) + 4096 + 700;

fn formats() -> Vec<Options> {
    let zfile = |algorithm, block_bytes, block_crc| Options {
        zfile: Some(ZfileOptions {
            block_bytes,
            algorithm,
            block_crc,
        }),
        // Small blocks of noise are not for the original.
        own_reader_only: true,
        ..Options::default()
    };
    let mut formats: Vec<Options> = (9..=16)
        .map(|bits| zfile(Algorithm::Lz4, 1 << bits, true))
        .collect();
    formats.extend([
        zfile(Algorithm::Zstd, 4096, true),
        zfile(Algorithm::Zstd, 65536, false),
        zfile(Algorithm::Lz4, 4096, false),
        Options {
            level: Some(9),
            ..zfile(Algorithm::Lz4, 16384, true)
        },
        Options {
            level: Some(1),
            ..zfile(Algorithm::Zstd, 16384, true)
        },
        Options {
            zfile: None,
            ..Options::default()
        },
    ]);
    formats
}

#[test]
fn reads_back_in_every_format() {
    let folder = tempdir().unwrap();
    let raw = folder.path().join("raw");
    raw_image(&raw, BYTES, 1);
    let expected = whole_sectors(fs::read(&raw).unwrap());
    for (number, mut options) in formats().into_iter().enumerate() {
        for tar in [false, true] {
            options.tar = tar;
            let out = folder.path().join(format!("{number}-{tar}"));
            make(&raw, &out, &options);
            let stack = layers(&[&out]);
            assert_eq!(problems(&stack), [""; 0], "{options:?}");
            assert!(content(&stack).unwrap() == expected, "{options:?}");
        }
    }
}

#[test]
fn raw_reads_back() {
    let folder = tempdir().unwrap();
    let raw = folder.path().join("raw");
    for bytes in [0, 1, 5, 511, 512, 4096, 65537, 3 << 20] {
        raw_image(&raw, bytes, bytes);
        for mut options in formats() {
            if options.zfile.is_none() {
                continue;
            }
            options.raw = true;
            options.replace = true;
            let out = folder.path().join("out");
            make(&raw, &out, &options);
            let file = layers(&[&out]);
            assert_eq!(problems(&file), [""; 0], "{bytes} {options:?}");
            assert!(
                content(&file).unwrap() == fs::read(&raw).unwrap(),
                "{bytes} {options:?}"
            );
        }
    }
}

/// What is read ahead goes into memory that held something else, of which nothing may show.
#[test]
fn reads_ahead_into_used_memory() {
    let folder = tempdir().unwrap();
    let (raw, out) = (folder.path().join("raw"), folder.path().join("out"));
    let wanted = Random::new(9).text(1 << 20);
    fs::write(&raw, &wanted).unwrap();
    let options = Options {
        zfile: Some(ZfileOptions {
            block_bytes: 4096,
            algorithm: Algorithm::Lz4,
            block_crc: false,
        }),
        raw: true,
        ..Options::default()
    };
    make(&raw, &out, &options);
    let opened = Blob::open(&out).unwrap();
    let Content::Zfile(zfile) = &opened.content else {
        panic!("not a ZFile");
    };
    for (from, to) in [(0, 0), (0, 100_000), (200_000, 300_000), (1 << 20, 2 << 20)] {
        let mut ahead = ReadAhead::default();
        zfile.read_ahead(0, 1 << 20, 0, &mut ahead);
        ahead.clear();
        zfile.read_ahead(from, to, 0, &mut ahead);
        let mut cursor = Cursor::default();
        cursor.take_ahead(&Arc::new(ahead), 0);
        let mut data = vec![0; 1 << 20];
        zfile.read(&mut cursor, &mut data, 0).unwrap();
        assert!(data == wanted, "{from} to {to}");
    }
}

#[test]
fn differences_stack_up() {
    let folder = tempdir().unwrap();
    let raw = folder.path().join("raw");
    raw_image(&raw, BYTES, 2);
    let formats = formats();
    let mut stack: Vec<LayerPath> = Vec::new();
    for round in 0..8_u64 {
        change(&raw, 100 + round);
        // The device also shrinks and grows again: what lay beyond must not come back.
        let size = [BYTES, 3 << 20, 6 << 20, 512 * 1001][round as usize % 4];
        File::options()
            .write(true)
            .open(&raw)
            .unwrap()
            .set_len(size)
            .unwrap();
        let out = folder.path().join(format!("layer{round}"));
        let options = Options {
            base: stack.clone(),
            ..formats[round as usize * 2 % formats.len()].clone()
        };
        make(&raw, &out, &options);
        stack.push(LayerPath::Sealed(out));
        assert_eq!(problems(&stack), [""; 0], "round {round}");
        assert!(
            content(&stack).unwrap() == whole_sectors(fs::read(&raw).unwrap()),
            "round {round}"
        );
    }
    let StackOrZfile::Stack(image) = StackOrZfile::open(&stack, Parents::Ignored).unwrap() else {
        panic!("not a stack");
    };
    for pair in image.layers().windows(2) {
        assert_eq!(pair[1].parent_uuid(), pair[0].uuid());
    }
}

#[test]
fn nothing_changed_is_an_empty_layer() {
    let folder = tempdir().unwrap();
    let [raw, base, top] = ["raw", "base", "top"].map(|name| folder.path().join(name));
    raw_image(&raw, BYTES, 3);
    make(&raw, &base, &Options::default());
    let options = Options {
        base: layers(&[&base]),
        ..Options::default()
    };
    make(&raw, &top, &options);
    let StackOrZfile::Stack(stack) =
        StackOrZfile::open(&layers(&[&top]), Parents::Ignored).unwrap()
    else {
        panic!("not a stack");
    };
    assert_eq!(stack.segments().len(), 0);
}

#[test]
fn threads_do_not_matter() {
    let folder = tempdir().unwrap();
    let [raw, one, many] = ["raw", "one", "many"].map(|name| folder.path().join(name));
    raw_image(&raw, 9 << 20, 4);
    for mut options in formats() {
        options.replace = true;
        on_threads(1, || make(&raw, &one, &options));
        on_threads(5, || make(&raw, &many, &options));
        assert!(
            fs::read(&one).unwrap() == fs::read(&many).unwrap(),
            "{options:?}"
        );
    }
}

#[test]
fn uuid_follows_the_content() {
    let folder = tempdir().unwrap();
    let [raw, one, two] = ["raw", "one", "two"].map(|name| folder.path().join(name));
    raw_image(&raw, BYTES, 5);
    let uuid = |path: &Path| match StackOrZfile::open(&layers(&[path]), Parents::Ignored).unwrap() {
        StackOrZfile::Stack(stack) => stack.top().unwrap().uuid().unwrap(),
        StackOrZfile::Zfile(_) => panic!("not a layer"),
    };
    make(&raw, &one, &Options::default());
    let plain = Options {
        zfile: None,
        ..Options::default()
    };
    make(&raw, &two, &plain);
    assert_eq!(uuid(&one), uuid(&two));
    File::options()
        .write(true)
        .open(&raw)
        .unwrap()
        .write_all_at(b"x", 1_000_000)
        .unwrap();
    let again = Options {
        replace: true,
        ..plain
    };
    make(&raw, &two, &again);
    assert_ne!(uuid(&one), uuid(&two));
}

#[test]
fn failures_leave_nothing() {
    let folder = tempdir().unwrap();
    let raw = folder.path().join("raw");
    raw_image(&raw, BYTES, 6);
    let out = folder.path().join("out");
    let fails = |source: &Path, options: &Options| {
        build(source, &out, options, &()).unwrap_err().to_string()
    };
    let missing = folder.path().join("missing");
    assert!(fails(&missing, &Options::default()).contains("missing: cannot open"));
    let base = Options {
        base: layers(&[&raw]),
        ..Options::default()
    };
    assert!(fails(&raw, &base).contains("raw: not a layer; "));
    assert!(fails(folder.path(), &Options::default()).contains("neither a regular file"));
    assert_eq!(common::names(folder.path()), ["raw"]);
    fs::write(&out, "precious").unwrap();
    assert!(fails(&raw, &Options::default()).contains("already exists"));
    assert_eq!(fs::read(&out).unwrap(), b"precious");
}

#[test]
fn a_source_that_changes_is_reported() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    raw_image(&raw, BYTES, 7);
    let source = ovbd_layers::source::RawSource::open(&raw, false).unwrap();
    source.check_unchanged().unwrap();
    File::options()
        .write(true)
        .open(&raw)
        .unwrap()
        .set_len(BYTES / 2)
        .unwrap();
    let error = source.check_unchanged().unwrap_err().to_string();
    assert!(error.ends_with("raw: changed while it was read"), "{error}");
    let error = source
        .read_window(BYTES / WINDOW_BYTES, &mut Vec::new())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("became shorter while it was read at byte"),
        "{error}"
    );
    assert!(!out.exists());
}

#[test]
fn scattered_blocks_are_kept_apart() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    let file = File::create(&raw).unwrap();
    for block in 0..600 {
        file.write_all_at(&[1; 4096], block * 8192).unwrap();
    }
    make(&raw, &out, &Options::default());
    let StackOrZfile::Stack(stack) =
        StackOrZfile::open(&layers(&[&out]), Parents::Ignored).unwrap()
    else {
        panic!("not a stack");
    };
    assert_eq!(stack.segments().len(), 600);
}

/// lz4 gives the bytes that it gave the original. (zstd's bytes depend on the version of the library.)
#[test]
fn recompressing_fixtures_gives_their_bytes() {
    let Some(fixtures) = fixtures() else {
        return;
    };
    let mut compared = 0;
    for case in [
        "c-zfile-lz4-4k-crc",
        "d-zfile-lz4-16k",
        "d-zfile-lz4-64k",
        "f-zfile-noverify",
        "i-incompressible-lz4-32k",
        "i-incompressible-lz4-64k",
        "p-raw-100003-lz4-4k",
    ] {
        let opened = Blob::open(&fixtures.join(case).join("layer0")).unwrap();
        let Content::Zfile(zfile) = &opened.content else {
            panic!("{case} is not a ZFile");
        };
        let geometry = zfile.geometry();
        let mut compressor = Compressor::new(geometry.algorithm(), None).unwrap();
        let mut out = vec![0; Compressor::bound(geometry.block_bytes() as usize)];
        for number in 0..geometry.blocks() {
            let mut block = vec![0; geometry.decoded_bytes(number) as usize];
            let at = number * u64::from(geometry.block_bytes());
            zfile.read(&mut Cursor::default(), &mut block, at).unwrap();
            let n = compressor.compress(&block, &mut out).unwrap();
            let extent = zfile.extent(number).unwrap();
            let mut stored = vec![0; extent.bytes as usize];
            zfile.input().read(&mut stored, extent.offset).unwrap();
            let data = geometry.payload(&stored, ovbd_layers::crc::crc32c).unwrap();
            assert!(data == &out[..n], "{case}: block {number} differs");
            // A second decoder agrees.
            let again = lz4_flex::block::decompress(data, block.len()).unwrap();
            assert!(again == block, "{case}: block {number} decodes differently");
            compared += 1;
        }
    }
    assert!(compared > 100);
}
