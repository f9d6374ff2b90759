// SPDX-License-Identifier: GPL-2.0

//! What the command refuses because data would be lost or wrong, and the options that go on.

#[path = "../../layers/tests/common/mod.rs"]
mod common;
mod run;

use std::{
    fs,
    os::unix::fs::{symlink, PermissionsExt},
    path::Path,
};

use common::{
    names,
    programs::{skip, unshare},
    raw_image,
};
use run::{bad, good, OVBD};
use tempfile::{tempdir, TempDir};

/// A folder with three layers on each other: l1, l2, l3, and what they are made from: raw1, raw2, raw3.
fn three_layers() -> TempDir {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let mut content = vec![0; 65536];
    for number in 1..=3 {
        content[number * 8192] = number as u8;
        fs::write(at.join(format!("raw{number}")), &content).unwrap();
        let base = ["", " --base l1", " --base l1 l2"][number - 1];
        good(at, &format!("build -o l{number} raw{number}{base}"));
    }
    folder
}

#[test]
fn stacks_out_of_order_are_refused() {
    let folder = three_layers();
    let at = folder.path();
    let before = names(at);
    for (line, error) in [
        (
            "export l1 l3 l2 -o out",
            "l3: not the one for l1: it belongs on l2",
        ),
        ("export l3 -o out", "l3: not a base layer: its parent is "),
        ("export l2 l3 -o -", "l2: not a base layer: its parent is "),
        (
            "build --base l2 l1 -o out raw3",
            "l2: not a base layer: it belongs on l1",
        ),
        (
            "verify l1 l3 l2",
            "l3: not the one for l1: it belongs on l2",
        ),
        ("verify l2 l3", "l2: not a base layer: its parent is "),
        ("info l1 l3", "l3: not the one for l1: its parent is "),
        (
            "info --json l3 l2 l1",
            "l3: not a base layer: it belongs on l2",
        ),
        (
            "up --dry-run a l1 l3 l2",
            "l3: not the one for l1: it belongs on l2",
        ),
    ] {
        let found = bad(at, line, 1);
        assert!(found.contains(error), "{line}: {found}");
        assert!(
            found.contains("--ignore-parents goes on"),
            "{line}: {found}"
        );
        assert_eq!(names(at), before, "{line}");
    }
    for line in [
        "export --ignore-parents l1 l3 l2 -o out1",
        "build --ignore-parents --base l2 l1 -o out2 raw3",
        "verify --ignore-parents l1 l3 l2",
        "info --ignore-parents l1 l3",
        "up --ignore-parents --dry-run a l1 l3 l2",
        "verify l1 l2 l3",
        // One layer alone is only looked at.
        "verify l3",
        "info l3",
    ] {
        good_with_output(at, line);
    }
}

/// As [`good`], where stderr does not matter.
fn good_with_output(at: &Path, line: &str) {
    let output = run::ovbd(at, line);
    assert!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn layers_without_uuids_are_not_checked() {
    let folder = three_layers();
    let at = folder.path();
    let nil = "00000000-0000-0000-0000-000000000000";
    good(
        at,
        &format!("build --base l1 --uuid {nil} --parent-uuid {nil} -o free raw2"),
    );
    good(at, "export l1 free -o out");
    assert!(fs::read(at.join("out")).unwrap() == fs::read(at.join("raw2")).unwrap());
}

#[test]
fn an_output_is_no_input() {
    let folder = three_layers();
    let at = folder.path();
    fs::hard_link(at.join("l1"), at.join("hard")).unwrap();
    symlink("l1", at.join("soft")).unwrap();
    symlink("raw2", at.join("softraw")).unwrap();
    let state = || {
        names(at)
            .iter()
            .map(|name| fs::read(at.join(name)).unwrap())
            .collect::<Vec<_>>()
    };
    let before = state();
    for line in [
        "build --base l1 -f -o l1 raw2",
        "build --base l1 -f -o hard raw2",
        "build --base hard -f -o l1 raw2",
        "build --base soft -f -o l1 raw2",
        "build --base l1 -f -o soft raw2",
        "build --base l1 -f -o softraw raw2",
        "build -f -o raw1 raw1",
        "build --raw -f -o raw1 raw1",
        "export -f l1 -o l1",
        "export -f l1 l2 -o hard",
        "export -f l1 -o soft",
        "export -f soft -o l1",
    ] {
        let error = bad(at, line, 1);
        assert!(error.contains("is an input itself ("), "{line}: {error}");
        assert!(state() == before, "{line}");
    }
}

#[test]
fn modes_are_never_wider() {
    let folder = three_layers();
    let at = folder.path();
    let set = |name: &str, mode: u32| {
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    let mode = |name: &str| fs::metadata(at.join(name)).unwrap().permissions().mode() & 0o777;
    set("raw1", 0o600);
    good(at, "build -o a raw1");
    assert_eq!(mode("a"), 0o600);
    set("raw1", 0o644);
    fs::write(at.join("b"), "").unwrap();
    set("b", 0o600);
    good(at, "build -f -o b raw1");
    assert_eq!(mode("b"), 0o600);
    set("l2", 0o400);
    good(at, "export l1 l2 -o c");
    assert_eq!(mode("c"), 0o600);
    set("l1", 0o600);
    good(at, "build --base l1 -o d raw2");
    assert_eq!(mode("d"), 0o600);
}

#[test]
fn links_are_followed() {
    let folder = three_layers();
    let at = folder.path();
    fs::create_dir(at.join("other")).unwrap();
    fs::write(at.join("other/file"), "x").unwrap();
    symlink("other/file", at.join("link")).unwrap();
    symlink("nowhere", at.join("dangling")).unwrap();
    bad(at, "export l1 -o link", 1);
    good(at, "export -f l1 -o link");
    assert!(at.join("link").is_symlink());
    assert!(fs::read(at.join("other/file")).unwrap() == fs::read(at.join("raw1")).unwrap());
    for line in [
        "export -f l1 -o dangling",
        "build -f -o dangling raw1",
        "export l1 -o dangling",
    ] {
        assert_eq!(bad(at, line, 1), "ovbd: dangling: a link to nothing\n");
    }
}

#[test]
fn pipes_and_character_devices_take_results() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 7);
    good(at, "build -o layer raw");
    good(at, "export layer -o /dev/null");
    let error = bad(at, "export layer -o .", 1);
    assert_eq!(error, "ovbd: .: a directory\n");
}

/// Runs a line of shell in a folder, with the program as `$OVBD`.
fn shell(at: &Path, line: &str) -> std::process::Output {
    std::process::Command::new("sh")
        .args(["-c", line])
        .env("OVBD", OVBD)
        .current_dir(at)
        .output()
        .unwrap()
}

#[test]
fn results_go_to_pipes_and_come_from_them() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 3 << 20, 8);
    let raw = fs::read(at.join("raw")).unwrap();
    good(at, "build -o layer raw");
    for line in [
        "$OVBD build -o - raw > out && $OVBD verify -q out",
        "cat raw | $OVBD build -o out -f - && $OVBD verify -q out",
        "$OVBD build --format lsmt -f -o out - < raw",
        "cat raw | $OVBD build - -o - | cat > out",
        "cat raw | $OVBD build --base layer -o next - && $OVBD export layer next -f -o image && $OVBD build -f -o out image",
        "$OVBD build --raw -o - raw > out",
    ] {
        let output = shell(at, line);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(shell(at, "$OVBD export out -o -").stdout == raw, "{line}");
    }
    assert!(shell(at, "$OVBD build -o /dev/null raw").status.success());
    assert!(Path::new("/dev/null").exists());
    let refused = shell(
        at,
        "$OVBD build --tar -o - raw | wc -c; $OVBD build -o none - < /dev/null",
    );
    let errors = String::from_utf8(refused.stderr).unwrap();
    assert!(errors.contains("a pipe, but the tar wrapper"), "{errors}");
    assert!(errors.contains("standard input: is empty"), "{errors}");
    assert_eq!(refused.stdout, b"0\n");
    assert!(!at.join("none").exists());
}

/// Without /proc a new file needs a temporary name.
#[test]
fn signals_leave_no_temporary_names() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    fs::create_dir(at.join("empty")).unwrap();
    let can = unshare()
        .args(["mount", "--bind", "empty", "/proc"])
        .current_dir(at)
        .output()
        .unwrap();
    if !can.status.success() {
        skip(String::from_utf8_lossy(&can.stderr));
        return;
    }
    let unshare = format!("{:?}", unshare());
    raw_image(&at.join("raw"), 1 << 20, 9);
    for signal in ["INT", "TERM", "HUP"] {
        let line = format!(
            "mkfifo pipe; {unshare} sh -c 'mount --bind empty /proc; exec $OVBD build -o out pipe' & \
             exec 9>pipe; cat raw >&9; n=0; until ls -A | grep -q '^.ovbd-'; do sleep 0.05; n=$((n + 1)); \
             test $n -lt 200 || exit 7; done; kill -{signal} $!; wait $!; echo $?; rm pipe"
        );
        let output = shell(at, &line);
        let number = [("INT", 2), ("TERM", 15), ("HUP", 1)];
        let number = number.iter().find(|(name, _)| *name == signal).unwrap().1;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("{}\n", 128 + number),
            "{errors}"
        );
        assert_eq!(names(at), ["empty", "raw"]);
    }
}
