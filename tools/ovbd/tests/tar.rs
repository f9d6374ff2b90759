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

use common::{names, programs::has, tars::Tar, Random};
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
