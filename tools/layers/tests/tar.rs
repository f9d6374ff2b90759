// SPDX-License-Identifier: GPL-2.0

//! Layers over original tars: the file system is what the tool makes of the tar, and the tar comes back bit for bit,
//! whatever is in it.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    content, layers, names, plain, problems,
    programs::{has, skip},
    tars::{set_checksum, Member, Tar},
    zfile, Random,
};
use ovbd_image::{lsmt::SECTOR_BYTES, zfile::Algorithm};
use ovbd_layers::{
    blob::Blob,
    build::Options,
    export,
    layer::{Layer, LayerPath},
    output::Rules,
    parents::Parents,
    stack_or_zfile::StackOrZfile,
    tar::{
        filesystem::Kind,
        original::{DiffId, Original},
        verbatim::{build_from_tar, Made, TarOptions},
    },
    Result,
};
use sha2::{Digest, Sha256};
use tempfile::{tempdir, TempDir};

const EROFS: TarOptions = TarOptions {
    filesystem: Kind::Erofs,
    max_bytes: 1 << 30,
};

/// Builds a layer of `tar` with `options`, and checks that the tar is in it.
fn made(folder: &Path, name: &str, tar: &[u8], options: &Options) -> Result<(PathBuf, Made)> {
    let source = folder.join(format!("{name}.tar"));
    fs::write(&source, tar).unwrap();
    let layer = folder.join(name);
    let made = build_from_tar(&source, &layer, options, EROFS, &())?;
    let blob = Blob::open(&layer).unwrap();
    let original = Original::of(&blob).unwrap();
    assert_eq!(original.bytes(), tar.len() as u64);
    let id = DiffId(Sha256::digest(tar).into());
    assert_eq!(made.diff_id, id);
    original.check(id, &()).unwrap();
    assert!(original.check(DiffId([1; 32]), &()).is_err());
    let back = folder.join(format!("{name}.back"));
    original.to_file(&back, Rules::default(), &()).unwrap();
    assert!(fs::read(&back).unwrap() == tar);
    Ok((layer, made))
}

#[test]
fn an_ext4_over_a_tar() {
    if !has("mke2fs") || !has("debugfs") {
        return;
    }
    let folder = tempdir().unwrap();
    let at = folder.path();
    let tar = some_tar(7).end();
    let source = at.join("a.tar");
    fs::write(&source, &tar).unwrap();
    let packed = at.join("a.zst");
    fs::write(&packed, zstd::encode_all(&tar[..], 1).unwrap()).unwrap();
    let ext4 = TarOptions {
        filesystem: Kind::Ext4,
        ..EROFS
    };
    let build = |source: &Path, name: &str| {
        build_from_tar(source, &at.join(name), &plain(), ext4, &())
            .map(|made| (at.join(name), made))
    };
    let (layer, made) = match build(&source, "one") {
        // On a machine with an older one, or without libarchive.
        Err(error) if std::env::var_os("OVBD_INSIDE").is_none() => return skip(error),
        result => result.unwrap(),
    };
    assert!(made.stored_bytes < 1 << 20, "{made:?}");
    assert_eq!(problems(&layers(&[&layer])), [""; 0]);
    // Nothing of it depends on the time.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let (again, _) = build(&packed, "two").unwrap();
    assert!(fs::read(&layer).unwrap() == fs::read(&again).unwrap());
    let blob = Blob::open(&layer).unwrap();
    let original = Original::of(&blob).unwrap();
    original
        .check(DiffId(Sha256::digest(&tar).into()), &())
        .unwrap();
    let image = at.join("image");
    let stack = StackOrZfile::open(&layers(&[&layer]), Parents::All).unwrap();
    export::to_file(&stack, &image, Rules::default(), &()).unwrap();
    let checked = Command::new("e2fsck").args(["-fn"]).arg(&image).output();
    let checked = checked.unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let files = at.join("files");
    fs::create_dir(&files).unwrap();
    let request = format!("rdump / {}", files.display());
    let dumped = Command::new("debugfs")
        .arg("-R")
        .arg(request)
        .arg(&image)
        .output();
    assert!(dumped.unwrap().status.success());
    for number in 0..11 {
        let name = format!("etc/file{number}");
        let cat = Command::new("tar")
            .arg("-xOf")
            .arg(&source)
            .arg(format!("./{name}"))
            .output();
        assert!(
            cat.unwrap().stdout == fs::read(files.join(&name)).unwrap(),
            "{name}"
        );
    }
    // The time of every member.
    let request = ["-R", "stat /etc/file1"];
    let said = Command::new("debugfs")
        .args(request)
        .arg(&image)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("mtime: 0x60000000:"), "{said}");
    // libarchive knows sparse files, which mkfs.erofs takes for others.
    fs::write(at.join("sparse"), sparse_tar()).unwrap();
    build(&at.join("sparse"), "of-sparse").unwrap();
    let of_sparse = layers(&[&at.join("of-sparse")]);
    let stack = StackOrZfile::open(&of_sparse, Parents::All).unwrap();
    let rules = Rules {
        replace: true,
        ..Rules::default()
    };
    export::to_file(&stack, &image, rules, &()).unwrap();
    let request = format!("dump /sparse {}", at.join("dumped").display());
    let dumped = Command::new("debugfs")
        .args(["-R", &request])
        .arg(&image)
        .output();
    assert!(dumped.unwrap().status.success());
    let mut wanted = vec![0; 32768];
    wanted[..10_000].fill(5);
    assert!(fs::read(at.join("dumped")).unwrap() == wanted);
    let options = Options {
        base: layers(&[&layer]),
        ..plain()
    };
    let error = build_from_tar(&source, &at.join("three"), &options, ext4, &()).unwrap_err();
    assert!(error.what().contains("over other layers"), "{error}");
}

/// What the tool itself makes of a tar.
fn reference(folder: &Path, tar: &Path) -> PathBuf {
    let image = folder.join("reference");
    let status = Command::new("mkfs.erofs")
        .args([
            "--quiet",
            "--tar=f",
            "-b4096",
            "-Enoinline_data",
            "-T0",
            "--mkfs-time",
        ])
        .args([&image, tar])
        .status();
    assert!(status.unwrap().success());
    image
}

/// The files of a stack, in a folder.
fn extracted(folder: &Path, name: &str, stack: &[&Path]) -> PathBuf {
    let image = folder.join(format!("{name}.img"));
    fs::write(&image, content(&layers(stack)).unwrap()).unwrap();
    let out = folder.join(format!("{name}.files"));
    let status = Command::new("fsck.erofs")
        .arg(format!("--extract={}", out.display()))
        .arg("--preserve")
        .arg(&image)
        .status();
    assert!(status.unwrap().success());
    out
}

/// A tar with files of all sizes around those of blocks.
fn some_tar(seed: u64) -> Tar {
    let mut random = Random::new(seed);
    let mut tar = Tar::default().folder("./").folder("./etc");
    for (number, bytes) in [
        0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 70_000, 3_000_000,
    ]
    .into_iter()
    .enumerate()
    {
        let content = match number % 2 {
            0 => random.text(bytes),
            _ => random.bytes(bytes),
        };
        tar = tar.file(&format!("./etc/file{number}"), &content);
    }
    let mut sparse = vec![0; 100_000];
    sparse[50_000..60_000].copy_from_slice(&random.bytes(10_000));
    tar.file("./sparse", &sparse)
        .symlink("./link", "etc/file1")
        .hardlink("./hard", "./etc/file9")
}

#[test]
fn every_format_holds_the_tar_and_the_file_system() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let tar = some_tar(1).end();
    let mut images = Vec::new();
    for (number, options) in [
        plain(),
        zfile(Algorithm::Lz4, 4096),
        zfile(Algorithm::Zstd, 65536),
        Options {
            tar: true,
            ..plain()
        },
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("layer{number}");
        let (layer, made) = made(folder.path(), &name, &tar, &options).unwrap();
        assert!(made.stored_bytes < 40_000, "{made:?}");
        assert_eq!(problems(&layers(&[&layer])), [""; 0]);
        images.push(content(&layers(&[&layer])).unwrap());
    }
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    let files = extracted(folder.path(), "all", &[&folder.path().join("layer0")]);
    let status = Command::new("tar")
        .arg("--compare")
        .arg("--file")
        .arg(folder.path().join("layer0.tar"))
        .arg("--directory")
        .arg(&files)
        .status();
    assert!(status.unwrap().success());
    // Only where the tool puts the UUID and its checksum may it be another than without us.
    let reference = fs::read(reference(folder.path(), &folder.path().join("layer0.tar"))).unwrap();
    let ours = &images[0];
    assert_eq!(ours.len(), reference.len());
    let differ = (0..ours.len()).filter(|at| ours[*at] != reference[*at]);
    assert!(differ.into_iter().all(|at| (1024..1152).contains(&at)));
}

#[test]
fn the_same_tar_gives_the_same_bytes() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let tar = some_tar(2).end();
    made(folder.path(), "one", &tar, &Options::default()).unwrap();
    let packed = zstd::encode_all(&tar[..], 3).unwrap();
    let source = folder.path().join("packed");
    fs::write(&source, packed).unwrap();
    let two = folder.path().join("two");
    common::on_threads(1, || {
        build_from_tar(&source, &two, &Options::default(), EROFS, &()).unwrap()
    });
    assert!(fs::read(folder.path().join("one")).unwrap() == fs::read(&two).unwrap());
    // What exists is not replaced, an input never is, and too large a tar leaves nothing.
    let again = build_from_tar(&source, &two, &Options::default(), EROFS, &());
    assert!(again.unwrap_err().what().contains("already exists"));
    let force = Options {
        replace: true,
        ..Options::default()
    };
    assert!(build_from_tar(&source, &source, &force, EROFS, &()).is_err());
    let small = TarOptions {
        max_bytes: tar.len() as u64 - 1,
        ..EROFS
    };
    let three = folder.path().join("three");
    let error = build_from_tar(&source, &three, &Options::default(), small, &()).unwrap_err();
    assert!(error.what().contains("--max-size"), "{error}");
    assert!(!three.exists());
}

#[test]
fn a_layer_above_changes_the_files_below() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let at = folder.path();
    let bottom = some_tar(3)
        .folder("./gone")
        .file("./gone/a", b"a")
        .folder("./opaque")
        .file("./opaque/old", b"old")
        .file("./changed", b"before")
        .end();
    let (bottom, below) = made(at, "bottom", &bottom, &Options::default()).unwrap();
    let mut random = Random::new(77);
    let new = random.bytes(50_000);
    let top = Tar::default()
        .file("./.wh.gone", b"")
        .file("./opaque/.wh..wh..opq", b"")
        .file("./opaque/new", &new)
        .file("./changed", b"after")
        .file("./.wh.nothing-of-this-name", b"")
        .file("./etc/.wh.file3", b"")
        .end();
    let options = Options {
        base: layers(&[&bottom]),
        ..Options::default()
    };
    let (top, above) = made(at, "top", &top, &options).unwrap();
    assert!(below.stored_bytes < 40_000, "{below:?}");
    assert!(above.stored_bytes < 20_000, "{above:?}");
    assert_eq!(problems(&layers(&[&bottom, &top])), [""; 0]);
    let files = extracted(at, "both", &[&bottom, &top]);
    assert!(!files.join("gone").exists());
    assert_eq!(names(&files.join("opaque")), ["new"]);
    assert!(fs::read(files.join("opaque/new")).unwrap() == new);
    assert_eq!(fs::read(files.join("changed")).unwrap(), b"after");
    assert!(!files.join("etc/file3").exists() && files.join("etc/file4").exists());
    let left: Vec<String> = names(&files);
    assert!(
        left.iter().all(|name| !name.starts_with(".wh.")),
        "{left:?}"
    );
    // The base must be such a file system.
    let raw = at.join("raw");
    common::raw_image(&raw, 1 << 20, 5);
    let other = at.join("other");
    common::make(&raw, &other, &Options::default());
    let options = Options {
        base: layers(&[&other]),
        ..Options::default()
    };
    let error = made(at, "no", &some_tar(4).end(), &options).unwrap_err();
    assert!(error.what().contains("holds no erofs"), "{error}");
    assert!(!at.join("no").exists());
}

#[test]
fn more_files_than_segments() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let mut random = Random::new(8);
    let mut tar = Tar::default();
    for number in 0..300 {
        let bytes = random.below(9000) as usize;
        tar = tar.file(&format!("file{number}"), &random.bytes(bytes));
    }
    let tar = tar.end();
    let (free, made_free) = made(folder.path(), "free", &tar, &plain()).unwrap();
    assert!(made_free.segments > 200, "{made_free:?}");
    let options = Options {
        max_segments: 50,
        ..plain()
    };
    let (tight, made_tight) = made(folder.path(), "tight", &tar, &options).unwrap();
    assert!(made_tight.segments <= 50, "{made_tight:?}");
    let image = |layer: &Path| content(&layers(&[layer])).unwrap();
    assert!(image(&free) == image(&tight));
}

/// Builds a layer of `tar`, or not: whatever is in it, the layer is right or there is none.
fn right_or_refused(folder: &TempDir, name: &str, tar: &[u8]) -> Option<PathBuf> {
    match made(folder.path(), name, tar, &plain()) {
        Ok((layer, _)) => {
            assert_eq!(problems(&layers(&[&layer])), [""; 0], "{name}");
            Some(layer)
        }
        Err(error) => {
            println!("{name}: {error}");
            assert!(!folder.path().join(name).exists());
            None
        }
    }
}

/// A file of 32 KiB of which 10,000 bytes are stored, as GNU's tar has it.
fn sparse_tar() -> Vec<u8> {
    let mut sparse = Member {
        name: "sparse",
        kind: b'S',
        bytes: 10_000,
        ..Member::default()
    }
    .header();
    sparse[257..265].copy_from_slice(b"ustar  \0");
    sparse[386..398].copy_from_slice(b"00000000000\0");
    sparse[398..410].copy_from_slice(b"00000023420\0");
    sparse[483..495].copy_from_slice(b"00000100000\0");
    set_checksum(&mut sparse);
    Tar::default().raw(&sparse).raw(&[5; 10_000]).end()
}

#[test]
fn hostile_tars() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let mut random = Random::new(9);
    let data = random.bytes(10_000);
    let file = |name: &str| Tar::default().file(name, &data);
    let sized = |bytes: u64| {
        let member = Member {
            bytes,
            ..Member::default()
        };
        Tar::default().member(&member, &data)
    };
    let device = |kind: u8| {
        let member = Member {
            name: "dev",
            kind,
            device: (8, 1),
            ..Member::default()
        };
        Tar::default().member(&member, b"")
    };
    let long = "name/".repeat(60) + "x";
    let gnu_long = Member {
        name: "././@LongLink",
        kind: b'L',
        bytes: long.len() as u64 + 1,
        ..Member::default()
    };
    let mut garbage_after = file("a").0;
    let end = garbage_after.len();
    // What fills up the last block of a file is not zero.
    garbage_after[end - 100..].fill(7);
    let mut bad_sum = file("a").0;
    bad_sum[150] ^= 1;

    // Those that are tars like others.
    let good: Vec<(&str, Vec<u8>)> = vec![
        ("twice", file("a").file("a", b"second").end()),
        ("absolute", file("/etc/passwd").end()),
        ("absolute-link", file("a").symlink("l", "/etc/passwd").end()),
        (
            "dotdot-link",
            file("a").symlink("l", "../../../etc/passwd").end(),
        ),
        (
            "devices",
            Tar(device(b'3').0.into_iter().chain(device(b'6').0).collect()).end(),
        ),
        (
            "gnu-long",
            Tar::default()
                .member(&gnu_long, long.as_bytes())
                .file("x", &data)
                .end(),
        ),
        (
            "pax-long",
            Tar::default()
                .pax(&[("path", long.as_bytes())])
                .file("x", &data)
                .end(),
        ),
        ("filled-up", Tar(garbage_after).end()),
        ("no-end", file("a").0),
        ("only-end", Tar::default().end()),
        ("trailing", Tar(file("a").end()).raw(&random.bytes(5000)).0),
        (
            "concatenated",
            Tar(file("a").end()).file("b", &random.bytes(5000)).end(),
        ),
        (
            "whiteouts",
            file(".wh.nothing").file("d/.wh..wh..opq", b"").end(),
        ),
        // What nobody reads is nobody's.
        (
            "odd-kind-behind-the-end",
            Tar(file("a").end()).kind(b'M', "b", "").end(),
        ),
        ("odd-bytes", {
            let mut tar = file("a").end();
            tar.truncate(tar.len() - 77);
            tar
        }),
    ];
    for (name, tar) in good {
        assert!(right_or_refused(&folder, name, &tar).is_some(), "{name}");
    }
    // Those that the tool may refuse.
    let xattr = [("SCHILY.xattr.user.x", &data[..300]), ("mtime", b"1.5")];
    for (name, tar) in [
        ("dotdot", file("../../../../etc/passwd").end()),
        (
            "later-link",
            Tar::default().hardlink("l", "a").file("a", &data).end(),
        ),
        ("link-to-itself", Tar::default().hardlink("l", "l").end()),
        (
            "link-to-folder",
            Tar::default().folder("d").hardlink("l", "d").end(),
        ),
        ("file-as-folder", file("a").file("a/b", &data).end()),
        ("gnu-sparse", sparse_tar()),
        (
            "pax-sparse",
            Tar::default()
                .pax(&[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.realsize", b"99999999"),
                ])
                .file("x", b"1\n0\n512\n")
                .end(),
        ),
        ("odd-kind", file("a").kind(b'M', "b", "").end()),
        ("xattr", Tar::default().pax(&xattr).file("x", &data).end()),
        (
            "pax-size",
            Tar::default()
                .pax(&[("size", b"18446744073709551615")])
                .file("x", &data)
                .end(),
        ),
        (
            "pax-nonsense",
            Tar::default()
                .pax(&[("size", b"-1"), ("uid", b"x")])
                .file("x", &data)
                .end(),
        ),
        ("large", sized(9 << 30).end()),
        ("largest", sized(u64::MAX).end()),
        ("bad-sum", bad_sum),
        ("cut", {
            let mut tar = file("a").0;
            tar.truncate(5000);
            tar
        }),
        ("short", file("a").0[..300].to_vec()),
        ("noise", random.bytes(20_000)),
        ("empty", Vec::new()),
    ] {
        right_or_refused(&folder, name, &tar);
    }
    let refused = |name: &str| !folder.path().join(name).exists();
    for name in [
        "noise",
        "empty",
        "bad-sum",
        "cut",
        "short",
        "large",
        "largest",
        "gnu-sparse",
        "pax-sparse",
        "odd-kind",
    ] {
        assert!(refused(name), "{name}");
    }
    // Of two members with one name, the last one counts.
    let files = extracted(folder.path(), "of-twice", &[&folder.path().join("twice")]);
    assert_eq!(fs::read(files.join("a")).unwrap(), b"second");
    // Nothing got out of its folder, and nothing else is left.
    let left = names(folder.path());
    let known = [".tar", ".back", ".img", ".files"];
    let odd = left
        .iter()
        .filter(|name| name.contains('.') && !known.iter().any(|end| name.ends_with(end)));
    assert_eq!(odd.count(), 0, "{left:?}");
}

#[test]
fn many_empty_files_need_no_segments() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let mut tar = Tar::default();
    for number in 0..50_000 {
        tar = tar.file(&format!("d{}/file{number}", number % 97), b"");
    }
    let (layer, made) = made(folder.path(), "empty-files", &tar.end(), &plain()).unwrap();
    assert!(made.segments < 10, "{made:?}");
    let opened = Layer::open(&LayerPath::from(layer.as_path()), 0).unwrap();
    assert!(opened.virtual_bytes() % SECTOR_BYTES == 0);
}

#[test]
fn a_layer_that_says_of_more_than_it_has() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let (layer, _) = made(folder.path(), "layer", &some_tar(6).end(), &plain()).unwrap();
    let sound = fs::read(&layer).unwrap();
    let trailer = sound.len() - 4096;
    let tag = trailer + 134;
    assert_eq!(&sound[tag..tag + 4], b"tar=");
    for (text, says) in [
        (&b"tar=99999999999\0"[..], "says of a tar"),
        (b"tar=18446744073709551616\0", "holds no original tar"),
        (b"tar=012\0\0\0\0\0\0\0\0\0\0", "holds no original tar"),
        (b"tar=\0\0\0\0\0\0\0\0\0\0\0\0\0", "holds no original tar"),
        (b"tar=12x\0\0\0\0\0\0\0\0\0\0", "holds no original tar"),
    ] {
        let mut bytes = sound.clone();
        bytes[tag..tag + text.len()].copy_from_slice(text);
        let path = folder.path().join("changed");
        fs::write(&path, &bytes).unwrap();
        let blob = Blob::open(&path).unwrap();
        let error = Original::of(&blob).err().unwrap();
        assert!(error.what().contains(says), "{error}");
    }
}
