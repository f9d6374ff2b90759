// SPDX-License-Identifier: GPL-2.0

//! Memory follows from the batch, not from the number of layers.

#[path = "../../layers/tests/common/mod.rs"]
mod common;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use common::{content, layers, make, Random};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::build::Options;
use tempfile::{tempdir, tempdir_in};

/// 255 layers that own every 255th block of 4 KiB each, so that every window needs all of them.
fn stack(folder: &Path, bytes: u64) -> Vec<PathBuf> {
    let raw = folder.join("raw");
    let mut random = Random::new(1);
    let mut paths = Vec::new();
    for number in 0..255 {
        let file = File::create(&raw).unwrap();
        file.set_len(bytes).unwrap();
        for block in (number..bytes / 4096).step_by(255) {
            file.write_all_at(&random.text(4096), block * 4096).unwrap();
        }
        let path = folder.join(format!("layer{number}"));
        let options = Options {
            zfile: Some(ZfileOptions {
                block_bytes: 65536,
                algorithm: Algorithm::Lz4,
                block_crc: true,
            }),
            ..Options::default()
        };
        make(&raw, &path, &options);
        paths.push(path);
    }
    paths
}

#[test]
fn export_of_255_layers() {
    // Private memory that can be written: stacks of threads and what malloc keeps count, so that it is some 20 MiB
    // above what is really used.
    const LIMIT_KIB: u64 = 96 << 10;
    // Every layer is synced, which takes its time on a disk.
    let folder = tempdir_in("/dev/shm").or_else(|_| tempdir()).unwrap();
    let paths = stack(folder.path(), 24 << 20);
    let export = |limit: u64| {
        Command::new("sh")
            .args(["-c", &format!("ulimit -d {limit} && exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_ovbd"))
            .args(["export", "-q", "-f", "-j", "2", "-o", "out"])
            .args(&paths)
            .current_dir(folder.path())
            .output()
            .unwrap()
    };
    // The limit works: nothing can be done with so little.
    assert!(!export(4 << 10).status.success());
    let output = export(LIMIT_KIB);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let names: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let read = std::fs::read(folder.path().join("out")).unwrap();
    assert!(read == content(&layers(&names)).unwrap());
}
