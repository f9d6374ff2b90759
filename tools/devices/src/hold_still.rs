// SPDX-License-Identifier: GPL-2.0

//! What must hold still while a device is suspended, and what must not be on it.
//!
//! Whoever writes to a suspended device waits until it goes on. If that is the program that is to let it go on, nothing
//! moves any more. And a file system on a partition, a logical volume or in a file on the device is not frozen by the
//! suspension: what it has not written would be missing in the layer.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use ovbd_kernel::{freeze, thaw, Number};

use crate::{mapped::Mapped, mounts::Mount, storage::Storage};
use ovbd_layers::{
    error::{Error, Result},
    output::directory,
    report::Report,
};

/// Refuses a device that this program needs while it is suspended: itself, its files, where it writes `out`, and what
/// the system may want meanwhile.
///
/// # Errors
///
/// That one, with the name of what is on the device; or it cannot be told.
pub fn check_elsewhere(device: &Mapped, out: &Path, storage: &Storage) -> Result<()> {
    // Whoever has a file on it has it open.
    if device.opens == 0 {
        return Ok(());
    }
    let refuse = |path: &Path| {
        let what = format!(
            "on {}, which is to be suspended: it would wait for itself",
            device.node().display()
        );
        Err(Error::new(path, what))
    };
    // What the user named is named first.
    for path in std::iter::once(directory(out).to_owned()).chain(needed(out)?) {
        let below = match storage.below_path(&path) {
            Ok(below) => below,
            // Removed since it was opened; only OUT's folder must be there.
            Err(_) if !path.exists() && path != directory(out) => continue,
            Err(e) => return Err(e),
        };
        if below.contains(&device.number) {
            return refuse(&path);
        }
    }
    check_no_swap(device, storage)
}

/// Refuses a device with swap on it: memory may be needed while it is suspended.
///
/// # Errors
///
/// That one; or it cannot be told.
pub fn check_no_swap(device: &Mapped, storage: &Storage) -> Result<()> {
    for swap in storage.swaps() {
        if storage.below_path(swap)?.contains(&device.number) {
            let what = format!(
                "swap on {}, which is to be suspended (swapoff first)",
                device.node().display()
            );
            return Err(Error::new(swap, what));
        }
    }
    Ok(())
}

/// What the program may touch while the device is suspended.
fn needed(out: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut paths: BTreeSet<PathBuf> = [
        directory(out),
        Path::new("."),
        Path::new("/"),
        Path::new("/tmp"),
        Path::new("/proc/self/exe"),
    ]
    .into_iter()
    .map(Path::to_owned)
    .collect();
    // Libraries and the like, whose pages may have to be read again.
    let maps = Path::new("/proc/self/maps");
    let text = fs::read(maps).map_err(|e| Error::io(maps, "read", e))?;
    for line in String::from_utf8_lossy(&text).lines() {
        if let Some(at) = line.find('/') {
            paths.insert(line[at..].into());
        }
    }
    // Where messages go, and what else is open.
    let open = Path::new("/proc/self/fd");
    let entries = fs::read_dir(open).map_err(|e| Error::io(open, "list", e))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let kind = fs::metadata(&path).map(|found| found.file_type());
        if kind.is_ok_and(|kind| kind.is_file() || kind.is_dir() || kind.is_block_device()) {
            paths.insert(path);
        }
    }
    Ok(paths)
}

/// Kinds of file systems whose freezing brings all that was written to the disk, past its cache.
/// Not Btrfs, which may be on several devices.
const FLUSHED_BY_FREEZING: [&str; 4] = ["ext2", "ext3", "ext4", "xfs"];

/// Whether a device has no other users than one file system on it, whose freezing brings all that was written to the
/// disk. Nothing is needed of such a device while it is suspended by the ioctl that also resumes it.
pub fn is_only_mounted(device: &Mapped, storage: &Storage) -> bool {
    let mut mounts = storage.mounts_on(device.number).peekable();
    // A file system has its device open once, however often it is mounted.
    mounts.peek().is_some()
        && device.opens == 1
        && mounts.all(|mount| FLUSHED_BY_FREEZING.contains(&mount.kind.as_str()))
}

/// File systems that are frozen until this is dropped.
pub struct Frozen<'a> {
    files: Vec<(PathBuf, File)>,
    report: &'a dyn Report,
}

impl<'a> Frozen<'a> {
    /// Freezes all file systems that are not on `device` itself, but on what is made of it: those further up first, as
    /// they write to those below.
    ///
    /// # Errors
    ///
    /// One of them cannot be frozen, or it cannot be told where it is. None stays frozen then.
    pub fn above(device: &Mapped, storage: &Storage, report: &'a dyn Report) -> Result<Self> {
        let mut frozen = Self {
            files: Vec::new(),
            report,
        };
        if device.opens == 0 {
            return Ok(frozen);
        }
        for group in above(device.number, storage)? {
            frozen.freeze(&group)?;
        }
        Ok(frozen)
    }

    /// Whether there is something to freeze.
    ///
    /// # Errors
    ///
    /// It cannot be told where a file system is.
    pub fn is_needed(device: &Mapped, storage: &Storage) -> Result<bool> {
        Ok(device.opens > 0 && !above(device.number, storage)?.is_empty())
    }

    /// Where what [`Frozen::above`] would freeze is mounted, as seen from here.
    ///
    /// # Errors
    ///
    /// It cannot be told where a file system is.
    pub fn points_above(device: &Mapped, storage: &Storage) -> Result<Vec<PathBuf>> {
        if device.opens == 0 {
            return Ok(Vec::new());
        }
        let groups = above(device.number, storage)?;
        let points = groups.iter().filter_map(|group| {
            let mount = group.first()?;
            Some(mount.seen_from_here(&mount.point))
        });
        Ok(points.collect())
    }

    /// Freezes one file system through any of its mounts.
    fn freeze(&mut self, mounts: &[&Mount]) -> Result<()> {
        let mut last = None;
        for mount in mounts {
            let path = mount.seen_from_here(&mount.point);
            let opened = File::open(&path).map_err(|e| Error::io(&mount.point, "open", e));
            let result = opened.and_then(|file| {
                // Another one may be mounted over it.
                check_is_on(&file, mount)?;
                freeze(&file).map_err(|e| Error::io(&mount.point, "freeze", e))?;
                Ok(file)
            });
            match result {
                Ok(file) => {
                    self.files.push((mount.point.clone(), file));
                    return Ok(());
                }
                Err(e) => last = Some(e),
            }
        }
        let Some(error) = last else {
            return Ok(());
        };
        let what = format!(
            "{}: what it has not written would be missing in the layer (unmount it, or remount it read-only)",
            error.what()
        );
        Err(Error::new(error.path(), what))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        while let Some((point, file)) = self.files.pop() {
            if let Err(e) = thaw(&file) {
                self.report.warn(&Error::io(&point, "thaw", e));
            }
        }
    }
}

fn check_is_on(file: &File, mount: &Mount) -> Result<()> {
    use rustix::fs::{AtFlags, StatxFlags};
    let status = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(|e| Error::io(&mount.point, "find the mount of", e.into()))?;
    match status.stx_mnt_id == mount.id {
        true => Ok(()),
        false => Err(Error::new(&mount.point, "another mount hides it")),
    }
}

/// The mounts of every file system on what is made of `device`, those further up first.
fn above(device: Number, storage: &Storage) -> Result<Vec<Vec<&Mount>>> {
    let mut groups: Vec<(usize, Vec<&Mount>)> = Vec::new();
    for mount in storage.mounts() {
        // device-mapper freezes what is on the device itself. An overlay has nothing of its own.
        if mount.number == device || mount.read_only || mount.kind == "overlay" {
            continue;
        }
        let below = storage.below_mount(mount)?;
        if !below.contains(&device) {
            continue;
        }
        let group = groups
            .iter_mut()
            .find(|(_, group)| group[0].number == mount.number);
        match group {
            Some((_, group)) => group.push(mount),
            None => groups.push((below.len(), vec![mount])),
        }
    }
    groups.sort_by_key(|(depth, _)| std::cmp::Reverse(*depth));
    Ok(groups.into_iter().map(|(_, group)| group).collect())
}
