// SPDX-License-Identifier: GPL-2.0

//! The command: exit statuses, messages, and what it leaves on the disk.

mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use common::{fixtures, names, raw_image};
use tempfile::tempdir;

fn ovbd(folder: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(line.split_whitespace())
        .current_dir(folder)
        .output()
        .unwrap()
}

/// Runs a command that must succeed and returns what it prints.
fn good(folder: &Path, line: &str) -> String {
    let output = ovbd(folder, line);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{line}: {errors}");
    assert_eq!(errors, "", "{line}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command that must fail with `status` and returns what it prints on stderr.
fn bad(folder: &Path, line: &str, status: i32) -> String {
    let output = ovbd(folder, line);
    assert_eq!(output.status.code(), Some(status), "{line}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_session() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("one.raw"), 3 << 20, 1);
    good(at, "build -o one.layer one.raw");
    fs::copy(at.join("one.raw"), at.join("two.raw")).unwrap();
    common::change(&at.join("two.raw"), 2);
    good(
        at,
        "build --base one.layer --algo zstd --block-size 16384 -j 2 --tar -o two.layer two.raw",
    );
    good(at, "verify one.layer two.layer");
    good(at, "export one.layer two.layer -o two.out");
    assert!(fs::read(at.join("two.raw")).unwrap() == fs::read(at.join("two.out")).unwrap());
    let piped = ovbd(at, "export one.layer two.layer -o -").stdout;
    assert!(piped == fs::read(at.join("two.raw")).unwrap());
    good(at, "build --raw --no-crc -o two.z two.raw");
    good(at, "export -j 1 two.z -o - ");
    good(at, "info two.z");

    let info = good(at, "info --json one.layer two.layer");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual_bytes"], 3 << 20);
    assert_eq!(info["layers"][1]["parent_uuid"], info["layers"][0]["uuid"]);
    assert_eq!(info["layers"][1]["parent_matches"], true);
    assert_eq!(info["layers"][1]["tar"], true);
    assert_eq!(info["layers"][1]["zfile"]["algorithm"], "zstd");
    assert!(good(at, "info --map one.layer two.layer").starts_with("<svg "));
    assert!(good(at, "info --map=term one.layer").contains("layer 0: one.layer"));
    assert_eq!(
        names(at),
        [
            "one.layer",
            "one.raw",
            "two.layer",
            "two.out",
            "two.raw",
            "two.z"
        ]
    );
}

#[test]
fn info_as_a_table() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let mut raw = vec![0; 65536];
    raw[8192..20480].fill(7);
    fs::write(at.join("raw"), raw).unwrap();
    let uuid = "01234567-89ab-cdef-0123-456789abcdef";
    good(
        at,
        &format!("build --format lsmt --uuid {uuid} -o layer raw"),
    );
    let expected = "\
virtual size: 64 KiB (65536 bytes)
content:      12 KiB data, 0 B zeroed, 52 KiB hole

layer  format  compression    file  ratio  virtual  segments    data  zeroed   owned
0      lsmt    -            24 KiB      -   64 KiB         1  12 KiB     0 B  12 KiB

layer 0: layer
  uuid 01234567-89AB-CDEF-0123-456789ABCDEF
  parent -
";
    // How much memory the index takes is its own business.
    let info: Vec<String> = good(at, "info layer")
        .lines()
        .filter(|line| !line.starts_with("merged index: 1 segments, "))
        .map(str::to_owned)
        .collect();
    assert_eq!(info, expected.lines().collect::<Vec<_>>());
}

#[test]
fn errors_name_file_reason_and_byte() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 3);
    good(at, "build -o layer raw");
    let mut bytes = fs::read(at.join("layer")).unwrap();
    bytes[600] ^= 1;
    fs::write(at.join("layer"), &bytes).unwrap();
    let error = bad(at, "export layer -o out", 1);
    assert!(
        error.starts_with("ovbd: layer: ZFile block CRC mismatch at byte "),
        "{error}"
    );
    assert_eq!(bad(at, "verify layer", 1), error);
    assert_eq!(
        bad(at, "verify missing", 1),
        "ovbd: missing: cannot open: No such file or directory\n"
    );
    assert_eq!(
        bad(at, "info raw", 1),
        "ovbd: raw: not an LSMT layer (wrong header magic) at byte 0\n"
    );
    fs::write(at.join("empty"), "").unwrap();
    assert_eq!(
        bad(at, "verify empty", 1),
        "ovbd: empty: file too short for an LSMT layer at byte 0\n"
    );
    assert_eq!(bad(at, "build -o out empty", 1), "ovbd: empty: is empty\n");
    assert_eq!(
        bad(at, "build -o raw layer", 1),
        "ovbd: raw: already exists (--force replaces it)\n"
    );
    good(at, "build --raw --force -o raw layer");
    assert_eq!(names(at), ["empty", "layer", "raw"]);
}

#[test]
fn verify_lists_everything() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 4);
    good(at, "build -o layer raw");
    let mut bytes = fs::read(at.join("layer")).unwrap();
    let middle = bytes.len() / 2;
    for at in [600, middle] {
        bytes[at] ^= 1;
    }
    fs::write(at.join("layer"), &bytes).unwrap();
    let errors = bad(at, "verify layer missing", 1);
    assert_eq!(errors.lines().count(), 3, "{errors}");
}

#[test]
fn wrong_usage_is_2() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    for line in [
        "",
        "frobnicate",
        "build",
        "build -o out",
        "build --block-size 12288 -o out raw",
        "build --block-size 131072 -o out raw",
        "build --algo zstd --level 40 -o out raw",
        "build --format lsmt --raw -o out raw",
        "build --raw --base x -o out raw",
        "build --uuid 12 -o out raw",
        "export -o out",
        "info --json --map layer",
        "verify",
    ] {
        bad(at, line, 2);
    }
    good(at, "--help");
    good(at, "--version");
}

#[test]
fn writable_pair() {
    let Some(fixtures) = fixtures() else {
        return;
    };
    let at = fixtures.join("n-rw-pair-stacked");
    good(&at, "verify layer0 layer1 layer2.data:layer2.index");
    let error = bad(&at, "verify layer0 layer2.data:layer2.index layer1", 1);
    assert!(
        error.contains("a writable layer must be the top of the stack"),
        "{error}"
    );
    assert!(bad(&at, "verify layer2.data", 1).contains("layer2.data: "));
}
