// SPDX-License-Identifier: GPL-2.0

//! The command: exit statuses, messages, and what it leaves on the disk.

#[path = "../../layers/tests/common/mod.rs"]
mod common;
mod run;

use std::fs;

use common::{fixtures, names, raw_image};
use run::{bad, good, ovbd};
use tempfile::tempdir;

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
virtual size: 64.0 KiB (65536 bytes)
content:      12.0 KiB data, 0 B zeroed, 52.0 KiB hole
direct access: pages of 4.0 KiB, and zeros

layer  format  compression      file  ratio   virtual  segments      data  zeroed     owned
0      lsmt    -            24.0 KiB      -  64.0 KiB         1  12.0 KiB     0 B  12.0 KiB

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
        bad(at, "verify missing", 3),
        "ovbd: missing: cannot open: No such file or directory\n"
    );
    assert_eq!(
        bad(at, "info raw", 1),
        "ovbd: raw: not a layer; \"ovbd build\" makes one of a raw image\n"
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
        "up",
        "up --cow x a layer",
        "up --writable --size 1Q a layer",
        "commit a",
        "push --algo zstd one.layer oci:images:x",
        "push --level 23 vg/lv oci:images:x",
        "push --block-size 1000 vg/lv oci:images:x",
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

#[test]
fn up_prints_its_commands() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let mut raw = vec![0; 65536];
    raw[8192..20480].fill(7);
    fs::write(at.join("raw"), &raw).unwrap();
    let base = "01234567-89AB-CDEF-0123-456789ABCDEF";
    good(
        at,
        &format!("build --format lsmt --tar --uuid {base} -o base raw"),
    );
    raw[30000] = 1;
    fs::write(at.join("raw"), raw).unwrap();
    let next = "11111111-2222-3333-4444-555555555555";
    // Some byte of the stored block makes the length odd in the end.
    good(at, &format!("build --base base --uuid {next} -o next raw"));
    let length = fs::metadata(at.join("next")).unwrap().len();
    let (whole, rest) = (length / 512, length % 512);
    assert_ne!(rest, 0);
    let padding = 512 - rest;
    let next = next.replace('-', "");
    let expected = format!(
        "\
file=$(mktemp)
tail -c {rest} next >>$file; truncate -s +{padding} $file
tails=$(losetup --find --show --read-only $file); rm $file
layer0=$(losetup --find --show --read-only --direct-io=on --sector-size 512 --offset 1536 --sizelimit 24576 base)
layer1=$(losetup --find --show --read-only --direct-io=on --sector-size 512 --offset 0 --sizelimit {bytes} next)
dmsetup create a-blob1 --readonly --uuid OVERLAYBD-BLOB-{next}-1-a --table \"0 {whole} linear $layer1 0
{whole} 1 linear $tails 0\"
dmsetup create a-zfile1 --readonly --uuid ZFILE-{next}-1-a --table \"0 32 zfile /dev/mapper/a-blob1 {length}\"
dmsetup create a-lower0 --readonly --uuid OVERLAYBD-LOWER-{next}-0-a --table \
\"0 128 overlaybd 2 $layer0 24576 /dev/mapper/a-zfile1 16384\"
file=$(mktemp --tmpdir=/var/tmp)
truncate -s 1048576 $file
cow=$(losetup --find --show --direct-io=on $file); rm $file
dmsetup create a-cow0 --uuid OVERLAYBD-GEN-{next}-0-a --table \
\"0 128 snapshot /dev/mapper/a-lower0 $cow PO 8\"
dmsetup create a --uuid OVERLAYBD-TOP-{next}-a --table \"0 128 linear /dev/mapper/a-cow0 0\"
losetup --detach $tails $layer0 $layer1 $cow
",
        bytes = whole * 512,
    );
    let printed = good(at, "up --dry-run --writable --size 1M a base next");
    assert_eq!(printed, expected);
    assert_eq!(names(at), ["base", "next", "raw"]);
}

#[test]
fn up_wants_the_parents() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let mut layers = String::new();
    for (number, name) in ["one", "two", "three"].iter().enumerate() {
        let mut raw = vec![0; 65536];
        raw[number * 4096] = 1;
        fs::write(at.join("raw"), raw).unwrap();
        let base = if number == 0 { "" } else { " --base" };
        good(at, &format!("build -o {name} raw{base}{layers}"));
        layers += &format!(" {name}");
    }
    good(at, "up --dry-run a one two three");
    assert_eq!(
        bad(at, "up --dry-run a one three two", 1),
        "ovbd: three: not the one for one: it belongs on two (--ignore-parents goes on)\n"
    );
    assert!(bad(at, "up --dry-run a two three", 1)
        .starts_with("ovbd: two: not a base layer: its parent is "));
    let printed = good(at, "up --dry-run --ignore-parents a two one");
    // The same from a file.
    let conf = "# a stack\nignore-parents\nlayer two\nlayer one\n";
    fs::write(at.join("conf"), conf).unwrap();
    assert_eq!(good(at, "up --dry-run --config conf a"), printed);
    assert_eq!(
        bad(at, "up --dry-run no-such-stack", 1),
        "ovbd: /etc/ovbd/no-such-stack.conf: cannot read: No such file or directory\n"
    );
    for (line, what) in [
        ("wipe-cow", "line 1: wipe-cow is for the command line only"),
        ("colour red", "unexpected argument '--colour' found"),
        ("# nothing", "names no layer"),
    ] {
        let layer = if line.starts_with('#') {
            ""
        } else {
            "layer one\n"
        };
        fs::write(at.join("conf"), format!("{line}\n{layer}")).unwrap();
        let error = bad(at, "up --dry-run --config conf a", 1);
        assert_eq!(error, format!("ovbd: conf: {what}\n"));
    }
    assert_eq!(
        bad(at, "up --dry-run a/b one", 1),
        "ovbd: a/b: not a name for a device: it consists of letters, digits and +-._=:@\n"
    );
    assert_eq!(
        bad(at, "up --dry-run --writable --size 4k a one", 1),
        "ovbd: --size: a COW store needs at least 16384 bytes\n"
    );
    assert_eq!(
        bad(at, "up --dry-run --writable --cow two a one two", 1),
        "ovbd: two: both a layer and the COW store\n"
    );
}
