// SPDX-License-Identifier: GPL-2.0

//! Kernel and initrd in the file system of an image.
//!
//! The file system is mounted nowhere: only this process has it, by a descriptor, and it goes with the process. What is in
//! there belongs to whoever made the image, so every path is resolved as if its top were `/`.

use std::{
    cmp::Ordering,
    collections::BTreeSet,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use ovbd_layers::error::{Error, Result};
use rustix::{
    fs::{Dir, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, FsMountFlags,
        FsOpenFlags, MountAttrFlags,
    },
};

/// Where kernels are, as systemd's kernel-install expects them, with their initrds where distributions put these.
const MODULES: &str = "usr/lib/modules";
const BOOT: &str = "boot";
const IN_BOOT: &str = "vmlinuz-";
/// Most bytes of a kernel or an initrd.
const MAX_BYTES: u64 = 2 << 30;

/// The files of an image.
#[derive(Debug)]
pub struct ImageFiles {
    top: OwnedFd,
    /// For messages.
    name: PathBuf,
}

/// A kernel of an image.
#[derive(Debug)]
pub struct Kernel {
    /// Its release.
    pub release: String,
    /// The kernel.
    pub linux: File,
    /// Its initrd.
    pub initrd: File,
}

impl ImageFiles {
    /// The file system of the type `kind` on a device, read-only.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn mount(device: &Path, kind: &str) -> Result<Self> {
        let mount = || -> rustix::io::Result<OwnedFd> {
            let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_set_string(&context, "source", device)?;
            fsconfig_set_flag(&context, "ro")?;
            for flag in flags_of(kind) {
                fsconfig_set_flag(&context, *flag)?;
            }
            fsconfig_create(&context)?;
            let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC
                | MountAttrFlags::MOUNT_ATTR_NOSUID;
            fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        };
        let top = mount().map_err(|e| Error::io(device, "mount", e.into()))?;
        Ok(Self {
            top,
            name: device.to_owned(),
        })
    }

    /// The files below a folder.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn folder(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| Error::io(path, "open", e.into()))?;
        Ok(Self {
            top,
            name: path.to_owned(),
        })
    }

    fn open(&self, path: &str, flags: OFlags) -> Result<Option<OwnedFd>> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::openat2(&self.top, path, flags, Mode::empty(), resolve) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(e) => Err(Error::io(&self.name.join(path), "open", e.into())),
        }
    }

    /// A regular file, if there is one of the name.
    fn file(&self, path: &str) -> Result<Option<File>> {
        let Some(file) = self.open(path, OFlags::empty())? else {
            return Ok(None);
        };
        let file = File::from(file);
        let path = self.name.join(path);
        let about = file
            .metadata()
            .map_err(|e| Error::io(&path, "look at", e))?;
        match about.is_file() && about.len() <= MAX_BYTES {
            true => Ok(Some(file)),
            false => Err(Error::new(&path, "is no file of the size of a kernel")),
        }
    }

    fn names(&self, folder: &str) -> Result<Vec<String>> {
        let Some(opened) = self.open(folder, OFlags::DIRECTORY)? else {
            return Ok(Vec::new());
        };
        let fail = |e: Errno| Error::io(&self.name.join(folder), "list", io::Error::from(e));
        let mut names = Vec::new();
        for entry in Dir::new(opened).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            names.extend(entry.file_name().to_str().map(str::to_owned));
        }
        Ok(names)
    }

    /// The kernel of a release, else the newest; with its initrd.
    ///
    /// # Errors
    ///
    /// There is none, or none with an initrd, and the system's.
    pub fn kernel(&self, release: Option<&str>) -> Result<Kernel> {
        let mut found = BTreeSet::new();
        for name in self.names(MODULES)? {
            // A release is a name in a path and a word on a line.
            if is_release(&name) && self.linux(&name)?.is_some() {
                found.insert(name);
            }
        }
        for name in self.names(BOOT)? {
            let name = name.strip_prefix(IN_BOOT);
            found.extend(name.filter(|name| is_release(name)).map(str::to_owned));
        }
        let fail = |what: String| Err(Error::new(&self.name, what));
        let mut found: Vec<String> = found.into_iter().collect();
        found.sort_by(|one, other| newer_first(one, other));
        if let Some(release) = release {
            found.retain(|name| name == release);
        }
        let Some(first) = found.first() else {
            return fail(format!(
                "has no kernel{}, neither in /{MODULES} nor in /{BOOT}",
                release.map_or(String::new(), |release| format!(" {release}"))
            ));
        };
        for release in &found {
            if let (Some(linux), Some(initrd)) = (self.linux(release)?, self.initrd(release)?) {
                return Ok(Kernel {
                    release: release.clone(),
                    linux,
                    initrd,
                });
            }
        }
        fail(format!("has the kernel {first}, but no initrd for it"))
    }

    fn linux(&self, release: &str) -> Result<Option<File>> {
        match self.file(&format!("{MODULES}/{release}/vmlinuz"))? {
            Some(file) => Ok(Some(file)),
            None => self.file(&format!("{BOOT}/{IN_BOOT}{release}")),
        }
    }

    fn initrd(&self, release: &str) -> Result<Option<File>> {
        let of_modules =
            ["initrd", "initramfs.img"].map(|name| format!("{MODULES}/{release}/{name}"));
        let of_boot = [
            format!("{BOOT}/initrd.img-{release}"),
            format!("{BOOT}/initramfs-{release}.img"),
        ];
        for path in of_modules.iter().chain(&of_boot) {
            if let Some(file) = self.file(path)? {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }
}

/// What a file system of a type is to be mounted with besides.
///
/// XFS mounts no second one with the UUID of one that is mounted, as the images of one system have. And one that was
/// committed or pushed while it was mounted has a log that is to be recovered, which a device that cannot be written to does
/// not allow: its files are in their places all the same, for it was frozen.
fn flags_of(kind: &str) -> &'static [&'static str] {
    match kind {
        "xfs" => &["nouuid", "norecovery"],
        _ => &[],
    }
}

fn is_release(name: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || b"._+~-".contains(&c);
    name.starts_with(|c: char| c.is_ascii_digit()) && name.bytes().all(word)
}

/// Numbers by their value, all else by its letters; the newest release first.
fn newer_first(one: &str, other: &str) -> Ordering {
    let parts = |name: &str| -> Vec<(u64, String)> {
        let part = |part: &str| (part.parse().unwrap_or(0), part.to_owned());
        name.split(['.', '-', '+', '~']).map(part).collect()
    };
    parts(other).cmp(&parts(one))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read, os::unix::fs::symlink};

    use super::*;

    fn image(files: &[&str]) -> (tempfile::TempDir, ImageFiles) {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        let files = ImageFiles::folder(folder.path()).unwrap();
        (folder, files)
    }

    fn content(mut file: File) -> String {
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_newest_kernel_with_its_initrd() {
        let (_folder, files) = image(&[
            "boot/vmlinuz-7.9.1-amd64",
            "boot/initrd.img-7.9.1-amd64",
            "boot/vmlinuz-7.10.2+deb13-amd64",
            "boot/initrd.img-7.10.2+deb13-amd64",
            "usr/lib/modules/7.11.0/vmlinuz",
            "usr/lib/modules/7.8.0/vmlinuz",
            "usr/lib/modules/7.8.0/initramfs.img",
        ]);
        let kernel = files.kernel(None).unwrap();
        assert_eq!(kernel.release, "7.10.2+deb13-amd64");
        assert_eq!(content(kernel.linux), "boot/vmlinuz-7.10.2+deb13-amd64");
        assert_eq!(content(kernel.initrd), "boot/initrd.img-7.10.2+deb13-amd64");
        let kernel = files.kernel(Some("7.8.0")).unwrap();
        assert_eq!(
            content(kernel.initrd),
            "usr/lib/modules/7.8.0/initramfs.img"
        );
        let error = files.kernel(Some("7.11.0")).unwrap_err();
        assert!(
            error.what().ends_with("7.11.0, but no initrd for it"),
            "{error}"
        );
        let error = files.kernel(Some("7.11")).unwrap_err();
        assert!(error.what().starts_with("has no kernel 7.11,"), "{error}");
        let (_folder, files) = image(&["etc/passwd"]);
        assert!(files
            .kernel(None)
            .unwrap_err()
            .what()
            .starts_with("has no kernel,"));
    }

    /// An image is of somebody else: its links lead nowhere but into itself.
    #[test]
    fn links_stay_in_the_image() {
        let (folder, files) = image(&["boot/initrd.img-7.1", "usr/lib/real"]);
        let top = folder.path();
        symlink("/usr/lib/real", top.join("boot/vmlinuz-7.1")).unwrap();
        assert_eq!(content(files.kernel(None).unwrap().linux), "usr/lib/real");
        let outside = tempfile::NamedTempFile::new().unwrap();
        for target in [outside.path(), Path::new("../../../../../../etc/passwd")] {
            fs::remove_file(top.join("boot/vmlinuz-7.1")).unwrap();
            symlink(target, top.join("boot/vmlinuz-7.1")).unwrap();
            assert!(files.kernel(None).is_err(), "{}", target.display());
        }
        fs::remove_file(top.join("boot/vmlinuz-7.1")).unwrap();
        fs::create_dir(top.join("boot/vmlinuz-7.1")).unwrap();
        let error = files.kernel(None).unwrap_err();
        assert!(error.what().contains("no file of the size"), "{error}");
    }
}
