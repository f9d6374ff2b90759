// SPDX-License-Identifier: GPL-2.0

//! Making a generation of an image: its layers are complete and as the policy wants them, runs of them are squashed, it has a
//! name of its own in the store, its kernel and initrd are on the boot partition, and then there is an entry.
//!
//! In this order, so that an entry has all that it needs whenever the power goes.

use std::{
    fs::File,
    io::{Read, Seek},
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::{down, mapped, running::Running, up, Interrupt};
use ovbd_layers::{error::Error, parents::Parents, stack::Stack};
use ovbd_oci::{Digest, Image, Kind, Reference};
use ovbd_system::{
    boot_folder::{BootFolder, Generation, New},
    image_files::ImageFiles,
};

use crate::{
    checked::VerityOption, filesystem, names::Found, report::Report, seal_note::NamedImage,
    squash_runs::squash_runs,
};

/// The device on which an image is looked at.
const DEVICE: &str = "ovbd-system";
/// The root hash is that of the image.
const VERITY_OF_IMAGE: &str = "image";

/// What is mounted although its log cannot be recovered.
const NO_RECOVERY: &str = "rootflags=norecovery";

/// What a generation gets besides its image.
#[derive(Clone, Debug, Args)]
pub struct Parts {
    /// Words for the kernel's command line, after those of the generation that is the default
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// How often the boot loader may try it before it takes another generation; 0 for a loader that does not count
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=99))]
    pub tries: u32,
    /// Release of the kernel, where the image has several [default: the newest that has an initrd]
    #[arg(long, value_name = "RELEASE", conflicts_with = "linux")]
    pub kernel: Option<String>,
    /// Take this file as kernel, and not one of the image
    #[arg(long, value_name = "FILE", requires = "initrd", value_hint = ValueHint::FilePath)]
    pub linux: Option<PathBuf>,
    /// Take this file as initrd, and not one of the image
    #[arg(long, value_name = "FILE", requires = "linux", value_hint = ValueHint::FilePath)]
    pub initrd: Option<PathBuf>,
}

/// Where a command line comes from.
#[derive(Clone, Debug)]
pub struct Below {
    /// How the initramfs finds the file system with the store.
    pub device: String,
    /// Its words.
    pub options: String,
    /// Whether it is that of another generation, and may say what is true for that one alone.
    pub of_other: bool,
}

impl Below {
    /// Of the generation that is the default.
    ///
    /// # Errors
    ///
    /// There is none whose command line names device and image.
    pub fn of(generation: Option<&Generation>, entries: &Path) -> Result<Self> {
        let Some(generation) = generation else {
            let what = "no generation yet: \"ovbd system init\" makes the first one";
            return Err(Error::new(entries, what).into());
        };
        let Some((device, _)) = generation.text.stack() else {
            let what = "the command line has no ovbd=DEVICE:IMAGE";
            return Err(Error::new(&entries.join(generation.name.to_string()), what).into());
        };
        Ok(Self {
            device: device.to_owned(),
            options: generation.text.options.clone(),
            of_other: true,
        })
    }

    /// With more words. What is true for one image alone must be said anew for another.
    ///
    /// # Errors
    ///
    /// Something is not.
    pub fn append(&self, more: Option<&str>, image: &str) -> Result<String> {
        let more = more.unwrap_or_default();
        let has = |words: &str, name: &str| {
            let mut words = words.split_whitespace().rev();
            words.find_map(|word| word.strip_prefix(name).map(str::to_owned))
        };
        if self.of_other {
            let of_one = [
                (
                    "ovbd.cow=",
                    "what is written there is over the layers of that image",
                ),
                ("ovbd.verity=", "the root hash is that of one image"),
                ("ovbd.signature=", "it is of one root hash"),
            ];
            for (name, why) in of_one {
                let inherited = has(&self.options, name).filter(|value| value != VERITY_OF_IMAGE);
                if let (Some(value), None) = (inherited, has(more, name)) {
                    let what = format!(
                        "the command line of the default generation has {name}{value}, and {why}: --append \"{name}...\" \
                         says what it is for this one"
                    );
                    return Err(ovbd_oci::Error::new(Kind::Refused, image, what).into());
                }
            }
        }
        Ok(format!("{} {more}", self.options))
    }
}

/// The name of an image that no other image gets: as it is called, with its digest. The policy knows the repository by it.
///
/// # Errors
///
/// A name that no registry has.
pub fn pinned_name(name: &str, digest: &Digest) -> Result<Reference> {
    let reference: Reference = name.parse()?;
    match reference.digest() {
        Some(_) => Ok(reference.at(digest)),
        None => Ok(format!("{reference}@{digest}").parse()?),
    }
}

/// Makes a generation of an image of the store, which is the default from then on.
///
/// # Errors
///
/// All that is wrong with the image, the policy, the store and the boot partition. Nothing has changed then.
pub fn deploy(
    boot: &BootFolder,
    found: &Found,
    below: &Below,
    parts: &Parts,
    interrupt: &Interrupt,
    report: &Report,
) -> Result<Generation> {
    // Until it has its name.
    let _guard = found.store.protect()?;
    let image = found.image()?;
    let digest = &image.descriptor.digest;
    let called = found.named.name.as_deref().unwrap_or_default();
    let pinned = pinned_name(called, digest)?;
    let name = pinned.to_string();
    if name.contains(',') {
        // The command line separates layers by it; references have none.
        return Err(ovbd_oci::Error::new(Kind::Refused, name, "has a comma").into());
    }
    let options = below.append(parts.append.as_deref(), &name)?;
    let verity = verity_option(&options).of_stack(&[named(&name, &pinned, &image)], true)?;
    let layers = found.layers()?;
    Stack::open(&layers, Parents::All)?;
    squash_runs(found, interrupt, report)?;
    let layers = found.layers()?;
    let stack = up::Options {
        name: DEVICE.to_owned(),
        layers,
        writable: None,
        parents: Parents::All,
        wipe_cow: false,
        assume_elsewhere: false,
        verity,
    };
    let new = New {
        title: &format!("{called} ({})", digest.short()),
        version: None,
        options: &options,
        stack: (&below.device, &name),
        tries: parts.tries,
    };
    let pin = || -> Result<bool> {
        let known = found.store.names()?;
        let has = |entry: &ovbd_oci::Named| entry.name.as_deref() == Some(&name);
        let is_new = !known.iter().any(has);
        found.store.set_name(&name, &image.descriptor)?;
        Ok(is_new)
    };
    let is_new = pin()?;
    let done = match (&parts.linux, &parts.initrd) {
        (Some(linux), Some(initrd)) => {
            open(linux).and_then(|linux| add(boot, new, linux, open(initrd)?))
        }
        _ => add_own_kernel(
            boot,
            new,
            &stack,
            parts.kernel.as_deref(),
            interrupt,
            report,
        ),
    };
    if done.is_err() {
        // The first error is what matters; what stays is removed another time.
        let _ = boot.remove_unused();
        if is_new {
            let _ = found.store.remove_name(&name);
        }
    }
    done
}

/// The words of a command line with which the initramfs can mount a root file system of the type `kind`. An XFS that was
/// committed or pushed while it was mounted has a log to recover, which it cannot where nothing is written; and where
/// something is, it must.
fn with_root_flags(options: &str, kind: &str) -> String {
    let words = options
        .split_whitespace()
        .filter(|word| *word != NO_RECOVERY);
    let mut words: Vec<&str> = words.collect();
    let writable = words.iter().rfind(|word| matches!(**word, "ro" | "rw"));
    let is_given = words.iter().any(|word| word.starts_with("rootflags="));
    if kind == "xfs" && writable != Some(&"rw") && !is_given {
        words.push(NO_RECOVERY);
    }
    words.join(" ")
}

/// What dm-verity is to check, where the command line wants that.
fn verity_option(options: &str) -> VerityOption {
    let mut words = options.split_whitespace().rev();
    let wanted = words.find_map(|word| word.strip_prefix("ovbd.verity="));
    VerityOption {
        verity: wanted.map(str::to_owned),
        ..VerityOption::default()
    }
}

fn named<'a>(name: &'a str, reference: &Reference, image: &'a Image) -> NamedImage<'a> {
    NamedImage {
        name,
        reference: Some(reference.clone()),
        has_digest: true,
        manifest: &image.manifest,
    }
}

fn open(path: &Path) -> Result<(File, PathBuf)> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    Ok((file, path.to_owned()))
}

fn add<R: Read + Seek>(
    boot: &BootFolder,
    new: New<'_>,
    mut linux: (R, PathBuf),
    mut initrd: (R, PathBuf),
) -> Result<Generation> {
    let linux = boot.put_kernel("linux", &mut linux.0, &linux.1)?;
    let initrd = boot.put_kernel("initrd", &mut initrd.0, &initrd.1)?;
    Ok(boot.add(&new, linux, initrd)?)
}

/// The same with a kernel of the image, which is a device meanwhile and mounted nowhere.
fn add_own_kernel(
    boot: &BootFolder,
    mut new: New<'_>,
    stack: &up::Options,
    release: Option<&str>,
    interrupt: &Interrupt,
    report: &Report,
) -> Result<Generation> {
    // Of a program that was killed.
    if Running::find(&mapped::open()?, DEVICE).is_ok() {
        down::down(DEVICE, interrupt, report)?;
    }
    let mut device = PathBuf::new();
    up::up(stack, interrupt, report, |node| {
        device = node.to_owned();
        Ok(())
    })?;
    let mut work = || -> Result<Generation> {
        let Some(kind) = filesystem::ask(&device) else {
            let what = "no file system that blkid knows: --linux and --initrd give what it is to boot with";
            return Err(ovbd_oci::Error::new(Kind::Refused, new.stack.1, what).into());
        };
        let files = ImageFiles::mount(&device, &kind)?;
        let kernel = files.kernel(release)?;
        new.version = Some(kernel.release);
        let path = |name: &str| Path::new(new.stack.1).join(name);
        let (linux, initrd) = (path("vmlinuz"), path("initrd"));
        let options = with_root_flags(new.options, &kind);
        add(
            boot,
            New {
                options: &options,
                ..new.clone()
            },
            (kernel.linux, linux),
            (kernel.initrd, initrd),
        )
    };
    let done = work();
    let removed = down::down(DEVICE, &Interrupt::default(), report);
    let generation = done?;
    if let Err(error) = removed {
        report.warning(&error.into());
    }
    Ok(generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below(options: &str) -> Below {
        Below {
            device: "LABEL=x".to_owned(),
            options: options.to_owned(),
            of_other: true,
        }
    }

    #[test]
    fn names_that_stay() {
        let digest = Digest::of(b"x");
        for (name, wanted) in [
            (
                "h.x:5000/vm/root:mon",
                format!("h.x:5000/vm/root:mon@{digest}"),
            ),
            ("h.x/root", format!("h.x/root:latest@{digest}")),
            // What an index of several platforms was called.
            (
                &format!("h.x/root@{}", Digest::of(b"y")),
                format!("h.x/root@{digest}"),
            ),
        ] {
            let found = pinned_name(name, &digest).unwrap();
            assert_eq!(found.to_string(), wanted);
            assert_eq!(
                pinned_name(&wanted, &digest).unwrap().digest(),
                Some(&digest)
            );
        }
        assert!(pinned_name("No/Reference:", &digest).is_err());
    }

    #[test]
    fn an_xfs_that_cannot_be_written_to_recovers_no_log() {
        for (options, kind, wanted) in [
            ("quiet ro", "ext4", "quiet ro"),
            ("quiet  ro", "xfs", "quiet ro rootflags=norecovery"),
            ("quiet", "xfs", "quiet rootflags=norecovery"),
            ("ro rw", "xfs", "ro rw"),
            // What the generation before had.
            ("ro rootflags=norecovery", "xfs", "ro rootflags=norecovery"),
            ("ro rootflags=norecovery rw", "xfs", "ro rw"),
            ("ro rootflags=norecovery", "ext4", "ro"),
            // What somebody wants.
            ("ro rootflags=noquota", "xfs", "ro rootflags=noquota"),
        ] {
            assert_eq!(with_root_flags(options, kind), wanted, "{options:?}");
        }
    }

    #[test]
    fn what_is_true_for_one_image_is_said_anew() {
        for words in [
            "ro ovbd.cow=/dev/vdb",
            "ovbd.verity=00",
            "ovbd.signature=a.p7s",
        ] {
            let below = below(words);
            let error = below.append(None, "image").unwrap_err().to_string();
            assert!(error.contains("--append"), "{error}");
            assert!(below.append(Some("quiet"), "image").is_err());
            let word = words.split_whitespace().last().unwrap();
            assert!(below.append(Some(word), "image").is_ok());
            let first = Below {
                of_other: false,
                ..below
            };
            assert!(first.append(None, "image").is_ok());
        }
        let more = below("ro ovbd.verity=image").append(Some("quiet"), "image");
        assert_eq!(more.unwrap(), "ro ovbd.verity=image quiet");
    }
}
