// SPDX-License-Identifier: GPL-2.0

//! What `--json` prints is what docs/json.md says.

#[path = "../../layers/tests/common/mod.rs"]
mod common;
mod run;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use common::raw_image;
use run::good;
use serde_json::Value;
use tempfile::tempdir;

/// The keys of a section of the document, with their types.
fn documented(heading: &str) -> BTreeMap<String, BTreeSet<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).unwrap();
    let lines = section.lines().take_while(|line| !line.starts_with("## "));
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let key = cells.next()?.strip_suffix('`')?.to_owned();
        let types = cells.next()?.split(", ").map(str::to_owned).collect();
        Some((key, types))
    };
    lines.filter_map(row).collect()
}

/// Adds the keys of a value, with the types that they have there.
fn collect(at: &str, value: &Value, found: &mut BTreeMap<String, BTreeSet<String>>) {
    let name = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if !at.is_empty() && !at.ends_with("[]") {
        let key = if name == "array" {
            format!("{at}[]")
        } else {
            at.to_owned()
        };
        found.entry(key).or_default().insert(name.to_owned());
    }
    match value {
        Value::Array(values) => {
            for value in values {
                collect(&format!("{at}[]"), value, found);
            }
        }
        Value::Object(values) => {
            for (key, value) in values {
                let dot = if at.is_empty() { "" } else { "." };
                collect(&format!("{at}{dot}{key}"), value, found);
            }
        }
        _ => {}
    }
}

fn printed(texts: &[String]) -> BTreeMap<String, BTreeSet<String>> {
    let mut found = BTreeMap::new();
    for text in texts {
        collect("", &serde_json::from_str(text).unwrap(), &mut found);
    }
    found
}

#[test]
fn the_keys_of_info() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 1);
    good(at, "build --format lsmt -o one raw");
    common::change(&at.join("raw"), 2);
    good(at, "build --base one --tar -o two raw");
    good(at, "build --raw -o three raw");
    good(at, "build --dax -o memory raw");
    let infos = ["info --json one two", "info --json memory"];
    let stack = printed(&infos.map(|words| good(at, words)));
    assert_eq!(stack, {
        let mut wanted = documented("`ovbd info --json LAYER...`");
        // Each layer of the test has one, as each that ovbd makes.
        wanted.get_mut("layers[].uuid").unwrap().remove("null");
        // None is over a tar.
        let mut remove = |key, kind| wanted.get_mut(key).unwrap().remove(kind);
        remove("layers[].original_tar_bytes", "number");
        wanted
    });

    let mut wanted = documented("`ovbd info --json FILE`");
    for (key, types) in documented("`ovbd info --json LAYER...`") {
        if let Some(key) = key.strip_prefix("layers[].zfile.") {
            wanted.insert(format!("zfile.{key}"), types);
        }
    }
    assert_eq!(printed(&[good(at, "info --json three")]), wanted);
}

#[test]
fn the_keys_of_squash_and_rebase() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 1);
    good(at, "build -o one raw");
    common::change(&at.join("raw"), 2);
    good(at, "build --base one -o two raw");
    let squashed = good(at, "squash --json one two -o three");
    assert_eq!(
        printed(&[squashed]),
        documented("`ovbd squash --json LAYER... -o OUT`")
    );
    let rebased = good(at, "rebase --json two --from one --to one -o four");
    assert_eq!(
        printed(&[rebased]),
        documented("`ovbd rebase --json LAYER --from STACK --to STACK -o OUT`")
    );
}
