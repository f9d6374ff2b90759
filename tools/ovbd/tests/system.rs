// SPDX-License-Identifier: GPL-2.0

//! Generations of a system, with folders as store and boot partition, and kernels that are given.

#[path = "../../layers/tests/common/mod.rs"]
mod common;
mod run;

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use common::{
    programs::{skip, unshare},
    raw_image,
};
use run::{bad, good, ovbd, OVBD};
use serde_json::Value;
use tempfile::{tempdir, TempDir};

const INIT: &str =
    "system init --boot b --store s --device LABEL=layers --linux linux --initrd initrd";
const ADD: &str = "system add --boot b --store s --linux linux --initrd initrd";
const PLACE: &str = "--boot b --store s";

/// A store with three images, whose layers are shared, an empty boot partition, and files for a kernel.
fn place() -> TempDir {
    let folder = tempdir().unwrap();
    let at = folder.path();
    fs::create_dir(at.join("b")).unwrap();
    raw_image(&at.join("raw"), 1 << 20, 1);
    let mut layers = String::new();
    for number in 1..=3 {
        common::change(&at.join("raw"), number);
        let base = match layers.as_str() {
            "" => String::new(),
            layers => format!("--base{layers} --"),
        };
        let options = base.strip_suffix(" --").unwrap_or_default();
        good(at, &format!("build --tar {options} -o l{number} raw"));
        layers += &format!(" l{number}");
        good(at, &format!("push -q{layers} oci:s:h.x/vm/root:{number}"));
    }
    fs::write(at.join("linux"), "a kernel").unwrap();
    fs::write(at.join("initrd"), "an initrd").unwrap();
    folder
}

fn init(at: &Path) {
    let output = ovbd(at, &format!("{INIT} h.x/vm/root:1"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    // A folder of a test.
    assert!(said.contains("is no mount point"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

fn json(at: &Path, line: &str) -> Value {
    serde_json::from_str(&good(at, line)).unwrap()
}

/// Numbers and states in the order of the loader.
fn list(at: &Path) -> Vec<(u64, String)> {
    let list = json(at, &format!("system list --json {PLACE}"));
    let list = list.as_array().unwrap().iter();
    list.map(|one| {
        let state = one["state"].as_str().unwrap().to_owned();
        (one["number"].as_u64().unwrap(), state)
    })
    .collect()
}

fn numbers(at: &Path) -> Vec<u64> {
    list(at).into_iter().map(|(number, _)| number).collect()
}

/// All names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> = entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What must not change where a verb refuses.
fn all(at: &Path) -> Vec<String> {
    let mut all = names(&at.join("b/loader/entries"));
    all.extend(names(&at.join("b/ovbd")));
    all.push(good(at, "images --store s"));
    all
}

fn rename(at: &Path, from: &str, to: &str) {
    let entries = at.join("b/loader/entries");
    fs::rename(entries.join(from), entries.join(to)).unwrap();
}

#[test]
fn init_add_list_rollback_and_prune() {
    let folder = place();
    let at = folder.path();
    init(at);
    let entry = fs::read_to_string(at.join("b/loader/entries/ovbd-1-1+3.conf")).unwrap();
    let digest = json(at, "images --json --store s h.x/vm/root:1")[0]["digest"].clone();
    let digest = digest.as_str().unwrap();
    let options = format!(
        "options ovbd=LABEL=layers:h.x/vm/root:1@{digest} root=/dev/mapper/root ro panic=30 ovbd.generation=1"
    );
    assert!(entry.lines().any(|line| line == options), "{entry}");
    let linux = entry.lines().find_map(|line| line.strip_prefix("linux /"));
    let linux = at.join("b").join(linux.unwrap());
    assert_eq!(fs::read_to_string(linux).unwrap(), "a kernel");
    let loader = fs::read_to_string(at.join("b/loader/loader.conf")).unwrap();
    assert_eq!(loader, "default ovbd-*\ntimeout 3\n");

    let said = good(at, &format!("{ADD} --append quiet h.x/vm/root:2"));
    assert!(
        said.starts_with("generation 2: h.x/vm/root:2@sha256:"),
        "{said}"
    );
    let third = json(at, &format!("{ADD} --json h.x/vm/root:3"));
    assert_eq!(third["default"], true);
    let options = third["options"].as_str().unwrap();
    assert!(
        options.contains(" panic=30 quiet ovbd.generation=3"),
        "{options}"
    );
    assert_eq!(names(&at.join("b/ovbd")).len(), 2, "one kernel, one initrd");
    assert_eq!(numbers(at), [3, 2, 1]);

    // The loader has tried 3 and given it up; 2 came up.
    rename(at, "ovbd-3-3+3.conf", "ovbd-3-3+0-3.conf");
    rename(at, "ovbd-2-2+3.conf", "ovbd-2-2.conf");
    let states = ["good", "trying", "bad"].map(str::to_owned);
    let wanted: Vec<_> = [2, 1, 3].into_iter().zip(states).collect();
    assert_eq!(list(at), wanted);
    let text = good(at, &format!("system list {PLACE}"));
    assert!(
        text.lines().next().unwrap().ends_with("good, default"),
        "{text}"
    );

    // A rollback, that of it, and that of that.
    for wanted in [[1, 2, 3], [2, 1, 3], [1, 2, 3]] {
        good(at, &format!("system rollback {PLACE}"));
        assert_eq!(numbers(at), wanted);
    }
    let two = good(at, &format!("system set-default {PLACE} 2"));
    assert!(two.contains("the default, good"), "{two}");
    let before = names(&at.join("b/loader/entries"));
    good(at, &format!("system set-default {PLACE} 2"));
    assert_eq!(
        names(&at.join("b/loader/entries")),
        before,
        "it was that already"
    );
    // Who wants the bad one has it tried again.
    let three = good(at, &format!("system set-default {PLACE} --tries 2 3"));
    assert!(three.contains("2 tries left"), "{three}");
    good(at, &format!("system rollback {PLACE}"));
    assert_eq!(numbers(at), [2, 3, 1]);

    let pinned = |number: u32| {
        good(at, "images --store s").contains(&format!("h.x/vm/root:{number}@sha256:"))
    };
    assert!(pinned(1) && pinned(2) && pinned(3));
    good(
        at,
        "rmi --store s h.x/vm/root:1 h.x/vm/root:2 h.x/vm/root:3",
    );
    assert_eq!(good(at, "gc --older 0 --store s"), "0 B removed\n");
    good(at, &format!("system status {PLACE}"));

    let error = bad(at, &format!("system prune {PLACE} 2"), 1);
    assert!(
        error.contains("generation 2 stays: the next boot takes it"),
        "{error}"
    );
    let would = good(at, &format!("system prune --dry-run --keep 1 {PLACE}"));
    assert_eq!(would.matches("would be removed").count(), 2, "{would}");
    assert_eq!(numbers(at), [2, 3, 1]);
    let gone = json(at, &format!("system prune --json --keep 1 {PLACE}"));
    assert_eq!(gone["generations"], serde_json::json!([3, 1]));
    assert_eq!(numbers(at), [2]);
    assert!(!pinned(1) && pinned(2) && !pinned(3));
    assert!(good(at, "gc --older 0 --store s").contains("sha256:"));
    good(at, &format!("system status {PLACE}"));
}

#[test]
fn what_cannot_be_changes_nothing() {
    let folder = place();
    let at = folder.path();
    let error = bad(at, &format!("{ADD} h.x/vm/root:1"), 1);
    assert!(error.contains("b/loader/entries: cannot open"), "{error}");
    let error = bad(at, &format!("{INIT} h.x/vm/none:1"), 1);
    assert!(error.contains("no image h.x/vm/none:1"), "{error}");
    assert_eq!(names(&at.join("b")), [""; 0]);
    let error = bad(at, "system rollback --boot none --store s", 1);
    assert!(
        error.contains("none/loader/entries: cannot open"),
        "{error}"
    );
    init(at);
    let before = all(at);
    let digest = json(at, "images --json --store s h.x/vm/root:2");
    let layer = at.join("s/blobs/sha256").join(
        fs::canonicalize(digest[0]["files"][1].as_str().unwrap().replacen(
            "s/",
            &format!("{}/s/", at.display()),
            1,
        ))
        .unwrap()
        .file_name()
        .unwrap(),
    );
    for (line, what) in [
        (format!("{INIT} h.x/vm/root:1"), "has generation 1 already"),
        (format!("{ADD} h.x/vm/none:1"), "no image h.x/vm/none:1"),
        (format!("system set-default {PLACE} 7"), "no generation 7"),
        (format!("system prune {PLACE} 7"), "no generation 7"),
        (format!("system prune {PLACE} 1"), "generation 1 stays"),
        (format!("system rollback {PLACE}"), "no other generation"),
        (
            format!("{ADD} --linux none h.x/vm/root:2"),
            "cannot be used multiple times",
        ),
    ] {
        let output = ovbd(at, &line);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && error.contains(what),
            "{line}: {error}"
        );
        assert_eq!(all(at), before, "{line}");
    }
    let line = format!("system add {PLACE} --linux none --initrd initrd h.x/vm/root:2");
    assert!(bad(at, &line, 1).contains("none: cannot open"));
    assert_eq!(all(at), before);

    // An image without one of its layers.
    fs::rename(&layer, at.join("layer")).unwrap();
    let error = bad(at, &format!("{ADD} h.x/vm/root:2"), 1);
    assert!(error.contains("No such file"), "{error}");
    assert_eq!(all(at), before);
    fs::rename(at.join("layer"), &layer).unwrap();

    // A generation that has lost one is not made the default, and status says so.
    good(at, &format!("{ADD} h.x/vm/root:2"));
    good(at, &format!("system rollback {PLACE}"));
    fs::remove_file(&layer).unwrap();
    let before = names(&at.join("b/loader/entries"));
    let error = bad(at, &format!("system set-default {PLACE} 2"), 1);
    assert!(
        error.contains("generation 2: ") && error.contains("No such file"),
        "{error}"
    );
    assert!(bad(at, &format!("system rollback {PLACE}"), 1).contains("generation 2: "));
    assert_eq!(names(&at.join("b/loader/entries")), before);
    let error = bad(at, &format!("system status {PLACE}"), 1);
    assert!(error.contains("generation 2: "), "{error}");
}

#[test]
fn what_is_true_for_one_image_alone_is_not_taken_over() {
    let folder = place();
    let at = folder.path();
    let output = ovbd(
        at,
        &format!("{INIT} --append=ovbd.cow=/dev/vdb h.x/vm/root:1"),
    );
    assert!(output.status.success());
    let before = all(at);
    let error = bad(at, &format!("{ADD} h.x/vm/root:2"), 1);
    assert!(
        error.contains("ovbd.cow=/dev/vdb") && error.contains("--append"),
        "{error}"
    );
    assert_eq!(all(at), before);
    good(
        at,
        &format!("{ADD} --append=ovbd.cow=/dev/vdc h.x/vm/root:2"),
    );
    // A root hash without a seal is refused before anything is written.
    let error = bad(
        at,
        &format!("{ADD} --append=ovbd.cow=/dev/vdd --append-x h.x/vm/root:2"),
        2,
    );
    assert!(error.contains("--append-x"), "{error}");
    let before = all(at);
    let words = "--append=ovbd.cow=/dev/vdd ovbd.verity=image";
    let output = Command::new(OVBD)
        .args(ADD.split_whitespace())
        .args([words, "h.x/vm/root:3"])
        .current_dir(at)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("says no root hash"), "{error}");
    assert_eq!(all(at), before);
}

/// Boot partitions that are full, or read-only.
#[test]
fn a_boot_partition_that_takes_nothing() {
    let folder = place();
    let at = folder.path();
    fs::set_permissions(at, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(at.join("initrd"), vec![1; 3 << 20]).unwrap();
    let script = format!(
        r#"mount -t tmpfs -o size=5M none b || {{ echo no mounts here; exit 77; }}
        "$0" {INIT} h.x/vm/root:1 || exit 1
        find b | sort >before; "$0" images --store s >>before
        cp initrd old; head -c 3000000 /dev/zero | tr '\0' 'x' >initrd
        "$0" {ADD} h.x/vm/root:2; echo "full: $?"
        find b | sort >after; "$0" images --store s >>after; cmp before after && echo same
        cp old initrd
        mount -o remount,ro b
        for verb in "add --linux linux --initrd initrd h.x/vm/root:2" "set-default 1" "prune" "update"; do
            "$0" system $verb --boot b --store s; echo "read-only: $?"
        done
        "$0" system list --boot b --store s
        find b | sort >after; "$0" images --store s >>after; cmp before after && echo same
        mount -o remount,rw b
        "$0" {ADD} h.x/vm/root:2 && echo added"#
    );
    let output = unshare()
        .args(["sh", "-c", &script, OVBD])
        .current_dir(at)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    if output.status.code() == Some(77) || said.is_empty() {
        skip(format_args!("{said}{errors}"));
        return;
    }
    assert_eq!(said.matches("full: 1\n").count(), 1, "{said}{errors}");
    assert_eq!(said.matches("read-only: 1\n").count(), 4, "{said}{errors}");
    assert_eq!(said.matches("same\n").count(), 2, "{said}{errors}");
    assert!(said.ends_with("added\n"), "{said}{errors}");
    assert_eq!(
        errors.matches("No space left on device").count(),
        1,
        "{errors}"
    );
    assert_eq!(
        errors.matches("Read-only file system").count(),
        4,
        "{errors}"
    );
}

/// Two at once: one waits, and both are there.
#[test]
fn two_at_once() {
    let folder = place();
    let at = folder.path();
    init(at);
    let start = |image: u32| {
        let mut command = Command::new(OVBD);
        let line = format!("{ADD} h.x/vm/root:{image}");
        command.args(line.split_whitespace()).current_dir(at);
        command.spawn().unwrap()
    };
    let mut running: Vec<_> = [2, 3, 2, 3].into_iter().map(start).collect();
    assert!(running.iter_mut().all(|one| one.wait().unwrap().success()));
    let mut all = numbers(at);
    all.sort_unstable();
    assert_eq!(all, [1, 2, 3, 4, 5]);
    good(at, &format!("system status {PLACE}"));
}

/// The keys of a section of docs/json.md.
fn documented(heading: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once(&format!("\n## `{heading}`\n")).unwrap();
    let lines = section.lines().take_while(|line| !line.starts_with("## "));
    let key = |line: &str| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned());
    let mut keys: Vec<String> = lines.filter_map(key).collect();
    keys.sort();
    keys
}

fn keys(value: &Value, before: &str) -> Vec<String> {
    let object = value.as_object().unwrap().iter();
    let key = |(key, value): (&String, &Value)| {
        let after = if value.is_array() { "[]" } else { "" };
        format!("{before}{key}{after}")
    };
    let mut keys: Vec<String> = object.map(key).collect();
    keys.sort();
    keys
}

#[test]
fn json_is_as_documented() {
    let folder = place();
    let at = folder.path();
    init(at);
    let wanted = documented("ovbd system list --json");
    let list = json(at, &format!("system list --json {PLACE}"));
    assert_eq!(keys(&list[0], "[]."), wanted);
    for line in [
        format!("{ADD} --json h.x/vm/root:2"),
        format!("system rollback --json {PLACE}"),
        format!("system set-default --json {PLACE} 2"),
    ] {
        let one = json(at, &line);
        assert_eq!(keys(&one, "[]."), wanted, "{line}");
        assert_eq!(one["default"], true, "{line}");
    }
    let status = json(at, &format!("system status --json {PLACE}"));
    assert_eq!(keys(&status, ""), documented("ovbd system status --json"));
    assert_eq!(status["default"], 2);
    assert_eq!(status["fallback"], 1);
    assert_eq!(
        (&status["last_good"], &status["running"]),
        (&Value::Null, &Value::Null)
    );
    let pruned = json(at, &format!("system prune --json {PLACE}"));
    assert_eq!(keys(&pruned, ""), documented("ovbd system prune --json"));
}
