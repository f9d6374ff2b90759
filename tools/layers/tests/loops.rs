// SPDX-License-Identifier: GPL-2.0

//! What is refused to keep data, shown with real loop devices and file systems. Needs root; skipped with the reason
//! where no loop device can be had.

mod common;

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use common::{
    layers, make,
    programs::{has, skip},
    raw_image,
};
use ovbd_layers::{
    build::{build, Options},
    export,
    output::Rules,
    overwrite::check_is_no_input,
    parents::Parents,
    signature,
    stack_or_zfile::StackOrZfile,
};
use tempfile::{tempdir, TempDir};

/// Runs a program that must succeed; returns what it prints.
fn run(line: &[&str]) -> String {
    let output = Command::new(line[0]).args(&line[1..]).output().unwrap();
    assert!(
        output.status.success(),
        "{line:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A loop device, detached when this is dropped: it has no file any more then.
struct Loop(PathBuf);

impl Loop {
    /// Attaches one to `file`; `None`, after the reason was printed, where the machine has none.
    fn attach(file: &Path, options: &[&str]) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).unwrap();
                Some(Self(name.trim().into()))
            }
            Ok(output) => {
                skip(String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(e) => {
                skip(format_args!("losetup: {e}"));
                None
            }
        }
    }

    fn name(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
        // While a test beside this one asks what all loop devices are attached to, it is only marked to be detached.
        let attached = Path::new("/sys/block")
            .join(self.0.file_name().unwrap())
            .join("loop");
        let end = Instant::now() + Duration::from_secs(10);
        while attached.exists() && Instant::now() < end {
            sleep(Duration::from_millis(10));
        }
    }
}

/// A mount, undone when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, point: &Path, options: &str) -> Self {
        fs::create_dir_all(point).unwrap();
        run(&[
            "mount",
            "-o",
            options,
            device.to_str().unwrap(),
            point.to_str().unwrap(),
        ]);
        Self(point.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn image(path: &Path, mib: u64) {
    File::create(path).unwrap().set_len(mib << 20).unwrap();
}

/// A folder, a layer of 2 MiB in it, and a loop device on a blank file of 16 MiB.
fn start() -> Option<(TempDir, PathBuf, Loop)> {
    let folder = tempdir().unwrap();
    let [raw, layer, file] = ["raw", "layer", "file"].map(|name| folder.path().join(name));
    raw_image(&raw, 2 << 20, 1);
    make(&raw, &layer, &Options::default());
    image(&file, 16);
    let device = Loop::attach(&file, &[])?;
    Some((folder, layer, device))
}

fn export_to(layer: &Path, out: &Path, overwrite_device: bool) -> Result<(), String> {
    let image = StackOrZfile::open(&layers(&[layer]), Parents::All).unwrap();
    let inputs = [layer.to_owned()];
    let rules = Rules {
        replace: true,
        overwrite_device,
        inputs: &inputs,
    };
    export::to_file(&image, out, rules, &()).map_err(|e| e.to_string())
}

#[test]
fn export_overwrites_no_device_that_holds_something() {
    let Some((folder, layer, device)) = start() else {
        return;
    };
    export_to(&layer, &device.0, false).unwrap();
    let raw = fs::read(folder.path().join("raw")).unwrap();
    assert!(fs::read(&device.0).unwrap().starts_with(&raw));
    run(&["mkfs.ext4", "-q", "-F", device.name()]);
    let before = fs::read(&device.0).unwrap();
    let error = export_to(&layer, &device.0, false).unwrap_err();
    assert!(
        error.ends_with(": holds ext4 (--overwrite-device overwrites it)"),
        "{error}"
    );
    assert!(fs::read(&device.0).unwrap() == before);
    export_to(&layer, &device.0, true).unwrap();
    assert!(fs::read(&device.0).unwrap().starts_with(&raw));
}

#[test]
fn export_overwrites_no_device_in_use() {
    let Some((folder, layer, device)) = start() else {
        return;
    };
    run(&["mkfs.ext4", "-q", "-F", device.name()]);
    let refused = |reason: &str| {
        let before = fs::read(&device.0).unwrap();
        let error = export_to(&layer, &device.0, true).unwrap_err();
        assert!(error.contains(reason), "{error}");
        assert!(fs::read(&device.0).unwrap() == before);
    };
    let point = folder.path().join("mnt");
    {
        let _mounted = Mounted::new(&device.0, &point, "ro");
        refused(&format!("in use: mounted on {}", point.display()));
    }
    // A loop device does not claim the device below it.
    if let Some(upper) = Loop::attach(&device.0, &[]) {
        refused(&format!("in use: used by {}", upper.name()));
        let _mounted = Mounted::new(&upper.0, &point, "ro");
        refused(&format!(
            "in use: mounted on {} as {}",
            point.display(),
            upper.name()
        ));
    }
    run(&["mkswap", "-q", device.name()]);
    run(&["swapon", device.name()]);
    refused("in use: swap is on it");
    run(&["swapoff", device.name()]);
    export_to(&layer, &device.0, true).unwrap();
}

#[test]
fn an_input_is_no_output() {
    let Some((folder, layer, device)) = start() else {
        return;
    };
    let is_refused = |output: &Path, input: &Path| check_is_no_input(output, [input]).is_err();
    // A layer on a device, and the device by another node.
    fs::copy(&layer, &device.0).unwrap();
    let error = export_to(&device.0, &device.0, true).unwrap_err();
    assert!(error.contains("is an input itself"), "{error}");
    let numbers = run(&["stat", "-c", "0x%t 0x%T", device.name()]);
    let (major, minor) = numbers.split_once(' ').unwrap();
    let node = folder.path().join("node");
    run(&["mknod", node.to_str().unwrap(), "b", major, minor]);
    assert!(is_refused(&node, &device.0));
    // The file of a loop device, on either side.
    let file = folder.path().join("file");
    assert!(is_refused(&device.0, &file));
    assert!(!is_refused(&device.0, &layer));
    assert!(!is_refused(&layer, &device.0));
}

fn build_from(source: &Path, out: &Path, allow_mounted: bool) -> Result<(), String> {
    let options = Options {
        allow_mounted,
        replace: true,
        ..Options::default()
    };
    build(source, out, &options, &()).map_err(|e| e.to_string())
}

#[test]
fn a_source_that_is_mounted_for_writing_is_refused() {
    let Some((folder, _, device)) = start() else {
        return;
    };
    let [file, point, out] = ["file", "mnt", "out"].map(|name| folder.path().join(name));
    run(&["mkfs.ext4", "-q", "-F", device.name()]);
    let refused = |source: &Path, reason: &str| {
        let error = build_from(source, &out, false).unwrap_err();
        assert!(error.contains(reason), "{error}");
        assert!(error.ends_with("(--allow-mounted goes on)"), "{error}");
        assert!(!out.exists());
    };
    let mounted = format!("mounted for writing on {}", point.display());
    {
        let _mounted = Mounted::new(&device.0, &point, "rw");
        refused(&device.0, &mounted);
        // The file below the device.
        refused(&file, &format!("{mounted} as {}", device.name()));
        build_from(&device.0, &out, true).unwrap();
        fs::remove_file(&out).unwrap();
    }
    {
        let _mounted = Mounted::new(&device.0, &point, "ro");
        build_from(&device.0, &out, false).unwrap();
        build_from(&file, &out, false).unwrap();
        fs::remove_file(&out).unwrap();
    }
    // A loop device on the device.
    if let Some(upper) = Loop::attach(&device.0, &[]) {
        let _mounted = Mounted::new(&upper.0, &point, "rw");
        refused(&device.0, &format!("{mounted} as {}", upper.name()));
        refused(&file, &mounted);
    }
    run(&["mkswap", "-q", device.name()]);
    run(&["swapon", device.name()]);
    refused(&device.0, "swap is on it");
    run(&["swapoff", device.name()]);
    build_from(&device.0, &out, false).unwrap();
}

#[test]
fn a_disk_whose_partition_is_mounted_is_refused() {
    let folder = tempdir().unwrap();
    let [file, point, out] = ["file", "mnt", "out"].map(|name| folder.path().join(name));
    image(&file, 32);
    // A boot record with one partition of Linux, of sectors 2048 to 34815.
    let mut record = vec![0; 512];
    record[450] = 0x83;
    record[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    record[458..462].copy_from_slice(&32768_u32.to_le_bytes());
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .write_all(&record)
        .unwrap();
    let Some(device) = Loop::attach(&file, &["--partscan"]) else {
        return;
    };
    let name = format!("{}p1", device.0.file_name().unwrap().to_str().unwrap());
    let number = format!("/sys/class/block/{name}/dev");
    // Some kernels read no boot record; what partx reads they take.
    if !Path::new(&number).exists() {
        run(&["partx", "--add", device.name()]);
    }
    let number = fs::read_to_string(number).unwrap();
    // Nobody may have made a node in /dev.
    let part = folder.path().join("part");
    let (major, minor) = number.trim().split_once(':').unwrap();
    run(&["mknod", part.to_str().unwrap(), "b", major, minor]);
    run(&["mkfs.ext4", "-q", "-F", part.to_str().unwrap()]);
    let _mounted = Mounted::new(&part, &point, "rw");
    let as_part = format!("mounted for writing on {} as /dev/{name}", point.display());
    for source in [&device.0, &file] {
        let error = build_from(source, &out, false).unwrap_err();
        assert!(error.contains(&as_part), "{error}");
    }
    let layer = folder.path().join("layer");
    let raw = folder.path().join("raw");
    raw_image(&raw, 1 << 20, 2);
    make(&raw, &layer, &Options::default());
    let error = export_to(&layer, &device.0, true).unwrap_err();
    assert!(error.contains("in use: "), "{error}");
    assert!(fs::read(&device.0).unwrap().starts_with(&record));
}

#[test]
fn signatures_of_real_tools() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("file");
    let name = path.to_str().unwrap();
    for (command, kind) in [
        (&["mkfs.ext4", "-q", "-F"][..], "ext4"),
        (&["mkswap", "-q"], "swap"),
        (&["mkfs.xfs", "-q", "-f"], "xfs"),
        (&["mkfs.btrfs", "-q", "-f"], "btrfs"),
        (&["mkfs.vfat"], "vfat"),
    ] {
        image(&path, 320);
        assert_eq!(signature::find(&path).unwrap(), None);
        if has(command[0]) {
            run(&[command, &[name]].concat());
            let found = signature::find(&path).unwrap().unwrap();
            assert!(found.contains(kind), "{kind}: {found}");
        }
        fs::remove_file(&path).unwrap();
    }
}
