// SPDX-License-Identifier: GPL-2.0

//! A folder as boot partition: what is there after each step at which the power goes or the disk is full.

use std::{cell::Cell, io::Cursor};

use super::*;
use crate::choice;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Nothing,
    /// No step is done any more, as if the power were gone.
    Dead,
    /// One step fails, and the others are done, as on a full disk.
    Once,
}

/// Goes wrong after so many steps.
#[derive(Debug, Default)]
pub(super) struct Fault {
    kind: Cell<Kind>,
    left: Cell<usize>,
}

impl Fault {
    fn set(&self, kind: Kind, left: usize) {
        self.kind.set(kind);
        self.left.set(left);
    }

    pub(super) fn step(&self, path: &Path) -> Result<()> {
        let left = self.left.get();
        if self.kind.get() == Kind::Nothing || left > 0 {
            self.left.set(left.saturating_sub(1));
            return Ok(());
        }
        if self.kind.get() == Kind::Once {
            self.kind.set(Kind::Nothing);
        }
        Err(Error::new(path, "no step"))
    }
}

const DEVICE: &str = "LABEL=layers";

fn add(boot: &BootFolder, kernel: &str, image: &str) -> Result<Generation> {
    let put = |kind: &str| {
        let mut source = Cursor::new(format!("{kind} {kernel}"));
        boot.put_kernel(kind, &mut source, Path::new(kernel))
    };
    boot.tidy()?;
    let done = put("linux").and_then(|linux| Ok((linux, put("initrd")?)));
    let done = done.and_then(|(linux, initrd)| {
        let new = New {
            title: image,
            version: Some(kernel.to_owned()),
            options: "root=/dev/mapper/root ro",
            stack: (DEVICE, image),
            tries: 3,
        };
        boot.add(&new, linux, initrd)
    });
    if done.is_err() {
        let _ = boot.remove_unused();
    }
    done
}

/// Every entry can be booted, whoever reads them.
fn check_all_boot(boot: &BootFolder) -> Vec<u64> {
    let generations = boot.generations().unwrap();
    for name in list(&boot.entries()).unwrap() {
        let Some(name) = Name::parse(&name) else {
            assert_eq!(name, NEW, "a loader would take it");
            continue;
        };
        let path = boot.entries().join(name.to_string());
        let text = Text::parse(&fs::read_to_string(path).unwrap());
        assert!(text.stack().is_some(), "{text:?}");
        for (kind, path) in [("linux", &text.linux), ("initrd", &text.initrd)] {
            let content = fs::read_to_string(boot.path.join(&path[1..])).unwrap();
            assert_eq!(
                content,
                format!("{kind} {}", text.version.as_ref().unwrap())
            );
        }
    }
    generations.iter().map(|one| one.name.number).collect()
}

fn files(boot: &BootFolder) -> Vec<String> {
    let mut all: Vec<String> = [ENTRIES, KERNELS]
        .iter()
        .flat_map(|folder| list(&boot.path.join(folder)).unwrap_or_default())
        .collect();
    all.sort();
    all
}

/// A folder with two generations, the second with a kernel of its own.
fn two() -> (tempfile::TempDir, BootFolder) {
    let folder = tempfile::tempdir().unwrap();
    let boot = BootFolder::create(folder.path()).unwrap();
    add(&boot, "7.2", "one").unwrap();
    add(&boot, "7.3", "two").unwrap();
    (folder, boot)
}

/// What is done to a folder.
type Work = (&'static str, fn(&BootFolder) -> Result<()>);
const WORK: [Work; 4] = [
    ("add, a new kernel", |boot| {
        add(boot, "7.4", "three").map(drop)
    }),
    ("add, a shared kernel", |boot| {
        add(boot, "7.2", "three").map(drop)
    }),
    ("make_default", |boot| {
        boot.make_default(&boot.find(1)?, 3).map(drop)
    }),
    ("remove", |boot| boot.remove(&boot.find(1)?)),
];

#[test]
fn generations_come_and_go() {
    let (_folder, boot) = two();
    let third = add(&boot, "7.3", "three").unwrap();
    assert_eq!(third.name.to_string(), "ovbd-3-3+3.conf");
    assert_eq!(third.text.stack(), Some((DEVICE, "three")));
    assert_eq!(third.text.linux, boot.find(2).unwrap().text.linux, "shared");
    let list = boot.generations().unwrap();
    assert_eq!(choice::default(&list), Some(&third));

    let first = boot.make_default(&boot.find(1).unwrap(), 3).unwrap();
    assert_eq!(first.name.to_string(), "ovbd-4-1+3.conf");
    boot.remove(&boot.find(2).unwrap()).unwrap();
    assert_eq!(check_all_boot(&boot), [1, 3]);
    assert_eq!(files(&boot).len(), 6);
    boot.remove(&boot.find(3).unwrap()).unwrap();
    assert_eq!(files(&boot).len(), 3, "its kernel and initrd went with it");
    assert!(boot.find(3).is_err());
    assert!(boot.missing(&first).is_empty());
    fs::remove_file(boot.path.join(&first.text.initrd[1..])).unwrap();
    assert_eq!(boot.missing(&first).len(), 1);
}

#[test]
fn what_loader_and_bless_boot_rename_is_read() {
    let (_folder, boot) = two();
    let rename = |from: &str, to: &str| {
        fs::rename(boot.entries().join(from), boot.entries().join(to)).unwrap();
    };
    rename("ovbd-2-2+3.conf", "ovbd-2-2+0-3.conf");
    rename("ovbd-1-1+3.conf", "ovbd-1-1.conf");
    let list = boot.generations().unwrap();
    assert_eq!(list[0].state(), State::Good);
    assert_eq!(choice::default(&list), Some(&list[0]));
    // One that is bad has tries again when somebody wants it.
    let second = boot.make_default(&list[1], 3).unwrap();
    assert_eq!(second.name.to_string(), "ovbd-3-2+3.conf");
    let list = boot.generations().unwrap();
    assert_eq!(choice::default(&list), Some(&second));
}

#[test]
fn whenever_the_power_goes_all_entries_boot() {
    for (what, work) in WORK {
        let mut steps = 0;
        loop {
            let (folder, boot) = two();
            boot.files.fault.set(Kind::Dead, steps);
            let done = work(&boot).is_ok();
            // Another program, after the next boot.
            let boot = BootFolder::open(folder.path()).unwrap();
            let numbers = check_all_boot(&boot);
            let wanted: &[&[u64]] = match what {
                "remove" => &[&[1, 2], &[2]],
                "make_default" => &[&[1, 2]],
                _ => &[&[1, 2], &[1, 2, 3]],
            };
            assert!(wanted.contains(&numbers.as_slice()), "{what}: {numbers:?}");
            // It can be done again, and leaves nothing of the first time.
            if !done {
                boot.tidy().unwrap();
                assert!(!files(&boot).contains(&NEW.to_owned()));
                if numbers == [1, 2] {
                    work(&boot).unwrap();
                    check_all_boot(&boot);
                }
            }
            if done {
                assert!(steps > 1, "{what}");
                break;
            }
            steps += 1;
        }
    }
}

#[test]
fn a_step_that_fails_changes_nothing() {
    for (what, work) in &WORK[..2] {
        let (mut steps, mut left) = (0, 0);
        loop {
            let (_folder, boot) = two();
            let before = files(&boot);
            boot.files.fault.set(Kind::Once, steps);
            if work(&boot).is_ok() {
                break;
            }
            let mut after = files(&boot);
            let count = after.len();
            after.retain(|name| name != NEW);
            left += count - after.len();
            assert_eq!(after, before, "{what}, step {steps}");
            steps += 1;
        }
        assert!(steps > 5, "{what}: {steps}");
        // What shows that the folder can be written to, where just its removal is what failed.
        assert_eq!(left, 1, "{what}");
    }
}

#[test]
fn a_name_too_much_is_no_second_generation() {
    let (_folder, boot) = two();
    let entries = boot.entries();
    // As FAT has it where the power went while an entry was renamed.
    fs::copy(
        entries.join("ovbd-1-1+3.conf"),
        entries.join("ovbd-3-1+3.conf"),
    )
    .unwrap();
    fs::copy(
        entries.join("ovbd-2-2+3.conf"),
        entries.join("ovbd-2-2+2-1.conf"),
    )
    .unwrap();
    // And where it went before the content had come to the name.
    for name in ["ovbd-4-1+3.conf", "ovbd-5-5+3.conf"] {
        fs::write(entries.join(name), "").unwrap();
    }
    let names = |boot: &BootFolder| -> Vec<String> {
        let all = boot.generations().unwrap();
        all.iter().map(|one| one.name.to_string()).collect()
    };
    assert_eq!(names(&boot), ["ovbd-3-1+3.conf", "ovbd-2-2+2-1.conf"]);
    boot.tidy().unwrap();
    assert_eq!(names(&boot), ["ovbd-3-1+3.conf", "ovbd-2-2+2-1.conf"]);
    assert_eq!(files(&boot).len(), 6);
}

#[test]
fn what_others_have_there_stays() {
    let (_folder, boot) = two();
    let kernel = boot.find(1).unwrap().text.linux;
    fs::write(
        boot.entries().join("debian.conf"),
        format!("linux {kernel}\n"),
    )
    .unwrap();
    fs::write(boot.path.join("ovbd/notes"), "x").unwrap();
    boot.remove(&boot.find(1).unwrap()).unwrap();
    let left = files(&boot);
    assert!(
        left.contains(&kernel["/ovbd/".len()..].to_owned()),
        "{left:?}"
    );
    assert!(left.contains(&"notes".to_owned()) && left.contains(&"debian.conf".to_owned()));
}

#[test]
fn a_damaged_kernel_is_written_again() {
    let (_folder, boot) = two();
    let linux = boot.path.join(&boot.find(1).unwrap().text.linux[1..]);
    fs::write(&linux, "linux").unwrap();
    add(&boot, "7.2", "three").unwrap();
    assert_eq!(fs::read_to_string(&linux).unwrap(), "linux 7.2");
}

#[test]
fn settings_of_others_stay() {
    let (_folder, boot) = two();
    assert!(!boot.is_preferred());
    assert!(boot.write_settings().unwrap() && boot.is_preferred());
    assert!(!boot.write_settings().unwrap());
    fs::write(boot.path.join(SETTINGS), "default debian*\n").unwrap();
    assert!(!boot.write_settings().unwrap() && !boot.is_preferred());
}
