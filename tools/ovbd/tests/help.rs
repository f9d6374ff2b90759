// SPDX-License-Identifier: GPL-2.0

//! What the sources say about verbs and options reaches the help and the man pages, and wrong usage shows the usage.

mod run;

use std::{fs, path::Path, process::Command};

use clap::CommandFactory;
use ovbd::cli::Cli;
use run::{bad, good, OVBD};
use tempfile::tempdir;

/// The comment on the structure in `file` that has the options: its paragraphs, each in one line.
fn comment(file: &Path) -> Vec<String> {
    let source = fs::read_to_string(file).unwrap();
    let (before, _) = source
        .split_once("#[derive(Debug, Parser)]")
        .or_else(|| source.split_once("#[derive(Debug, Args)]"))
        .unwrap();
    let mut lines: Vec<&str> = before
        .lines()
        .rev()
        .map_while(|line| line.strip_prefix("///"))
        .collect();
    lines.reverse();
    lines
        .split(|line| line.is_empty())
        .map(|lines| plain(&lines.join(" ")))
        .collect()
}

/// Without what the formatters add or take away: breaks, full stops at the end, and roff's escapes.
fn plain(text: &str) -> String {
    let text = text.replace("\\*(Aq", "'").replace(['\\', '.'], "");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn sources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
}

#[test]
fn texts_are_in_help_and_man_pages() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let example = Path::new(OVBD).with_file_name("examples").join("man");
    let status = Command::new(&example).arg(at.join("man")).status();
    assert!(status.expect("cargo test builds the example").success());

    let mut pages = vec![(
        sources().join("cli.rs"),
        "--help".to_owned(),
        "ovbd.8".to_owned(),
    )];
    for verb in Cli::command().get_subcommands() {
        let name = verb.get_name();
        pages.push((
            sources().join(format!("commands/{}.rs", name.replace('-', "_"))),
            format!("{name} --help"),
            format!("ovbd-{name}.8"),
        ));
    }
    let mut long = 0;
    for (source, line, page) in pages {
        let paragraphs = comment(&source);
        assert!(!paragraphs.is_empty(), "{}", source.display());
        long += usize::from(paragraphs.len() > 1);
        let help = plain(&good(at, &line));
        let page = plain(&fs::read_to_string(at.join("man").join(page)).unwrap());
        for paragraph in paragraphs {
            assert!(help.contains(&paragraph), "{line}: {paragraph}\n{help}");
            assert!(
                page.contains(&paragraph),
                "man page, {line}: {paragraph}\n{page}"
            );
        }
    }
    // The command, and at least those verbs that change something.
    assert!(long >= 6, "{long} texts of more than one paragraph");
    for shell in ["ovbd.bash", "_ovbd", "ovbd.fish"] {
        assert!(at.join("man").join(shell).exists(), "{shell}");
    }
}

#[test]
fn verbs_about_images_elsewhere_have_examples_that_parse() {
    let verbs = [
        "push", "pull", "images", "inspect", "tag", "rmi", "gc", "fsck", "login", "logout", "lvm",
        "system",
    ];
    let folder = tempdir().unwrap();
    for verb in verbs {
        let help = good(folder.path(), &format!("{verb} --help"));
        let (_, examples) = help.split_once("Examples:").unwrap();
        let lines: Vec<&str> = examples
            .lines()
            .filter_map(|line| line.trim().strip_prefix("ovbd "))
            .collect();
        assert!(!lines.is_empty(), "{verb}");
        for line in lines {
            assert!(line.starts_with(verb), "{verb}: {line}");
            // What follows is for the shell.
            let line = line.split([';', '|', '&', '<']).next().unwrap();
            let words = line.split_whitespace().map(|word| word.trim_matches('\''));
            let parsed = Cli::command().try_get_matches_from(["ovbd"].into_iter().chain(words));
            assert!(parsed.is_ok(), "{line}: {parsed:?}");
        }
    }
}

#[test]
fn every_option_says_what_it_does() {
    for verb in Cli::command().get_subcommands() {
        for argument in verb.get_arguments() {
            let name = format!("{} {}", verb.get_name(), argument.get_id());
            let help = argument.get_help().map(ToString::to_string);
            assert!(help.is_some_and(|text| text.len() > 5), "{name}");
        }
    }
}

#[test]
fn wrong_options_show_the_usage_of_the_verb() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    for (line, verb, reason) in [
        ("build -o out", "build", "<RAW>"),
        ("build --colour -o out raw", "build", "'--colour'"),
        (
            "build --block-size 4q -o out raw",
            "build",
            "\"4q\" is no size",
        ),
        ("build --block-size 12288 -o out raw", "build", "12288"),
        ("build --level 40 -o out raw", "build", "levels 0 to 12"),
        (
            "build --format lsmt --algo zstd -o out raw",
            "build",
            "--algo",
        ),
        (
            "build --format lsmt --block-size 4k -o out raw",
            "build",
            "--block-size",
        ),
        ("build --format tar -o out raw", "build", "lsmt"),
        ("build --base one -o out", "build", "RAW is missing"),
        ("build -j 0 -o out raw", "build", "0 is not in 1..=1024"),
        ("export layer", "export", "--output"),
        ("info --map=png layer", "info", "png"),
        ("up --cow file a layer", "up", "--writable"),
        ("up --writable --size x a layer", "up", "\"x\" is no size"),
        (
            "-q up --writable --size x a layer",
            "up",
            "\"x\" is no size",
        ),
        ("verify --progress=sometimes layer", "verify", "sometimes"),
        ("commit -q -v -o out a", "commit", "--verbose"),
    ] {
        let error = bad(at, line, 2);
        assert!(
            error.contains(&format!("Usage: ovbd {verb} ")),
            "{line}: {error}"
        );
        assert!(
            error.starts_with("error: ") && error.contains(reason),
            "{line}: {error}"
        );
        assert_eq!(error.matches("Usage:").count(), 1, "{line}: {error}");
    }
    for line in ["frobnicate", "--frobnicate"] {
        assert!(
            bad(at, line, 2).contains("Usage: ovbd [OPTIONS] <COMMAND>"),
            "{line}"
        );
    }
    assert_eq!(fs::read_dir(at).unwrap().count(), 0);
}

#[test]
fn sizes_have_units() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    fs::write(at.join("raw"), vec![7; 1 << 20]).unwrap();
    for (size, bytes) in [
        ("4k", 4096),
        ("4K", 4096),
        ("4KiB", 4096),
        ("8192", 8192),
        ("64k", 65536),
        ("512B", 512),
    ] {
        good(at, &format!("build -f --block-size {size} -o layer raw"));
        let info: serde_json::Value = serde_json::from_str(&good(at, "info --json layer")).unwrap();
        assert_eq!(info["layers"][0]["zfile"]["block_bytes"], bytes, "{size}");
    }
    for size in ["4kB", "4MB", "3", "0"] {
        bad(at, &format!("build -f --block-size {size} -o layer raw"), 2);
    }
    // In whole chunks of 4096 bytes.
    let sized = |size| {
        good(
            at,
            &format!("up --dry-run --writable --size {size} a layer"),
        )
    };
    assert!(sized("500MB").contains("truncate -s 500002816 "));
    assert!(sized("500M").contains(&format!("truncate -s {} ", 500 << 20)));
    assert!(sized("1.5G").contains(&format!("truncate -s {} ", 3 << 29)));
}
