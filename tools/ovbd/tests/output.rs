// SPDX-License-Identifier: GPL-2.0

//! Where the command's words go: closed and full streams, pipes that nobody reads, terminals, and JSON.

mod run;

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::Path,
    process::{Command, Output, Stdio},
};

use run::{bad, good, ovbd, OVBD};
use serde_json::Value;
use tempfile::{tempdir, TempDir};

const DAMAGED: i32 = 1;
const CLOSED_PIPE: i32 = 141;

/// A folder with an image, a layer of it, and the layer with a byte changed.
fn layers() -> TempDir {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let content: Vec<u8> = (0..1_u32 << 18)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(at.join("raw"), content).unwrap();
    good(at, "build --format lsmt -o layer raw");
    good(at, "build -o damaged raw");
    let mut bytes = fs::read(at.join("damaged")).unwrap();
    bytes[600] ^= 1;
    fs::write(at.join("damaged"), bytes).unwrap();
    folder
}

/// The command with its words, to be given other streams.
fn command(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(OVBD);
    command
        .args(line.split_whitespace())
        .current_dir(folder)
        .stdin(Stdio::null());
    command
}

/// The end of a pipe whose other end is closed.
fn closed_pipe() -> Stdio {
    OwnedFd::from(UnixStream::pair().unwrap().0).into()
}

fn full() -> Stdio {
    File::options()
        .write(true)
        .open("/dev/full")
        .unwrap()
        .into()
}

/// Runs a line of the shell in which `$OVBD` is the command.
fn shell(folder: &Path, line: &str) -> Output {
    Command::new("sh")
        .args(["-c", line])
        .env("OVBD", OVBD)
        .current_dir(folder)
        .output()
        .unwrap()
}

#[test]
fn nobody_needs_to_hear_the_errors() {
    let folder = layers();
    let at = folder.path();
    for (line, status) in [
        ("build -f -o out raw", 0),
        ("-v build -f -o out raw", 0),
        ("--progress=always build -f -o out raw", 0),
        ("--progress=json build -f -o out raw", 0),
        ("-v --progress=always export -f layer -o out", 0),
        ("-v verify layer", 0),
        ("verify damaged", DAMAGED),
        ("-v verify --json damaged", DAMAGED),
        ("--progress=always verify damaged", DAMAGED),
        ("export -f damaged -o out", 1),
        ("info missing", 1),
        ("info", 2),
        ("info --frobnicate", 2),
    ] {
        for (what, stream) in [("full", full()), ("closed pipe", closed_pipe())] {
            let _ = fs::remove_file(at.join("out"));
            let ended = command(at, line)
                .stderr(stream)
                .stdout(Stdio::null())
                .status()
                .unwrap();
            assert_eq!(ended.code(), Some(status), "{line}, stderr: {what}");
        }
        let ended = shell(at, &format!("exec $OVBD {line} 2>&-"));
        assert_eq!(ended.status.code(), Some(status), "{line}, stderr: closed");
        let done = at.join("out").exists();
        assert_eq!(done, status == 0 && line.contains("out"), "{line}");
    }
}

#[test]
fn an_answer_that_is_lost_is_an_error() {
    let folder = layers();
    let at = folder.path();
    for line in [
        "info layer",
        "info --map layer",
        "export layer -o -",
        "--help",
        "up --help",
        "--version",
    ] {
        let output = command(at, line).stdout(full()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.starts_with("ovbd: standard output: cannot write: No space left on device")
                && said.lines().count() == 1,
            "{line}: {said}"
        );
        assert_eq!(output.status.code(), Some(1), "{line}");
    }
}

#[test]
fn a_reader_who_has_enough_is_no_error() {
    let folder = layers();
    let at = folder.path();
    for line in [
        "info layer",
        "info --json layer",
        "info --map layer",
        "-v export layer -o -",
        "--progress=json export layer -o -",
        "--help",
        "up --help",
        "--version",
    ] {
        let output = command(at, line).stdout(closed_pipe()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(CLOSED_PIPE), "{line}: {said}");
        assert!(
            !said.contains("roken pipe") && !said.contains("error"),
            "{line}: {said}"
        );
    }
    let piped = shell(
        at,
        "{ $OVBD export layer -o -; echo $? >status; } | head -c 1000 | wc -c",
    );
    assert_eq!(String::from_utf8(piped.stdout).unwrap().trim(), "1000");
    assert_eq!(fs::read_to_string(at.join("status")).unwrap(), "141\n");
    assert_eq!(String::from_utf8(piped.stderr).unwrap(), "");
}

/// What is written to stderr, a JSON value a line.
fn objects(output: &Output) -> Vec<Value> {
    let text = std::str::from_utf8(&output.stderr).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

#[test]
fn errors_are_json_where_the_answer_is() {
    let folder = layers();
    let at = folder.path();
    for line in [
        "verify --json damaged",
        "-q verify --json damaged",
        "--progress=json export damaged -o out",
    ] {
        let output = ovbd(at, line);
        assert_eq!(output.status.code(), Some(1), "{line}");
        let errors: Vec<Value> = objects(&output)
            .iter()
            .filter_map(|line| line.get("error").cloned())
            .collect();
        assert_eq!(errors.len(), 1, "{line}: {errors:?}");
        let error = &errors[0];
        assert_eq!(error["path"], "damaged", "{line}");
        assert!(error["offset"].as_u64() > Some(512), "{line}");
        assert_eq!(error["within"], "file", "{line}");
        assert_eq!(error["errno"], Value::Null, "{line}");
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .starts_with("damaged: ZFile block CRC mismatch"),
            "{line}"
        );
    }
    for line in [
        "info --json missing",
        "--progress=json export missing -o out",
    ] {
        let found = objects(&ovbd(at, line));
        assert_eq!(found.len(), 1, "{line}: {found:?}");
        assert_eq!(found[0]["error"]["errno"], 2, "{line}");
        assert_eq!(found[0]["error"]["path"], "missing", "{line}");
    }
    // Without root, or without device-mapper.
    let listed = ovbd(at, "ls --json");
    if !listed.status.success() {
        assert!(objects(&listed)[0]["error"]["message"].is_string());
    }
}

#[test]
fn names_cannot_forge_a_line() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let name = OsStr::from_bytes(b"a\nb\x1b[2J\xff");
    let output = Command::new(OVBD)
        .arg("verify")
        .arg(name)
        .current_dir(at)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.matches('\n').count(), 1, "{said}");
    assert!(
        said.starts_with("ovbd: a\\nb\\u{1b}[2J\\xff: cannot open: No such file"),
        "{said}"
    );
}

#[test]
fn names_need_not_be_text() {
    let folder = layers();
    let at = folder.path();
    let named = |name: &[u8]| at.join(OsStr::from_bytes(name));
    let (base, raw, next, out) = (
        named(b"base\xff"),
        named(b"raw\xfe"),
        named(b"next\xfd"),
        named(b"out\xfc"),
    );
    fs::copy(at.join("raw"), &raw).unwrap();
    let run = |words: &[&OsStr]| {
        let output = Command::new(OVBD).args(words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words:?}: {said}");
    };
    let (base, raw, next, out) = (
        base.as_os_str(),
        raw.as_os_str(),
        next.as_os_str(),
        out.as_os_str(),
    );
    let word = OsStr::new;
    run(&[word("build"), word("-o"), base, raw]);
    let mut content = fs::read(raw).unwrap();
    content[5000] ^= 1;
    fs::write(raw, content).unwrap();
    // The last name that --base takes is the image.
    run(&[word("build"), word("-o"), next, word("--base"), base, raw]);
    run(&[word("verify"), base, next]);
    run(&[word("info"), base, next]);
    run(&[word("up"), word("--dry-run"), word("name"), base, next]);
    run(&[word("export"), base, next, word("-o"), out]);
    assert!(fs::read(out).unwrap() == fs::read(raw).unwrap());
}

#[test]
fn base_takes_all_names_but_the_last() {
    let folder = layers();
    let at = folder.path();
    let diff = |line: &str| {
        good(at, line);
        fs::read(at.join("diff")).unwrap()
    };
    let wanted = diff("build --base layer -o diff raw");
    for line in [
        "build -f -o diff --base layer raw",
        "build -f --base layer raw -o diff",
        "build -f -o diff raw --base layer",
        "build -f -o diff --base=layer raw",
        "build -f -o diff --base layer -- raw",
    ] {
        assert!(diff(line) == wanted, "{line}");
    }
    // Not the base alone, as if it were the image.
    assert!(bad(at, "build -f -o diff --base raw", 2).contains("RAW is missing"));
}

#[test]
fn progress() {
    let folder = layers();
    let at = folder.path();
    for line in [
        "build -f -o out raw",
        "--progress=never build -f -o out raw",
        "-q --progress=always build -f -o out raw",
    ] {
        assert_eq!(good(at, line), "", "{line}");
    }
    let said = ovbd(at, "build --progress=always -f -o out raw").stderr;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("building ["), "{said:?}");

    let seen = objects(&ovbd(at, "--progress json build -f -o out raw"));
    assert_eq!(seen[0]["progress"]["what"], "building", "{seen:?}");
    assert_eq!(seen[0]["progress"]["done"], 0, "{seen:?}");
    assert_eq!(seen[0]["progress"]["total"], 1 << 20, "{seen:?}");

    let said = ovbd(at, "-v export -f layer -o out").stderr;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("layers=1"), "{said:?}");
    // Nothing else writes to stderr then.
    assert!(
        said.lines()
            .all(|line| line.trim_start().starts_with("DEBUG ")),
        "{said:?}"
    );
}

/// What the command shows on a terminal.
fn on_terminal(folder: &Path, line: &str, environment: &[(&str, &str)]) -> String {
    let mut script = Command::new("script");
    script
        .args(["-qec", &format!("{} {line}", OVBD), "/dev/null"])
        .current_dir(folder)
        .env_remove("NO_COLOR")
        .env("TERM", "xterm")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = script.spawn().expect("script of util-linux");
    let mut shown = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut shown)
        .unwrap();
    assert!(child.wait().unwrap().success(), "{line}: {shown}");
    shown
}

#[test]
fn terminals() {
    let folder = layers();
    let at = folder.path();
    let escape = '\u{1b}';
    let map = "info --map=term layer";
    assert!(on_terminal(at, map, &[]).contains(escape));
    for plain in [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")] {
        assert!(
            !on_terminal(at, map, &[plain]).contains(escape),
            "{plain:?}"
        );
    }
    assert!(on_terminal(at, map, &[("NO_COLOR", "")]).contains(escape));
    assert!(on_terminal(at, "--help", &[]).contains(escape));
    for plain in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        // A machine that builds software sets CI, and some libraries then colour what they write.
        for environment in [&[plain][..], &[plain, ("CI", "true")]] {
            assert!(
                !on_terminal(at, "--help", environment).contains(escape),
                "{environment:?}"
            );
        }
    }

    let build = "build -f -o out raw";
    assert!(on_terminal(at, build, &[]).contains("building ["));
    for (line, environment) in [
        (build, &[("TERM", "dumb")][..]),
        ("build -q -f -o out raw", &[]),
        ("build --progress=never -f -o out raw", &[]),
    ] {
        assert_eq!(
            on_terminal(at, line, environment),
            "",
            "{line} {environment:?}"
        );
    }
    // A line of its own, not one in the bar's.
    let said = on_terminal(at, "build -v -f --base layer -o out raw", &[]);
    for line in said.lines().filter(|line| line.contains("DEBUG")) {
        let shown = line.rsplit('\r').find(|part| !part.is_empty()).unwrap();
        assert!(!shown.contains("building ["), "{said:?}");
    }
}
