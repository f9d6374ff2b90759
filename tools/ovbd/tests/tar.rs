// SPDX-License-Identifier: GPL-2.0

//! Layers over original tars, as the command makes, checks and undoes them.

#[path = "../../layers/tests/common/mod.rs"]
mod common;
mod run;

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
};

use common::{gzips::Gzip, names, programs::has, tars::Tar, Random};
use run::{bad, good, OVBD};
use sha2::{Digest, Sha256};
use tempfile::tempdir;

/// Two tars, of which the second removes a file of the first.
fn write_tars(at: &Path) -> [String; 2] {
    let mut random = Random::new(1);
    let one = Tar::default()
        .folder("etc")
        .file("etc/text", &random.text(100_000))
        .file("etc/gone", &random.bytes(5000))
        .end();
    let two = Tar::default()
        .file("etc/.wh.gone", b"")
        .file("etc/new", &random.bytes(5000))
        .end();
    [("one.tar", one), ("two.tar", two)].map(|(name, tar)| {
        fs::write(at.join(name), &tar).unwrap();
        let digest = Sha256::digest(&tar);
        digest.iter().fold("sha256:".to_owned(), |text, byte| {
            text + &format!("{byte:02x}")
        })
    })
}

#[test]
fn a_session() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let at = folder.path();
    let [one, two] = write_tars(at);
    let bytes = |name: &str| fs::metadata(at.join(name)).unwrap().len();
    let said = good(at, "build --from-tar one.tar -o one.layer");
    assert_eq!(said, format!("{one} {}\n", bytes("one.tar")));
    let compressed = zstd::encode_all(&fs::read(at.join("two.tar")).unwrap()[..], 1).unwrap();
    fs::write(at.join("two.tar.zst"), compressed).unwrap();
    // From a pipe, over the other.
    let output = Command::new(OVBD)
        .args([
            "build",
            "--base",
            "one.layer",
            "--from-tar",
            "-",
            "-o",
            "two.layer",
        ])
        .current_dir(at)
        .stdin(Stdio::from(File::open(at.join("two.tar.zst")).unwrap()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with(&two));
    good(
        at,
        &format!("verify --diff-id {one} --diff-id {two} one.layer two.layer"),
    );
    good(at, "export --tar one.layer -o back.tar");
    good(at, "export --tar=1 one.layer two.layer -o back2.tar");
    for (back, original) in [("back.tar", "one.tar"), ("back2.tar", "two.tar")] {
        assert!(fs::read(at.join(back)).unwrap() == fs::read(at.join(original)).unwrap());
    }
    let piped = run::ovbd(at, "export --tar two.layer -o -").stdout;
    assert!(piped == fs::read(at.join("two.tar")).unwrap());
    let info = good(at, "info --json one.layer");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["layers"][0]["original_tar_bytes"], bytes("one.tar"));
    assert!(good(at, "info two.layer").contains("original tar of "));
}

#[test]
fn what_is_refused() {
    if !has("mkfs.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let at = folder.path();
    let [one, two] = write_tars(at);
    good(at, "build --from-tar one.tar -o one.layer");
    let before = names(at);
    let error = bad(at, &format!("verify --diff-id {two} one.layer"), 1);
    assert!(error.contains(&one) && error.contains(&two), "{error}");
    bad(
        at,
        &format!("verify --diff-id {one} --diff-id {two} one.layer"),
        2,
    );
    bad(at, "verify --diff-id sha256:1 one.layer", 2);
    bad(at, "export --tar=1 one.layer -o out", 2);
    bad(at, "export --tar one.layer one.layer -o out", 2);
    bad(at, "export --tar one.layer -o one.tar", 1);
    bad(at, "export --tar --max-size 1000 one.layer -o out", 1);
    bad(at, "export --tar --force one.layer -o one.layer", 1);
    bad(at, "build --from-tar one.tar --force -o one.tar", 1);
    bad(at, "build --from-tar one.tar -o one.layer", 1);
    bad(at, "build --from-tar one.tar -o -", 1);
    bad(at, "build --from-tar one.tar --max-size 1000 -o out", 1);
    bad(at, "build --from-tar one.tar --raw -o out", 2);
    bad(at, "build --from-tar one.tar -o out more", 2);
    bad(at, "build --max-size 1000 -o out one.tar", 2);
    let error = bad(at, "build --from-tar one.layer -o out", 1);
    assert!(error.contains("is no tar archive"), "{error}");
    common::raw_image(&at.join("raw"), 1 << 20, 3);
    good(at, "build -o raw.layer raw");
    let error = bad(at, "export --tar raw.layer -o out", 1);
    assert!(error.contains("holds no original tar"), "{error}");
    let error = bad(at, &format!("verify --diff-id {one} raw.layer"), 1);
    assert!(error.contains("holds no original tar"), "{error}");
    let mut after = names(at);
    after.retain(|name| !name.starts_with("raw"));
    assert_eq!(before, after);
}

/// What mkfs.erofs makes of tars without their content, merged, is a device with them.
#[test]
fn an_erofs_that_is_an_index_of_tars() {
    if !has("mkfs.erofs") || !has("fsck.erofs") {
        return;
    }
    let folder = tempdir().unwrap();
    let at = folder.path();
    write_tars(at);
    let mkfs = |words: &str| {
        let mut command = Command::new("mkfs.erofs");
        let command = command.arg("--quiet").args(words.split(' '));
        assert!(
            command.current_dir(at).status().unwrap().success(),
            "{words}"
        );
    };
    mkfs("--tar=i one.erofs one.tar");
    mkfs("--tar=i --aufs two.erofs two.tar");
    mkfs("--ovlfs-strip=1 merged.erofs one.erofs two.erofs");
    for (erofs, tars) in [("one", &["one"][..]), ("merged", &["one", "two"])] {
        let targets = tars.iter();
        let targets = targets.fold(String::new(), |all, tar| {
            all + &format!(" --target {tar}.tar")
        });
        let words = format!("{erofs}.erofs{targets}");
        good(at, &format!("verify {words}"));
        good(at, &format!("export -f -o image {words}"));
        // Where the kernel takes them from, if it is given no other devices.
        let image = fs::read(at.join("image")).unwrap();
        let index = fs::read(at.join(format!("{erofs}.erofs"))).unwrap();
        assert!(image.starts_with(&index));
        let table = usize::from(u16::from_le_bytes([index[1112], index[1113]])) * 128;
        for (number, tar) in tars.iter().enumerate() {
            let slot = &index[table + number * 128..];
            let sectors =
                |at: usize| u32::from_le_bytes(slot[at..at + 4].try_into().unwrap()) as usize * 512;
            let (bytes, start) = (sectors(64), sectors(68));
            let tar = fs::read(at.join(format!("{tar}.tar"))).unwrap();
            assert!(image[start..start + bytes] == tar[..bytes]);
        }
        let info = good(at, &format!("info --json {words}"));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["layers"][0]["format"], "erofs");
        assert_eq!(info["layers"][0]["targets"][0], "one.tar");
    }
    // As a layer it needs the tars no more.
    good(
        at,
        "squash merged.erofs --target one.tar --target two.tar -o squashed",
    );
    good(at, "export -f -o squashed.img squashed");
    assert!(fs::read(at.join("squashed.img")).unwrap() == fs::read(at.join("image")).unwrap());
    let script = good(
        at,
        "up --dry-run name merged.erofs --target one.tar --target two.tar",
    );
    for part in ["header0=", "target0=", "target0_1=", "index0="] {
        assert!(script.contains(part), "{part}: {script}");
    }
    // Too few, too many, in another order, and a table that is damaged.
    for words in [
        "merged.erofs --target one.tar",
        "one.erofs --target one.tar --target two.tar",
        "merged.erofs --target two.tar --target one.tar",
    ] {
        bad(at, &format!("verify {words}"), 1);
    }
    let sound = fs::read(at.join("merged.erofs")).unwrap();
    let table = usize::from(u16::from_le_bytes([sound[1112], sound[1113]])) * 128;
    for (place, byte) in [
        (1024 + 12, 3),
        (1024 + 12, 200),
        (1024 + 87, 9),
        (1024 + 89, 0xff),
        (table + 68, 0),
        (table + 64, 0xff),
        (table + 67, 0xff),
        (table + 128 + 66, 1),
    ] {
        let mut bytes = sound.clone();
        bytes[place] = byte;
        fs::write(at.join("damaged.erofs"), &bytes).unwrap();
        let words = "damaged.erofs --target one.tar --target two.tar";
        bad(at, &format!("verify {words}"), 1);
        bad(at, &format!("export -f -o image {words}"), 1);
    }
}

#[test]
fn layers_of_turbooci_with_their_targets() {
    let Some(cases) = common::fixtures().map(|all| all.join("x-turbooci")) else {
        return;
    };
    let folder = tempdir().unwrap();
    let at = folder.path();
    for name in ["layer0", "target0.tar"] {
        fs::copy(cases.join(name), at.join(name)).unwrap();
    }
    let case = fs::read_to_string(cases.join("case.json")).unwrap();
    let case: serde_json::Value = serde_json::from_str(&case).unwrap();
    let tar = fs::read(at.join("target0.tar")).unwrap();
    fs::write(at.join("zstd"), zstd::encode_all(&tar[..], 1).unwrap()).unwrap();
    for target in ["target0.tar", "zstd"] {
        good(at, &format!("verify layer0 --target {target}"));
        good(
            at,
            &format!("export --force -o out layer0 --target {target}"),
        );
        let mut hash = Sha256::new();
        std::io::copy(&mut File::open(at.join("out")).unwrap(), &mut hash).unwrap();
        let digest = hash.finalize();
        let digest = digest
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        assert_eq!(case["sha256"], digest);
        let info = good(at, &format!("info --json layer0 --target={target}"));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["layers"][0]["format"], "turbo");
        assert_eq!(info["layers"][0]["targets"][0], target);
    }
    // By an index of what is in a gzip file, only what is needed is decompressed; with another one, nothing.
    let gzip = Gzip::new(&tar, &[40_000, 1, 7777]);
    fs::write(at.join("gzip"), &gzip.bytes).unwrap();
    fs::write(at.join("gzip.meta"), gzip.index(&tar, true, |n| n % 4 == 0)).unwrap();
    let indexed = "layer0 --target gzip --gzip-index gzip.meta";
    good(at, &format!("verify {indexed}"));
    good(at, &format!("info {indexed}"));
    good(at, &format!("export -o indexed {indexed}"));
    assert!(fs::read(at.join("indexed")).unwrap() == fs::read(at.join("out")).unwrap());
    let mut blank = fs::read(at.join("gzip.meta")).unwrap();
    blank[400] ^= 1;
    fs::write(at.join("blank"), &blank).unwrap();
    bad(at, "verify layer0 --target gzip --gzip-index blank", 1);
    bad(at, "verify layer0 --target zstd --gzip-index gzip.meta", 1);
    bad(at, "verify layer0 --gzip-index gzip.meta --target gzip", 2);
    bad(at, "verify layer0 --gzip-index gzip.meta", 2);
    bad(at, &format!("verify {indexed} --gzip-index gzip.meta"), 2);
    let script = good(at, "up --dry-run name layer0 --target target0.tar");
    for part in [
        "name-turbo0",
        "target0=$(losetup",
        "base64 --decode",
        " linear ",
    ] {
        assert!(script.contains(part), "{part}: {script}");
    }
    let error = bad(at, "up --dry-run name layer0 --target zstd", 1);
    assert!(error.contains("compressed"), "{error}");
    for line in [
        "verify layer0",
        "export -o other layer0",
        "verify layer0 --target layer0",
        "info layer0 --target missing",
    ] {
        bad(at, line, 1);
    }
    assert!(bad(
        at,
        "export --force -o target0.tar layer0 --target target0.tar",
        1
    )
    .contains("input"));
    bad(at, "verify --target target0.tar layer0", 2);
    bad(
        at,
        "verify layer0 --target target0.tar --target target0.tar",
        1,
    );
    assert!(fs::read(at.join("target0.tar")).unwrap() == tar);
}
