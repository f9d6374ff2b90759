// SPDX-License-Identifier: GPL-2.0

//! What a layer cannot hold, or what the original could not read of it, is known and said before anything is lost.

mod common;

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use common::{content, layers, make, names, on_threads, problems, whole_sectors, Random};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::{
    build::{build, Options},
    delta::{self, Known, Pair},
    direct::DirectFile,
    layer::LayerPath,
    parents::Parents,
    report::Report,
    split,
    stack::Stack,
    Error,
};
use tempfile::{tempdir, tempdir_in, TempDir};

/// Keeps the warnings.
#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Report for Warnings {
    fn expect(&self, _bytes: u64) {}
    fn add(&self, _bytes: u64) {}
    fn warn(&self, error: &Error) {
        self.0.lock().unwrap().push(error.to_string());
    }
}

fn refused(source: &Path, out: &Path, options: &Options) -> String {
    build(source, out, options, &()).unwrap_err().to_string()
}

/// A folder in which files can be larger than any disk.
fn huge() -> TempDir {
    tempdir_in("/dev/shm").or_else(|_| tempdir()).unwrap()
}

fn zfile(block_bytes: u32, algorithm: Algorithm) -> Options {
    Options {
        zfile: Some(ZfileOptions {
            block_bytes,
            algorithm,
            block_crc: true,
        }),
        replace: true,
        ..Options::default()
    }
}

#[test]
fn an_image_that_entries_cannot_address() {
    let folder = huge();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    let file = File::create(&raw).unwrap();
    let most = ((1 << 50) - 1) * 512;
    file.set_len(most + 1).unwrap();
    let error = refused(&raw, &out, &Options::default());
    assert!(
        error.ends_with(&format!("of which a layer can have {most}")),
        "{error}"
    );
    assert_eq!(names(folder.path()), ["raw"]);
    file.set_len(most).unwrap();
    make(&raw, &out, &Options::default());
    assert_eq!(problems(&layers(&[&out])), [""; 0]);
    let raw_zfile = Options {
        raw: true,
        ..zfile(512, Algorithm::Lz4)
    };
    let error = refused(&raw, &out, &raw_zfile);
    assert!(
        error.contains("blocks, of which a ZFile can have 1000000000"),
        "{error}"
    );
}

#[test]
fn short_gaps_are_stored_where_segments_do_not_suffice() {
    let folder = tempdir().unwrap();
    let [base, raw, bottom, top, again] =
        ["base", "raw", "bottom", "top", "again"].map(|name| folder.path().join(name));
    let mut random = Random::new(1);
    let mut data = random.bytes(6 << 20);
    fs::write(&base, &data).unwrap();
    make(&base, &bottom, &Options::default());
    for block in (0..data.len() / 4096).step_by(2) {
        let at = block * 4096;
        match block % 6 {
            0 => data[at..at + 4096].fill(0),
            _ => data[at] ^= 1,
        }
    }
    fs::write(&raw, &data).unwrap();
    let over = |max_segments, replace| Options {
        base: layers(&[&bottom]),
        max_segments,
        replace,
        ..Options::default()
    };
    make(&raw, &top, &over(768, false));
    let segments = |top: &Path| {
        let stack = Stack::open(&layers(&[&bottom, top]), Parents::All).unwrap();
        (stack.layers()[1].segments().len(), stack.layers()[1].uuid())
    };
    let (fine, uuid) = segments(&top);
    assert_eq!(fine, 768);
    for max_segments in [767, 300, 100, 6, 1] {
        let warnings = Warnings::default();
        build(&raw, &top, &over(max_segments, true), &warnings).unwrap();
        let warnings = warnings.0.into_inner().unwrap();
        assert!(
            warnings[0].contains("768 segments, of which a layer can have"),
            "{warnings:?}"
        );
        let (count, same) = segments(&top);
        assert!(count as u64 <= max_segments, "{count} {max_segments}");
        // It is the same change.
        assert_eq!(same, uuid);
        let stack = layers(&[&bottom, &top]);
        assert_eq!(problems(&stack), [""; 0]);
        assert!(content(&stack).unwrap() == data);
        on_threads(1, || make(&raw, &again, &over(max_segments, true)));
        assert!(fs::read(&again).unwrap() == fs::read(&top).unwrap());
    }
    let error = refused(&raw, &top, &over(0, true));
    assert!(
        error.contains("needs 768 segments, of which a layer can have 0"),
        "{error}"
    );
}

#[test]
fn a_base_of_255_layers_is_full() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    fs::write(&raw, vec![1; 8192]).unwrap();
    let missing = LayerPath::Sealed(PathBuf::from("missing"));
    let over = |count| Options {
        base: vec![missing.clone(); count],
        ..Options::default()
    };
    let error = refused(&raw, &out, &over(255));
    assert!(error.contains("a stack has at most 255 layers"), "{error}");
    assert!(refused(&raw, &out, &over(254)).contains("missing"));
    assert_eq!(names(folder.path()), ["raw"]);
}

#[test]
fn sizes_are_whole_sectors() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    for (bytes, size) in [(1, 512), (513, 1024), (8192, 8192), (4097, 4608)] {
        fs::write(&raw, vec![7; bytes]).unwrap();
        let plain = Options {
            zfile: None,
            replace: true,
            ..Options::default()
        };
        make(&raw, &out, &plain);
        let stack = Stack::open(&layers(&[&out]), Parents::All).unwrap();
        assert_eq!(stack.virtual_bytes(), size);
        let blob = fs::read(&out).unwrap();
        // In header and trailer.
        for at in [48, blob.len() - 4096 + 48] {
            assert_eq!(blob[at..at + 8], size.to_le_bytes());
        }
    }
}

#[test]
fn the_original_can_read_what_is_written() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    let mut random = Random::new(3);
    fs::write(&raw, random.bytes(300_000)).unwrap();
    for (block_bytes, algorithm, hint) in [
        (512, Algorithm::Lz4, Some("a larger --block-size helps")),
        (512, Algorithm::Zstd, Some("a larger --block-size helps")),
        (65536, Algorithm::Lz4, Some("a smaller --block-size helps")),
        (1024, Algorithm::Lz4, None),
        (32768, Algorithm::Lz4, None),
    ] {
        let options = zfile(block_bytes, algorithm);
        match hint {
            None => make(&raw, &out, &options),
            Some(hint) => {
                let error = refused(&raw, &out, &options);
                assert!(
                    error.contains(hint) && error.contains("--own-reader-only"),
                    "{error}"
                );
                assert_eq!(names(folder.path()), ["raw"]);
                let own = Options {
                    own_reader_only: true,
                    ..options
                };
                make(&raw, &out, &own);
            }
        }
        let stack = layers(&[&out]);
        assert!(content(&stack).unwrap() == whole_sectors(fs::read(&raw).unwrap()));
        fs::remove_file(&out).unwrap();
    }
    // What compresses, it reads in any blocks.
    fs::write(&raw, random.text(300_000)).unwrap();
    for block_bytes in [512, 65536] {
        make(&raw, &out, &zfile(block_bytes, Algorithm::Lz4));
    }
}

/// First sector and sectors of the merged index, after a look at the first 16 KiB, which must be those of `raw`.
fn first_segment(paths: &[&Path], raw: &File) -> Option<(u64, u32)> {
    let stack = Stack::open(&layers(paths), Parents::All).unwrap();
    let mut read = [0; 16384];
    stack.reader().read(&mut read, 0).unwrap();
    let mut wanted = [0; 16384];
    raw.read_exact_at(&mut wanted, 0).unwrap();
    assert!(read == wanted);
    assert_eq!(problems(&layers(paths)), [""; 0]);
    let segments = stack.segments();
    segments
        .first()
        .map(|first| (first.start(), first.sectors()))
}

/// Of stacks beyond 2 TiB the original reads wrongly those whose index starts at sector 0.
#[test]
fn large_images_do_not_start_at_sector_0() {
    let folder = huge();
    let [raw, base, top] = ["raw", "base", "top"].map(|name| folder.path().join(name));
    let options = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .clone();
    let file = options.open(&raw).unwrap();
    file.set_len(3 << 40).unwrap();
    let start = |paths: &[&Path]| first_segment(paths, &file);
    // As ext4: its superblock is at byte 1024.
    file.write_all_at(&[7; 3000], 1024).unwrap();
    make(&raw, &base, &Options::default());
    assert_eq!(start(&[&base]), Some((2, 6)));
    // A change that makes the start zero, over a base where it was not.
    let over = || Options {
        base: layers(&[&base]),
        replace: true,
        ..Options::default()
    };
    file.write_all_at(&[0; 3000], 1024).unwrap();
    make(&raw, &top, &over());
    assert_eq!(start(&[&base, &top]), Some((2, 6)));
    // A boot record cannot be left out.
    file.write_all_at(&[1; 512], 0).unwrap();
    make(&raw, &top, &over());
    assert_eq!(start(&[&base, &top]).unwrap().0, 0);
    // Nor where it was.
    file.write_all_at(&[0; 512], 512).unwrap();
    fs::rename(&top, &base).unwrap();
    let base_options = Options {
        replace: true,
        ..Options::default()
    };
    make(&raw, &base, &base_options);
    file.write_all_at(&[0; 512], 0).unwrap();
    make(&raw, &top, &over());
    assert_eq!(start(&[&base, &top]).unwrap().0, 0);
}

/// As [`large_images_do_not_start_at_sector_0`], of what is written from known ranges of two devices.
#[test]
fn large_differences_do_not_start_at_sector_0() {
    // Direct reads need a file system that has them.
    let folder = tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| folder.path().join(name));
    let at = |file: &Path, bytes: &[u8], at: u64| {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).open(file);
        let file = file.unwrap();
        file.set_len(3 << 40).unwrap();
        file.write_all_at(bytes, at).unwrap();
        file
    };
    let write = |known: Known, old: Option<&Path>| {
        let new = DirectFile::open(&new).unwrap();
        let old = old.map(|old| DirectFile::open(old).unwrap());
        let range = delta::Range {
            start: 0,
            bytes: 8192,
            known,
        };
        let pair = Pair {
            new: &new,
            old: old.as_ref(),
            ranges: &[range].into_iter().collect(),
            always: true,
        };
        let out = tempdir_in(folder.path()).unwrap();
        let written = delta::write(pair, out.path(), &Options::default(), &(), &|| Ok(()));
        let path = written.unwrap().layers.remove(0).0;
        (out, path)
    };
    let raw = at(&new, &[7; 3000], 1024);
    at(&old, &[0; 3000], 1024);
    for known in [Known::WasZero, Known::Changed, Known::Whole] {
        let (_out, layer) = write(known, Some(&old));
        assert_eq!(first_segment(&[&layer], &raw).unwrap().0, 2, "{known:?}");
    }
    // What is below is not known.
    let (_out, layer) = write(Known::Whole, None);
    assert_eq!(first_segment(&[&layer], &raw).unwrap().0, 0);
    // It is not zero, in the sector before.
    at(&old, &[9; 4], 512);
    for known in [Known::Changed, Known::Whole] {
        let (_out, layer) = write(known, Some(&old));
        assert_eq!(first_segment(&[&layer], &raw).unwrap().0, 1, "{known:?}");
    }
    let raw = at(&new, &[0; 4096], 0);
    let (_out, layer) = write(Known::Zeroed, Some(&old));
    assert_eq!(first_segment(&[&layer], &raw).unwrap(), (1, 15));
}

/// As [`large_images_do_not_start_at_sector_0`], of a layer that is split.
#[test]
fn parts_of_large_images_do_not_start_at_sector_0() {
    let folder = huge();
    let [raw, whole] = ["raw", "whole"].map(|name| folder.path().join(name));
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&raw);
    let file = file.unwrap();
    file.set_len(3 << 40).unwrap();
    for (number, start) in [(0, 2), (1, 0)] {
        file.write_all_at(&[7; 3000], 1024).unwrap();
        file.write_all_at(&[7; 9000], 1 << 40).unwrap();
        if start == 0 {
            file.write_all_at(&[7], 0).unwrap();
        }
        let plain = Options {
            replace: true,
            ..Options::default()
        };
        make(&raw, &whole, &plain);
        let stack = Stack::open(&layers(&[&whole]), Parents::All).unwrap();
        let (mut files, mut below) = (Vec::new(), None);
        for (part, range) in split::parts(&stack, 4096).into_iter().enumerate() {
            let path = folder.path().join(format!("{number}-{part}"));
            let options = Options {
                parent_uuid: below,
                ..Options::default()
            };
            below = Some(split::write_part(&stack, range, &path, &options, &()).unwrap());
            files.push(path);
        }
        let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        assert!(paths.len() > 2);
        assert_eq!(first_segment(&paths, &file).unwrap().0, start);
    }
}

#[test]
fn a_raw_zfile_of_holes_and_data() {
    let folder = tempdir().unwrap();
    let [raw, dense, out, again] =
        ["raw", "dense", "out", "again"].map(|name| folder.path().join(name));
    let file = File::create(&raw).unwrap();
    file.set_len((40 << 20) + 777).unwrap();
    for at in [0, 3 << 20, (7 << 20) + 100_000, 40 << 20] {
        file.write_all_at(&[9; 700], at).unwrap();
    }
    let bytes = fs::read(&raw).unwrap();
    fs::write(&dense, &bytes).unwrap();
    for block_bytes in [512, 4096, 65536] {
        let options = Options {
            raw: true,
            ..zfile(block_bytes, Algorithm::Lz4)
        };
        make(&raw, &out, &options);
        make(&dense, &again, &options);
        assert!(fs::read(&out).unwrap() == fs::read(&again).unwrap());
        assert!(content(&layers(&[&out])).unwrap() == bytes);
    }
}

#[test]
fn foreign_images_are_named() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    for (first, name) in [
        (&b"QFI\xfb\0\0\0\x03"[..], Some("a qcow2 image")),
        (b"KDMV\x01\0\0\0", Some("a VMDK image")),
        (b"ordinary", None),
    ] {
        let mut bytes = first.to_vec();
        bytes.resize(8192, 0);
        fs::write(&raw, bytes).unwrap();
        let warnings = Warnings::default();
        let options = Options {
            replace: true,
            ..Options::default()
        };
        build(&raw, &out, &options, &warnings).unwrap();
        let warnings = warnings.0.into_inner().unwrap();
        assert_eq!(warnings.len(), usize::from(name.is_some()), "{warnings:?}");
        if let Some(name) = name {
            assert!(warnings[0].contains(name), "{warnings:?}");
        }
    }
}

/// The least that export can do with: nothing may depend on the number of layers.
#[test]
fn a_stack_of_255_layers_exports() {
    let folder = huge();
    let raw = folder.path().join("raw");
    let mut data = vec![0; 4 << 20];
    let mut stack: Vec<PathBuf> = Vec::new();
    for number in 0..255_usize {
        for block in (number..1024).step_by(255) {
            data[block * 4096..][..4096].fill(number as u8 + 1);
        }
        fs::write(&raw, &data).unwrap();
        let out = folder.path().join(format!("layer{number}"));
        let below: Vec<&Path> = stack.iter().map(PathBuf::as_path).collect();
        let options = Options {
            base: layers(&below[..]),
            ..zfile(65536, Algorithm::Lz4)
        };
        // Comparing with a growing stack would take long; only the last layers name their parents.
        let options = match number {
            0 => options,
            _ => Options {
                base: Vec::new(),
                ..options
            },
        };
        make(&raw, &out, &options);
        stack.push(out);
    }
    let paths: Vec<&Path> = stack.iter().map(PathBuf::as_path).collect();
    assert!(content(&layers(&paths)).unwrap() == data);
}

#[test]
fn a_pipe_is_a_source() {
    let folder = tempdir().unwrap();
    let [raw, fifo, out, again] =
        ["raw", "fifo", "out", "again"].map(|name| folder.path().join(name));
    for bytes in [1, 4096, (1 << 20) - 1, 1 << 20, (3 << 20) + 700] {
        let data = Random::new(bytes as u64).text(bytes);
        fs::write(&raw, &data).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        for options in [
            zfile(4096, Algorithm::Lz4),
            Options {
                raw: true,
                ..zfile(4096, Algorithm::Lz4)
            },
        ] {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut pipe = File::options().write(true).open(&fifo).unwrap();
                    pipe.write_all(&data).unwrap();
                });
                make(&fifo, &out, &options);
            });
            make(&raw, &again, &options);
            let file = layers(&[&out]);
            assert_eq!(problems(&file), [""; 0]);
            assert!(content(&file).unwrap() == content(&layers(&[&again])).unwrap());
            if !options.raw {
                let uuid = |path: &Path| {
                    let stack = Stack::open(&layers(&[path]), Parents::All).unwrap();
                    stack.layers()[0].uuid()
                };
                assert_eq!(uuid(&out), uuid(&again));
            }
        }
        fs::remove_file(&fifo).unwrap();
    }
}
