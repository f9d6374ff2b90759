// SPDX-License-Identifier: GPL-2.0

//! Squashed and rebased layers: what a device holds stays the same, and what cannot be merged is refused.

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use common::{
    change, content, layers, make, names, on_threads, plain, problems, raw_image, zfile, Random,
};
use ovbd_image::{lsmt::UuidText, zfile::Algorithm};
use ovbd_layers::{
    build::Options,
    layer::{Layer, LayerPath},
    parents::Parents,
    rebase::{rebase, Request},
    squash::{squash, Squashed},
    Result,
};
use tempfile::{tempdir, TempDir};

const BYTES: u64 = (3 << 20) + 4096 + 512;

/// Layers l0, l1, ... in a folder, each over all before it, and the image with all of them: raw.
fn stack(formats: &[Options], seed: u64) -> (TempDir, Vec<PathBuf>) {
    let folder = tempdir().unwrap();
    let raw = folder.path().join("raw");
    raw_image(&raw, BYTES, seed);
    let mut paths: Vec<PathBuf> = Vec::new();
    for (number, format) in formats.iter().enumerate() {
        if number > 0 {
            change(&raw, seed * 100 + number as u64);
        }
        let path = folder.path().join(format!("l{number}"));
        let options = Options {
            base: all(&paths),
            ..format.clone()
        };
        make(&raw, &path, &options);
        paths.push(path);
    }
    (folder, paths)
}

fn all(paths: &[PathBuf]) -> Vec<LayerPath> {
    layers(&paths.iter().map(PathBuf::as_path).collect::<Vec<_>>())
}

fn squashed(paths: &[PathBuf], out: &Path, options: &Options, keep: bool) -> Result<Squashed> {
    let options = Options {
        base: all(paths),
        parents: Parents::Neighbours,
        replace: true,
        ..options.clone()
    };
    squash(out, &options, keep, &())
}

#[test]
fn any_neighbours_in_any_format_read_as_before() {
    let (lz4, zstd) = (Algorithm::Lz4, Algorithm::Zstd);
    let formats = [
        zfile(lz4, 4096),
        zfile(lz4, 4096),
        plain(),
        zfile(zstd, 65536),
        zfile(lz4, 512),
        zfile(zstd, 65536),
    ];
    let (folder, paths) = stack(&formats, 1);
    let wanted = content(&all(&paths)).unwrap();
    let out = folder.path().join("out");
    for first in 0..paths.len() {
        for after in first + 1..=paths.len() {
            for (format, keep) in [
                (&formats[0], true),
                (&formats[0], false),
                (&formats[3], false),
                (&plain(), false),
            ] {
                let made = squashed(&paths[first..after], &out, format, keep).unwrap();
                let mut together = paths[..first].to_vec();
                together.push(out.clone());
                together.extend_from_slice(&paths[after..]);
                // Layers above it and it itself are in order: nothing is ignored here.
                assert_eq!(problems(&all(&together)), [""; 0], "{first} to {after}");
                assert!(
                    content(&all(&together)).unwrap() == wanted,
                    "{first} to {after}, {format:?}"
                );
                let top = Layer::open(&all(&paths[after - 1..after])[0], 0).unwrap();
                assert_eq!(Some(made.uuid), top.uuid());
                assert!(made.copied_bytes <= made.data_bytes);
            }
        }
    }
}

#[test]
fn whole_blocks_are_copied_and_others_are_not() {
    let (folder, paths) = stack(&vec![zfile(Algorithm::Lz4, 4096); 4], 2);
    let out = folder.path().join("out");
    let format = zfile(Algorithm::Lz4, 4096);
    let made = squashed(&paths, &out, &format, false).unwrap();
    assert!(made.data_bytes > 100_000);
    assert_eq!(made.copied_bytes, made.data_bytes, "all of one format");
    // One layer gives the very same file: the UUID is known from the beginning here, and so it is in the header.
    let one = folder.path().join("one");
    let raw = folder.path().join("raw");
    let uuid = UuidText::new(b"01234567-0123-8123-8123-0123456789AB");
    let options = Options {
        uuid,
        ..format.clone()
    };
    make(&raw, &one, &options);
    squashed(&[one.clone()], &out, &format, false).unwrap();
    assert!(fs::read(&out).unwrap() == fs::read(&one).unwrap());
    let other = zfile(Algorithm::Lz4, 8192);
    let made = squashed(&paths, &out, &other, false).unwrap();
    assert_eq!(made.copied_bytes, 0, "blocks of another size");
    let made = squashed(&paths, &out, &other, true).unwrap();
    assert_eq!(made.copied_bytes, made.data_bytes, "as most of it is");
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let formats = [
        zfile(Algorithm::Lz4, 4096),
        plain(),
        zfile(Algorithm::Zstd, 4096),
    ];
    let (folder, paths) = stack(&formats, 3);
    let files = [1, 5].map(|threads| {
        let out = folder.path().join(format!("out{threads}"));
        on_threads(threads, || {
            squashed(&paths, &out, &formats[0], true).unwrap()
        });
        fs::read(out).unwrap()
    });
    assert!(files[0] == files[1]);
}

#[test]
fn sectors_and_sizes_of_all_kinds() {
    // A device that shrinks, with what is behind its end still in a layer, and grows again.
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut paths = Vec::new();
    for (number, bytes) in [300_000_u64, 100_000, 260_000].into_iter().enumerate() {
        let raw = at(&format!("raw{number}"));
        raw_image(&raw, bytes, number as u64 + 7);
        let options = Options {
            base: all(&paths),
            ..zfile(Algorithm::Lz4, 4096)
        };
        let path = at(&format!("l{number}"));
        make(&raw, &path, &options);
        paths.push(path);
    }
    let wanted = content(&all(&paths)).unwrap();
    // Blocks of 64 KiB are larger than what some of them hold.
    for (after, block_bytes) in [(1, 4096), (2, 4096), (3, 4096), (1, 65536), (2, 65536)] {
        let out = at("out");
        squashed(
            &paths[..after],
            &out,
            &zfile(Algorithm::Lz4, block_bytes),
            false,
        )
        .unwrap();
        let mut together = vec![out];
        together.extend_from_slice(&paths[after..]);
        assert!(content(&all(&together)).unwrap() == wanted, "{after}");
    }
}

#[test]
fn damage_is_found_and_leaves_nothing() {
    let (folder, paths) = stack(&vec![zfile(Algorithm::Lz4, 4096); 3], 4);
    let file = File::options().write(true).open(&paths[2]).unwrap();
    // A block that would be copied.
    file.write_all_at(&[0x55; 64], 512 + 4096).unwrap();
    let before = names(folder.path());
    let error = squashed(&paths, &folder.path().join("out"), &plain(), false);
    let copied = squashed(&paths, &folder.path().join("out"), &plain(), true);
    let format = zfile(Algorithm::Lz4, 4096);
    let stored = squashed(&paths, &folder.path().join("out"), &format, false);
    for result in [error, copied, stored] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("l2: "), "{error}");
    }
    assert_eq!(names(folder.path()), before);
}

#[test]
fn only_neighbours_are_squashed() {
    let (folder, paths) = stack(&vec![plain(); 4], 5);
    let out = folder.path().join("out");
    let wrong = [paths[1].clone(), paths[3].clone()];
    let error = squashed(&wrong, &out, &plain(), false).unwrap_err();
    assert!(error.to_string().contains("l3: not the one for"), "{error}");
    // Whoever wants that gets a layer that nobody takes for the topmost one.
    let options = Options {
        base: all(&wrong),
        parents: Parents::Ignored,
        ..plain()
    };
    let made = squash(&out, &options, false, &()).unwrap();
    assert!(made.uuid.is_nil());
    fs::remove_file(&out).unwrap();
    // Its own layers are no place for it.
    let error = squashed(&paths, &paths[1], &plain(), false).unwrap_err();
    assert!(error.to_string().contains("l1"), "{error}");
    assert!(!out.exists());
}

/// A folder with the layer `base` of `bytes`, and three over it: one writes `a` to block 3, one `b` to block 5, one both
/// and something to block 9.
fn two_changes() -> TempDir {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let mut image = Random::new(1).bytes(16 * 4096);
    let build = |image: &[u8], name: &str, base: &[&str]| {
        fs::write(at.join("raw"), image).unwrap();
        let base: Vec<PathBuf> = base.iter().map(|name| at.join(name)).collect();
        let options = Options {
            base: all(&base),
            ..Options::default()
        };
        make(&at.join("raw"), &at.join(name), &options);
    };
    build(&image, "base", &[]);
    let old = image.clone();
    image[3 * 4096..4 * 4096].fill(b'a');
    build(&image, "a", &["base"]);
    image = old;
    image[5 * 4096..6 * 4096].fill(b'b');
    build(&image, "b", &["base"]);
    image[3 * 4096..4 * 4096].fill(b'a');
    image[9 * 4096..10 * 4096].fill(0);
    build(&image, "both", &["base"]);
    fs::write(at.join("wanted"), image).unwrap();
    folder
}

fn rebased(folder: &Path, layer: &str, from: &[&str], to: &[&str]) -> Result<(u64, u64)> {
    let paths = |names: &[&str]| -> Vec<LayerPath> {
        all(&names
            .iter()
            .map(|name| folder.join(name))
            .collect::<Vec<_>>())
    };
    let options = Options {
        base: paths(to),
        replace: true,
        ..Options::default()
    };
    let request = Request {
        layer: &paths(&[layer])[0],
        from: &paths(from),
    };
    let made = rebase(request, &folder.join("out"), &options, &())?;
    let mut stack = to.to_vec();
    stack.push("out");
    assert_eq!(problems(&paths(&stack)), [""; 0]);
    Ok((made.changed_bytes, made.same_bytes))
}

#[test]
fn changes_of_different_blocks_are_merged() {
    let folder = two_changes();
    let at = folder.path();
    let wanted = fs::read(at.join("wanted")).unwrap();
    let read = |names: &[&str]| {
        let paths: Vec<PathBuf> = names.iter().map(|name| at.join(name)).collect();
        content(&all(&paths)).unwrap()
    };
    assert_eq!(
        rebased(at, "b", &["base"], &["base", "a"]).unwrap(),
        (4096, 0)
    );
    assert!(read(&["base", "a", "out"])[..9 * 4096] == wanted[..9 * 4096]);
    // What is there already is left out.
    let (changed, same) = rebased(at, "both", &["base"], &["base", "a"]).unwrap();
    assert_eq!((changed, same), (2 * 4096, 4096));
    assert!(read(&["base", "a", "out"]) == wanted);
    let (changed, same) = rebased(at, "a", &["base"], &["base", "both"]).unwrap();
    assert_eq!((changed, same), (0, 4096));
    assert!(read(&["base", "both", "out"]) == wanted);
    // Over the same layer again nothing is different but the parent.
    assert_eq!(
        rebased(at, "both", &["base"], &["base"]).unwrap(),
        (3 * 4096, 0)
    );
    assert!(read(&["base", "out"]) == wanted);
}

#[test]
fn collisions_are_refused() {
    let folder = two_changes();
    let at = folder.path();
    let raw = |n: u8| {
        let mut image = content(&all(&[at.join("base")])).unwrap();
        image[3 * 4096 + 17] ^= n;
        fs::write(at.join("raw"), image).unwrap();
    };
    raw(1);
    let options = Options {
        base: all(&[at.join("base")]),
        ..Options::default()
    };
    make(&at.join("raw"), &at.join("other"), &options);
    let before = names(at);
    let error = rebased(at, "a", &["base"], &["base", "other"]).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("1 blocks of 4096 bytes"), "{text}");
    assert!(text.contains("at byte 12288"), "{text}");
    assert_eq!(names(at), before);
    // Over what it was not made over.
    let error = rebased(at, "a", &["base", "other"], &["base"]).unwrap_err();
    assert!(error.to_string().contains("a: not the one for"), "{error}");
}

#[test]
fn sizes_are_merged_or_refused() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let sized = |name: &str, bytes: u64, base: &[&str], fill: Option<u64>| {
        let raw = at.join("raw");
        let base: Vec<PathBuf> = base.iter().map(|name| at.join(name)).collect();
        let mut image = match base.is_empty() {
            true => Vec::new(),
            false => content(&all(&base)).unwrap(),
        };
        image.resize(bytes as usize, 0);
        if let Some(at) = fill {
            image[at as usize] = 1;
        }
        fs::write(&raw, image).unwrap();
        let options = Options {
            base: all(&base),
            ..Options::default()
        };
        make(&raw, &at.join(name), &options);
    };
    sized("base", 65536, &[], Some(0));
    sized("grown", 131_072, &["base"], Some(100_000));
    sized("small", 32768, &["base"], None);
    sized("same", 65536, &["base"], Some(40000));
    let bytes = |names: &[&str]| {
        let paths: Vec<PathBuf> = names.iter().map(|name| at.join(name)).collect();
        content(&all(&paths)).unwrap().len()
    };
    rebased(at, "grown", &["base"], &["base", "same"]).unwrap();
    assert_eq!(bytes(&["base", "same", "out"]), 131_072);
    rebased(at, "same", &["base"], &["base", "grown"]).unwrap();
    assert_eq!(bytes(&["base", "grown", "out"]), 131_072);
    let error = rebased(at, "grown", &["base"], &["base", "small"]).unwrap_err();
    assert!(error.to_string().contains("makes 131072 bytes"), "{error}");
    let error = rebased(at, "same", &["base"], &["base", "small"]).unwrap_err();
    assert!(error.to_string().contains("at byte 36864"), "{error}");
}
