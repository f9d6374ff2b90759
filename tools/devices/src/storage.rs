// SPDX-License-Identifier: GPL-2.0

//! What a file or block device is stored on: every device below it, down to the disks.
//!
//! The way leads from a path to its mount, from a mount to its devices (of which a btrfs has many), from an overlay to
//! the folders that it is made of, from a partition to its disk, from a mapped or md device to its parts, and from a
//! loop device to its file. Names are for people: where the kernel has a number, that is taken. Where it does not tell
//! the answer is an error, never "nothing".

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use ovbd_kernel::Number;
use rustix::fs::{AtFlags, StatxFlags, CWD};

use crate::{
    loops::{self, Loop},
    mounts::{mounts, swaps, Mount},
    users::block_number,
};
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    sysfs,
};

/// Kinds of file systems that are on no block device of this machine.
const WITHOUT_DEVICE: [&str; 32] = [
    "9p",
    "autofs",
    "binfmt_misc",
    "bpf",
    "ceph",
    "cgroup",
    "cgroup2",
    "cifs",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hostfs",
    "hugetlbfs",
    "mqueue",
    "nfs",
    "nfs4",
    "nfsd",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tmpfs",
    "tracefs",
    "virtiofs",
];

/// Mounts, loop devices and swap at one moment.
#[derive(Debug, Default)]
pub struct Storage {
    mounts: Vec<Mount>,
    loops: Vec<Loop>,
    swaps: Vec<PathBuf>,
    /// The devices of each btrfs.
    btrfs: Vec<Vec<Number>>,
    /// Whether what does not tell where it is is taken for being on other devices.
    assume_elsewhere: bool,
}

impl Storage {
    /// As it is now.
    ///
    /// # Errors
    ///
    /// Those of [`mounts`], [`swaps`] and [`loops::all`].
    pub fn look() -> Result<Self> {
        Ok(Self {
            mounts: mounts()?,
            loops: loops::all()?,
            swaps: swaps()?,
            btrfs: sysfs::btrfs_families(),
            assume_elsewhere: false,
        })
    }

    /// The same, where `yes`: what does not tell on which device it is, as ZFS, is on none that anybody asks for.
    pub fn assume_elsewhere(self, yes: bool) -> Self {
        Self {
            assume_elsewhere: yes,
            ..self
        }
    }

    /// All mounts.
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The mounts of what is on a device itself.
    pub fn mounts_on(&self, device: Number) -> impl Iterator<Item = &Mount> {
        let family = self.family(device);
        let mounts = self.mounts.iter();
        mounts.filter(move |mount| family.iter().any(|device| mount.is_on(*device)))
    }

    /// All loop devices that have a file.
    pub fn loops(&self) -> &[Loop] {
        &self.loops
    }

    /// The devices and files that are swapped on.
    pub fn swaps(&self) -> &[PathBuf] {
        &self.swaps
    }

    /// The devices below a device, itself first among them.
    ///
    /// # Errors
    ///
    /// Something below it does not tell what it is on.
    pub fn below_device(&self, device: Number) -> Result<BTreeSet<Number>> {
        let mut walk = Walk::new(self);
        walk.device(device)?;
        Ok(walk.devices)
    }

    /// The devices below a mount.
    ///
    /// # Errors
    ///
    /// It does not tell what it is on.
    pub fn below_mount(&self, mount: &Mount) -> Result<BTreeSet<Number>> {
        let mut walk = Walk::new(self);
        walk.mount(mount)?;
        Ok(walk.devices)
    }

    /// The devices below what `path` leads to, itself if it is a block device.
    ///
    /// # Errors
    ///
    /// There is nothing, or it does not tell what it is on.
    pub fn below_path(&self, path: &Path) -> Result<BTreeSet<Number>> {
        let mut walk = Walk::new(self);
        walk.path(path)?;
        Ok(walk.devices)
    }

    /// The mount that `path` is on, in a file system of this number.
    fn mount_of(&self, path: &Path, number: Number) -> Result<Option<&Mount>> {
        let wanted = StatxFlags::MNT_ID;
        let status = rustix::fs::statx(CWD, path, AtFlags::empty(), wanted)
            .map_err(|e| Error::io(path, "find the mount of", e.into()))?;
        let id = (status.stx_mask & wanted.bits() != 0).then_some(status.stx_mnt_id);
        // In a chroot there may be mounts that the list leaves out.
        let mount = self.mounts.iter().find(|mount| Some(mount.id) == id);
        Ok(mount.or_else(|| self.mounts.iter().find(|mount| mount.number == number)))
    }

    /// Whether what is written to the folder or file `path` is in memory only. An overlay is where its upper folder is;
    /// one whose upper folder has no name here may be in memory, as that of a live system.
    pub fn is_in_memory(&self, path: &Path) -> bool {
        // The kernel lets an overlay be on another one, and no more.
        const OVERLAYS: usize = 4;
        let mut path = path.to_owned();
        for _ in 0..OVERLAYS {
            if is_in_memory(&path) {
                return true;
            }
            let found = fs::metadata(&path).map(|found| Number::new(found.dev()));
            let mount = found
                .ok()
                .and_then(|number| self.mount_of(&path, number).ok());
            let Some(mount) = mount.flatten().filter(|mount| mount.kind == "overlay") else {
                return false;
            };
            // One without an upper folder takes no file at all.
            let Some(upper) = overlay_folders(&mount.options, |name| name == b"upperdir").pop()
            else {
                return false;
            };
            path = mount.seen_from_here(Path::new(OsStr::from_bytes(&upper)));
            if !path.exists() {
                return !self.assume_elsewhere;
            }
        }
        !self.assume_elsewhere
    }

    /// The devices of the btrfs of which `device` is one; itself where there is none.
    pub fn family(&self, device: Number) -> Vec<Number> {
        let family = self.btrfs.iter().find(|family| family.contains(&device));
        family.cloned().unwrap_or_else(|| vec![device])
    }
}

/// One way down.
struct Walk<'a> {
    storage: &'a Storage,
    devices: BTreeSet<Number>,
    /// Numbers of mounts.
    seen: HashSet<u64>,
}

impl<'a> Walk<'a> {
    fn new(storage: &'a Storage) -> Self {
        Self {
            storage,
            devices: BTreeSet::new(),
            seen: HashSet::new(),
        }
    }

    fn device(&mut self, device: Number) -> Result<()> {
        if !self.devices.insert(device) {
            return Ok(());
        }
        for part in sysfs::parts(device)? {
            self.device(part)?;
        }
        let storage = self.storage;
        match storage.loops.iter().find(|user| user.number == device) {
            Some(user) => self.file_of(user),
            None => Ok(()),
        }
    }

    /// The file of a loop device.
    fn file_of(&mut self, user: &Loop) -> Result<()> {
        if let Some(device) = user.status.block_device {
            return self.device(device);
        }
        if user.status.device.0 != 0 {
            return self.device(user.status.device);
        }
        let storage = self.storage;
        let found = storage
            .mounts
            .iter()
            .find(|mount| mount.number == user.status.device);
        if let Some(mount) = found {
            return self.mount(mount);
        }
        // A part of a btrfs has a number of its own. The name says more, if it is still that of the file.
        match fs::metadata(&user.backing) {
            Ok(found) if user.is_on(FileId::of(&found)) => self.path(&user.backing),
            _ if self.is_without_mount(user) => Ok(()),
            _ => self.unknown(
                &user.node,
                format!("its file {}", user.backing.display()).as_str(),
            ),
        }
    }

    /// Whether the file is in memory: the kernel mounts a file system for such files that nobody sees.
    fn is_without_mount(&self, user: &Loop) -> bool {
        user.backing.as_os_str().as_bytes().starts_with(b"/memfd:")
    }

    fn path(&mut self, path: &Path) -> Result<()> {
        let found = fs::metadata(path).map_err(|e| Error::io(path, "look up", e))?;
        if found.file_type().is_block_device() {
            return self.device(Number::new(found.rdev()));
        }
        let number = Number::new(found.dev());
        match self.storage.mount_of(path, number)? {
            Some(mount) => self.mount(mount),
            None if number.0 != 0 => self.device(number),
            // The kernel has a mount of its own for files without a name.
            None if is_in_memory(path) => Ok(()),
            None => self.unknown(path, "it"),
        }
    }

    fn mount(&mut self, mount: &Mount) -> Result<()> {
        if !self.seen.insert(mount.id) {
            return Ok(());
        }
        let kind = mount.kind.as_str();
        if mount.number.0 != 0 {
            return self.device(mount.number);
        }
        if kind == "overlay" {
            return self.overlay(mount);
        }
        if WITHOUT_DEVICE.contains(&kind) {
            return Ok(());
        }
        // A file system of several devices names one of them, or all with a colon between.
        let names = mount
            .source
            .as_os_str()
            .as_bytes()
            .split(|byte| *byte == b':');
        let mut found = false;
        for name in names.map(|name| Path::new(OsStr::from_bytes(name))) {
            let Some(device) =
                block_number(&mount.seen_from_here(name)).or_else(|| block_number(name))
            else {
                continue;
            };
            found = true;
            for device in self.storage.family(device) {
                self.device(device)?;
            }
        }
        // A program serves it, from wherever it likes.
        if found || kind.starts_with("fuse") {
            return Ok(());
        }
        self.unknown(&mount.point, &format!("this {kind}"))
    }

    /// `what` at `path` does not tell where it is.
    fn unknown(&self, path: &Path, what: &str) -> Result<()> {
        if self.storage.assume_elsewhere {
            return Ok(());
        }
        let what = format!(
            "cannot tell on which device {what} is (--assume-elsewhere takes it for being on another)"
        );
        Err(Error::new(path, what))
    }

    fn overlay(&mut self, mount: &Mount) -> Result<()> {
        for folder in overlay_folders(&mount.options, |_| true) {
            let path = mount.seen_from_here(Path::new(OsStr::from_bytes(&folder)));
            if !path.exists() {
                return self.hidden_overlay(mount);
            }
            self.path(&path)?;
        }
        Ok(())
    }

    /// An overlay whose folders have no name here, as that of a container or of an initramfs: it may be on whatever was
    /// mounted before it, and on nothing that was mounted since.
    fn hidden_overlay(&mut self, mount: &Mount) -> Result<()> {
        let Some(age) = age(mount) else {
            return self.unknown(&mount.point, "this overlay");
        };
        let storage = self.storage;
        for other in &storage.mounts {
            let has_device = other.number.0 != 0 || other.kind == "btrfs";
            // One that cannot be asked may be older.
            if has_device && self::age(other).is_none_or(|other| other < age) {
                self.mount(other)?;
            }
        }
        Ok(())
    }
}

/// Whether a file is in a file system in memory.
fn is_in_memory(path: &Path) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    let kind = rustix::fs::statfs(path).map(|found| found.f_type as u64);
    kind.is_ok_and(|kind| kind == TMPFS || kind == RAMFS)
}

/// A number that grows from mount to mount and is never used again; `None` where another mount hides it, or the kernel
/// is older than 6.8.
fn age(mount: &Mount) -> Option<u64> {
    const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let path = mount.seen_from_here(&mount.point);
    let ask = |wanted| {
        let status = rustix::fs::statx(CWD, &path, AtFlags::empty(), wanted).ok()?;
        (status.stx_mask & wanted.bits() != 0).then_some(status.stx_mnt_id)
    };
    let is_it = ask(StatxFlags::MNT_ID) == Some(mount.id);
    ask(MNT_ID_UNIQUE).filter(|_| is_it)
}

/// The folders that an overlay is made of, from its options. A backslash takes colons and commas their meaning.
fn overlay_folders(options: &[u8], wanted: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let mut folders = Vec::new();
    for option in split(options, b',', true) {
        let Some(at) = option.iter().position(|byte| *byte == b'=') else {
            continue;
        };
        let (name, value) = (&option[..at], &option[at + 1..]);
        match name {
            name if !wanted(name) => {}
            b"upperdir" | b"workdir" => folders.extend(split(value, 0, false)),
            b"lowerdir" | b"lowerdir+" | b"datadir+" => folders.extend(
                // Two colons begin folders with data only.
                split(value, b':', false)
                    .into_iter()
                    .filter(|folder| !folder.is_empty()),
            ),
            _ => {}
        }
    }
    folders
}

/// Splits at `at`, except after a backslash, which goes unless `keep`.
fn split(text: &[u8], at: u8, keep: bool) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut escaped = false;
    for byte in text {
        let Some(last) = parts.last_mut() else {
            break;
        };
        if escaped {
            last.push(*byte);
            escaped = false;
        } else if *byte == b'\\' {
            escaped = true;
            if keep {
                last.push(*byte);
            }
        } else if *byte == at {
            parts.push(Vec::new());
        } else {
            last.push(*byte);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use ovbd_kernel::loops::{attach, Part};

    use super::*;
    use crate::test_programs::{skip, unshare};

    #[test]
    fn folders_of_overlays() {
        let folders = |options: &str| -> Vec<String> {
            overlay_folders(options.as_bytes(), |_| true)
                .into_iter()
                .map(|folder| String::from_utf8(folder).unwrap())
                .collect()
        };
        assert_eq!(
            folders("rw,lowerdir=/a:/b::/data,upperdir=/u\\,v,workdir=/w\\:x,xino=off"),
            ["/a", "/b", "/data", "/u,v", "/w:x"]
        );
        assert_eq!(folders("ro,lowerdir+=/a\\:b,lowerdir+=/c"), ["/a:b", "/c"]);
        assert!(folders("rw,relatime").is_empty());
    }

    #[test]
    fn this_machine_tells() {
        let storage = Storage::look().unwrap();
        assert!(storage.below_path(Path::new("/proc")).unwrap().is_empty());
        assert!(storage.below_path(Path::new("/no/such/file")).is_err());
        assert!(storage
            .below_device(Number(4095, 1))
            .unwrap()
            .contains(&Number(4095, 1)));
    }

    #[test]
    fn what_does_not_tell_is_elsewhere_only_where_that_is_assumed() {
        let mount = Mount {
            id: u64::MAX,
            number: Number(0, 77),
            root: "/".into(),
            point: "/tank".into(),
            kind: "zfs".to_owned(),
            source: "tank/data".into(),
            source_device: None,
            options: b"rw,xattr".to_vec(),
            read_only: false,
        };
        let storage = Storage::default();
        let error = storage.below_mount(&mount).unwrap_err().to_string();
        assert_eq!(
            error,
            "/tank: cannot tell on which device this zfs is (--assume-elsewhere takes it for being on another)"
        );
        let storage = storage.assume_elsewhere(true);
        assert!(storage.below_mount(&mount).unwrap().is_empty());
        // It is for no other error.
        assert!(storage.below_path(Path::new("/no/such/file")).is_err());
    }

    #[test]
    fn a_loop_device_is_on_the_device_of_its_file() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let Ok(attached) = attach(file.as_file(), true, Part::ALL) else {
            skip("no loop devices");
            return;
        };
        let storage = Storage::look().unwrap();
        let mut wanted = match storage.below_path(file.path()) {
            Ok(found) => found,
            Err(e) => {
                skip(e);
                return;
            }
        };
        wanted.insert(attached.number);
        assert_eq!(storage.below_device(attached.number).unwrap(), wanted);
        // A loop device of a loop device.
        let device = fs::File::open(&attached.node).unwrap();
        let second = attach(&device, false, Part::ALL).unwrap();
        wanted.insert(second.number);
        let storage = Storage::look().unwrap();
        assert_eq!(storage.below_device(second.number).unwrap(), wanted);
    }

    /// In a mount namespace of its own, with mounts below `folder`.
    fn check_hidden_overlay(folder: &Path) {
        let storage = Storage::look().unwrap();
        let below = storage.below_path(&folder.join("over")).unwrap();
        let disk = storage.below_path(&folder.join("moved")).unwrap();
        assert!(disk.is_subset(&below), "{below:?} {disk:?}");
        // That one was mounted later.
        let later = storage.below_path(&folder.join("later")).unwrap();
        assert!(!later.is_subset(&below), "{below:?} {later:?}");
        // Only of the hidden one it cannot be told.
        for (name, in_memory) in [
            ("over", true),
            ("on-disk", false),
            ("memory", true),
            ("on-memory", true),
            ("on-both", true),
            ("later", false),
        ] {
            assert_eq!(
                storage.is_in_memory(&folder.join(name)),
                in_memory,
                "{name}"
            );
        }
        let storage = storage.assume_elsewhere(true);
        assert!(!storage.is_in_memory(&folder.join("over")));
        assert!(storage.is_in_memory(&folder.join("on-memory/new")));
    }

    #[test]
    fn a_hidden_overlay_is_on_what_is_older() {
        if let Some(folder) = std::env::var_os("OVBD_TEST_FOLDER") {
            return check_hidden_overlay(Path::new(&folder));
        }
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let script = "set -e; cd $OVBD_TEST_FOLDER; mkdir disk moved later lower over; truncate -s 32M file
            mkfs.ext4 -q file; cp file another; mount -o loop file disk; mkdir disk/upper disk/work
            mount -t overlay -o lowerdir=$PWD/lower,upperdir=$PWD/disk/upper,workdir=$PWD/disk/work none over
            mount --move disk moved; rmdir disk; mount -o loop another later
            mkdir memory on-disk on-memory on-both; mount -t tmpfs none memory; cd later; mkdir upper work; cd ../memory
            mkdir upper work
            overlay() { mount -t overlay -o lowerdir=$1,upperdir=$2/upper,workdir=$2/work none $3; }; cd ..
            overlay $PWD/lower $PWD/later $PWD/on-disk; overlay $PWD/lower $PWD/memory $PWD/on-memory
            touch on-memory/new; mkdir memory/upper2 memory/work2; mount -t overlay \
                -o lowerdir=$PWD/on-disk,upperdir=$PWD/memory/upper2,workdir=$PWD/memory/work2 none on-both
            exec \"$0\" --exact storage::tests::a_hidden_overlay_is_on_what_is_older";
        let output = unshare()
            .args(["sh", "-c", script])
            .arg(std::env::current_exe().unwrap())
            .env("OVBD_TEST_FOLDER", folder.path())
            .output()
            .unwrap();
        let said = format!("{output:?}");
        if !output.status.success() && !said.contains("panicked") {
            skip(said);
            return;
        }
        assert!(output.status.success(), "{said}");
    }
}
