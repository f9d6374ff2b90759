// SPDX-License-Identifier: GPL-2.0

//! Layers for direct access on the command line: how they are made, and what QEMU is told. The devices themselves are for
//! the guest tests.

mod run;

use std::fs;

use run::{bad, good};
use tempfile::tempdir;

#[test]
fn what_qemu_is_told() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let mut raw = vec![1; 3 << 20];
    fs::write(at.join("raw"), &raw).unwrap();
    raw[4096] = 2;
    fs::write(at.join("next"), &raw).unwrap();
    good(at, "build --dax -o base,1 raw");
    good(at, "build --dax --base base,1 -o top next");
    let at_path = fs::canonicalize(at).unwrap();
    let at_path = at_path.to_str().unwrap();
    let device = |name: &str, object: String| {
        format!("-object {object} -device virtio-pmem-pci,id=pmem-{name},memdev={name}")
    };
    let file = |name: &str, path: &str, mib: u64| {
        let size = mib << 20;
        device(
            name,
            format!("memory-backend-file,id={name},share=on,readonly=on,size={size},mem-path={at_path}/{path}"),
        )
    };
    let wanted = [
        "-m 524288k,maxmem=540672k".to_owned(),
        file("ovbd0", "base,,1", 6),
        file("ovbd1", "top", 4),
    ];
    let told = good(at, "qemu-args --memory 512M base,1 top");
    assert_eq!(told.lines().collect::<Vec<_>>(), wanted);

    // What is zero needs memory, where it is not stored: 2 MiB of zeros for 3 MiB less one page of data.
    good(at, "build --format lsmt -o plain raw");
    let error = bad(at, "qemu-args plain", 1);
    assert!(
        error.contains("memory for a guest is whole pages of 2 MiB"),
        "{error}"
    );
    good(at, "build -o compressed raw");
    let error = bad(at, "qemu-args compressed", 1);
    assert!(
        error.contains("compressed: has no direct access"),
        "{error}"
    );
    let error = bad(at, "qemu-args top", 1);
    assert!(error.contains("parent"), "{error}");
}

#[test]
fn usage() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    fs::write(at.join("raw"), vec![1; 8192]).unwrap();
    for line in [
        "build --dax --format zfile -o out raw",
        "build --dax --algo zstd -o out raw",
        "build --dax --tar -o out raw",
        "build --dax --raw -o out raw",
        "build --dax --from-tar raw -o out",
        "up --dax --writable x",
        "up --dax --verity 00 x",
        "up --zeros /dev/null x",
        "commit --dax --format zfile -o out x",
    ] {
        bad(at, line, 2);
        assert!(!at.join("out").exists(), "{line}");
    }
    good(at, "build --dax -o out raw");
    for (line, why) in [
        (
            "up --dax --dry-run x out",
            "is not a device that begins with a layer",
        ),
        (
            "up --dax --dry-run x 56FC051E-AAB5-8E92-A45A-C0047CAE4F71",
            "ends with a layer of this UUID",
        ),
    ] {
        let error = bad(at, line, 1);
        assert!(error.contains(why), "{line}: {error}");
    }
}
