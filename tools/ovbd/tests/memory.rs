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
use nix::sys::resource::{getrusage, UsageWho};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::build::Options;
use tempfile::{tempdir, tempdir_in};

fn layer(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("layer{number}"))
}

/// 255 layers that own every 255th block of 4 KiB each, so that every window needs all of them.
fn stack(folder: &Path, bytes: u64) -> Vec<PathBuf> {
    let raw = folder.join("raw");
    let mut random = Random::new(1);
    let mut paths = Vec::new();
    for number in 0..LAYERS {
        let file = File::create(&raw).unwrap();
        file.set_len(bytes).unwrap();
        for block in (number..bytes / 4096).step_by(LAYERS as usize) {
            file.write_all_at(&random.text(4096), block * 4096).unwrap();
        }
        let path = layer(folder, number);
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

/// Layers of the stack.
const LAYERS: u64 = 255;

/// The most that an export may have in memory.
const PEAK_BYTES: i64 = 64_000_000;

/// Exports the layers in `folder` and prints the most that was in memory, in bytes.
fn export_measured(folder: &Path) {
    let paths = (0..LAYERS).map(|number| layer(folder, number));
    let output = Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(["export", "-q", "-j", "2", "-o"])
        .arg(folder.join("out"))
        .args(paths)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    println!("peak: {}", usage.max_rss() << 10);
}

#[test]
fn export_of_255_layers() {
    // In a process of its own: what is in the memory of the one that starts a program counts for the program, and this
    // one made the layers in its own.
    if let Some(folder) = std::env::var_os("OVBD_TEST_FOLDER") {
        return export_measured(Path::new(&folder));
    }
    // Every layer is synced, which takes its time on a disk.
    let folder = tempdir_in("/dev/shm").or_else(|_| tempdir()).unwrap();
    let paths = stack(folder.path(), 24 << 20);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "export_of_255_layers", "--nocapture"])
        .env("OVBD_TEST_FOLDER", folder.path())
        .output()
        .unwrap();
    let said = format!("{output:?}");
    assert!(output.status.success(), "{said}");
    let peak: i64 = String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(|line| line.split_once("peak: ")?.1.parse().ok())
        .unwrap();
    // What is read must be in memory: a smaller number is none of this export.
    assert!(peak > 8 << 20, "{said}");
    assert!(peak <= PEAK_BYTES, "{peak} bytes");
    let names: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let read = std::fs::read(folder.path().join("out")).unwrap();
    assert!(read == content(&layers(&names)).unwrap());
}
