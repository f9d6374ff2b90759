// SPDX-License-Identifier: GPL-2.0

//! Where the generations of a system are: the boot partition with their entries, and the store with their layers.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use clap::{Args, ValueHint};
use ovbd_devices::{lock, programs::run, Interrupt};
use ovbd_layers::error::Error;
use ovbd_system::{
    boot_folder::{BootFolder, ENTRIES},
    choice::Running,
};
use rustix::fs::StatVfsMountFlags;
use serde_json::Value;

use crate::{names::StoreOption, report::Report};

/// Where boot partitions are mounted.
const BOOT: [&str; 3] = ["/efi", "/boot/efi", "/boot"];
/// Where the initramfs has mounted the file system with the layers.
const LAYERS: &str = "/run/ovbd/layers";
/// Where root-stack looks for a store there.
const STORES: [&str; 3] = ["var/lib/ovbd", "lib/ovbd", ""];

/// The options.
#[derive(Clone, Debug, Args)]
pub struct SystemPlace {
    /// Where the boot partition is mounted, with the entries of the boot loader [default: the first of /efi, /boot/efi and
    /// /boot with a folder loader]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub boot: Option<PathBuf>,
    /// Where images are kept: an OCI image layout [default: that which this system runs from, else /var/lib/ovbd]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub store: Option<PathBuf>,
}

impl SystemPlace {
    /// The folder of the boot partition.
    ///
    /// # Errors
    ///
    /// None was given, and none of the usual ones is it.
    pub fn boot_path(&self) -> Result<PathBuf> {
        if let Some(path) = &self.boot {
            return Ok(path.clone());
        }
        let mut usual = BOOT.iter().map(Path::new);
        let found = usual.find(|path| path.join("loader").is_dir());
        Ok(found.map(Path::to_owned).ok_or_else(|| {
            let what = "no folder loader in there, nor in /boot/efi or /boot: mount the boot partition, or name it with \
                        --boot";
            Error::new(Path::new("/efi"), what)
        })?)
    }

    /// The boot partition with the entries.
    ///
    /// # Errors
    ///
    /// As [`SystemPlace::boot_path`], and it has no entries.
    pub fn boot(&self) -> Result<BootFolder> {
        Ok(BootFolder::open(&self.boot_path()?)?)
    }

    /// The store.
    pub fn store(&self) -> StoreOption {
        let own = || {
            let mut stores = STORES.iter().map(|store| Path::new(LAYERS).join(store));
            stores.find(|store| store.join("oci-layout").exists())
        };
        StoreOption {
            store: self.store.clone().or_else(own),
        }
    }
}

/// The kernel's command line of this machine.
///
/// # Errors
///
/// The system's: what runs is not known then.
pub fn command_line() -> Result<String> {
    let path = Path::new("/proc/cmdline");
    Ok(std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?)
}

/// What of it is about the generation that runs.
pub fn running(command_line: &str) -> Running<'_> {
    Running::of(command_line)
}

/// The right to change the entries, and a store that can be written to. Dropped, both are as they were.
pub struct Changing {
    _lock: std::fs::File,
    mount: Option<&'static Path>,
}

impl Changing {
    /// Waits for others that change them. The file system that the initramfs has mounted read-only can be written to
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// An interrupt, and the system's.
    pub fn begin(
        boot: &BootFolder,
        store: &Path,
        interrupt: &Interrupt,
        report: &Report,
    ) -> Result<Self> {
        let (lock, path) = boot.lock_file()?;
        lock::wait_for(&lock, &path, interrupt, report, || {
            Error::new(&path, "waiting for another ovbd, which changes the entries")
        })?;
        boot.tidy()?;
        let mut changing = Self {
            _lock: lock,
            mount: None,
        };
        let layers = Path::new(LAYERS);
        if store.starts_with(layers) {
            let space =
                rustix::fs::statvfs(layers).map_err(|e| Error::io(layers, "look at", e.into()))?;
            if space.f_flag.contains(StatVfsMountFlags::RDONLY) {
                run("mount", ["-o", "remount,rw", LAYERS]).context("cannot write to the store")?;
                changing.mount = Some(layers);
            }
        }
        Ok(changing)
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        if let Some(mount) = self.mount {
            // Somebody else writes there by now, who needs it as it is.
            let _ = run("mount", [Path::new("-o"), Path::new("remount,ro"), mount]);
        }
    }
}

/// How the initramfs finds the file system of a store: by its UUID.
///
/// # Errors
///
/// It has none, or the store is not where the initramfs looks for it.
pub fn device_of(store: &Path) -> Result<String> {
    let words = ["--json", "--output", "FSROOT,TARGET,UUID", "--target"].map(Path::new);
    let path = store
        .canonicalize()
        .map_err(|e| Error::io(store, "open", e))?;
    let said = run("findmnt", words.into_iter().chain([path.as_path()]))?;
    let said: Value = serde_json::from_str(&said).context("findmnt")?;
    let text = |key: &str| said["filesystems"][0][key].as_str().unwrap_or_default();
    let inside = path.strip_prefix(text("target")).unwrap_or(&path);
    let place = Path::new(text("fsroot")).join(inside);
    let fail = |what: String| Err(Error::new(store, what).into());
    if !STORES
        .iter()
        .any(|store| place == Path::new("/").join(store))
    {
        return fail(format!(
            "is {} of its file system; the initramfs looks for a store in /var/lib/ovbd, in /lib/ovbd and at the top",
            place.display()
        ));
    }
    match text("uuid") {
        "" => {
            fail("its file system has no UUID: --device says how the initramfs finds it".to_owned())
        }
        uuid => Ok(format!("UUID={uuid}")),
    }
}

/// Whether a folder is where a file system is mounted; true where that cannot be told.
pub fn is_mount_point(path: &Path) -> bool {
    let status = Command::new("mountpoint").arg("-q").arg(path).status();
    status.map_or(true, |status| status.success())
}

/// What a message calls the entries.
pub fn entries(boot: &BootFolder) -> PathBuf {
    boot.path().join(ENTRIES)
}
