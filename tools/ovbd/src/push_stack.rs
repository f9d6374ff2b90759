// SPDX-License-Identifier: GPL-2.0

//! Pushing a running stack: what was written to it becomes a layer, and the image is that of all its layers.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Args, ValueHint};
use ovbd_devices::{
    check_root,
    commit::{commit, Part, Request},
    mapped,
    running::Running,
    Interrupt,
};
use ovbd_layers::build::Options;
use ovbd_oci::{Error, Kind, Store, MAX_LAYERS};

use crate::{
    cli::UnknownStorage,
    commands::{commit::warn_of_config, push::Push},
    names::{self, StoreOption},
    place::Place,
    report::Report,
    watch::Watch,
};

/// How a running stack is pushed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Running stacks")]
pub struct StackOptions {
    /// Make this file of what was written to the running stack, which is put on it as "ovbd commit" does
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub layer: Option<PathBuf>,
    /// Keep what is written from now on in this file, which is made, as "ovbd commit --cow" does
    #[arg(long, value_name = "FILE", requires = "layer", value_hint = ValueHint::FilePath)]
    pub cow: Option<PathBuf>,
    /// Storage that does not tell where it is.
    #[command(flatten)]
    pub unknown: UnknownStorage,
}

impl StackOptions {
    /// Whether any of them is given.
    pub fn is_given(&self) -> bool {
        self.layer.is_some() || self.unknown.assume_elsewhere
    }
}

/// Commits the stack `name` to the layer `out`, and pushes the image of all its layers.
///
/// # Errors
///
/// Those of the commit, after which nothing has changed, and those of the registry, after which the layer is there and can
/// be pushed.
pub fn run(
    mut push: Push,
    name: &str,
    out: &Path,
    place: &Place,
    report: &Report,
) -> Result<ExitCode> {
    check_root()?;
    let interrupt = Interrupt::install()?;
    let running = Running::find(&mapped::open()?, name)?;
    let below = running.layer_files()?;
    // What the stack below is, is known by the root hash that it is checked against, and not by reading it anew.
    if let (true, None, Some(root)) = (push.seal, &push.old_root, running.root_hash()) {
        push.old_root = Some(root.to_owned());
    }
    let below = image_below(&push.store, &below)?;
    check_room_for_one(name, &below)?;
    report.begin("committing", 0);
    let cow = push.stack.cow.take();
    let request = Request {
        name,
        next: cow.as_deref(),
        part: Part::Whole,
        assume_elsewhere: push.stack.unknown.assume_elsewhere,
    };
    if commit(&request, out, &Options::default(), &interrupt, report)? {
        warn_of_config(name, out, report);
    }
    push.names = below.names;
    push.names.push(out.into());
    let _watch = Watch::begin(&interrupt, || ());
    push.push_names(place, report).with_context(|| {
        let words: Vec<_> = push
            .names
            .iter()
            .map(|name| name.to_string_lossy())
            .collect();
        format!(
            "{}: is complete; \"ovbd push {} {place}\" sends it",
            out.display(),
            words.join(" ")
        )
    })
}

/// Whether an image can have one layer more than a stack, whose layers are `below`.
///
/// # Errors
///
/// The stack has as many as there can be.
pub fn check_room_for_one(name: &str, below: &ImageBelow) -> Result<()> {
    let count = below.layers;
    if count < MAX_LAYERS {
        return Ok(());
    }
    let what = format!(
        "has {count} layers, and nobody reads an image of more than {MAX_LAYERS}: \"ovbd squash\" makes fewer of them"
    );
    Err(Error::new(Kind::Refused, name, what).into())
}

/// What the image of a running stack is made of.
pub struct ImageBelow {
    /// Its layers as words of a command line.
    pub names: Vec<OsString>,
    /// How many layers these mean.
    pub layers: usize,
}

/// What an image of the files of a running stack is made of, bottom first. The lowest are one word where they are an image of
/// the store, whose configuration the new one gets too. A squashed file stands for layers of it, as the stack may have come up
/// before there was one.
///
/// # Errors
///
/// Those of reading the store.
pub fn image_below(option: &StoreOption, files: &[PathBuf]) -> Result<ImageBelow> {
    let words = |from: usize| {
        files[from..]
            .iter()
            .map(|file| file.clone().into_os_string())
    };
    let mut best = ImageBelow {
        names: words(0).collect(),
        layers: files.len(),
    };
    let Ok(store) = option.open() else {
        return Ok(best);
    };
    let mut most = 0;
    for named in store.names()? {
        let Some(name) = named.name.map(OsString::from) else {
            continue;
        };
        // What cannot be read is not below a stack that runs.
        let Ok(Some(found)) = option.find(&name) else {
            continue;
        };
        let Ok(parts) = found.parts() else {
            continue;
        };
        let Some(count) = files_of(&parts, &store, files).filter(|count| *count > most) else {
            continue;
        };
        most = count;
        let own: usize = parts.iter().map(|part| part.layers.len()).sum();
        best = ImageBelow {
            names: std::iter::once(name).chain(words(count)).collect(),
            layers: own + files.len() - count,
        };
    }
    Ok(best)
}

/// How many of the files are all of an image, where the lowest ones are.
fn files_of(parts: &[names::Part], store: &Store, files: &[PathBuf]) -> Option<usize> {
    let mut at = 0;
    for part in parts {
        let squashed = part.run.as_ref().map(|run| store.squashed_path(run));
        let file = files.get(at)?;
        if squashed.is_some_and(|path| is_same_file(&path, file)) {
            at += 1;
            continue;
        }
        for layer in &part.layers {
            if !is_same_file(&store.blob_path(&layer.digest), files.get(at)?) {
                return None;
            }
            at += 1;
        }
    }
    Some(at)
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let id = |path| ovbd_layers::file_id::FileId::at(path).ok().flatten();
    id(one).is_some_and(|found| id(other) == Some(found))
}

#[cfg(test)]
mod tests {
    use ovbd_oci::{Descriptor, Digest};

    use super::*;

    #[test]
    fn squashed_files_stand_for_layers() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path()).unwrap();
        let layers: Vec<_> = (0..4).map(|n| Descriptor::of("layer", &[n])).collect();
        for (number, layer) in layers.iter().enumerate() {
            store.put(layer, &[number as u8]).unwrap();
        }
        let run = Digest::of(b"run");
        std::fs::write(store.begin_squashed(&run).unwrap(), "squashed").unwrap();
        store.keep_squashed(&run).unwrap();
        let part = |layers: &[Descriptor], run: Option<&Digest>| names::Part {
            layers: layers.to_vec(),
            run: run.cloned(),
        };
        let parts = [
            part(&layers[..1], None),
            part(&layers[1..3], Some(&run)),
            part(&layers[3..], None),
        ];
        let blob = |number: usize| store.blob_path(&layers[number].digest);
        let squashed = store.squashed_path(&run);
        let above = folder.path().join("index.json");
        for (files, wanted) in [
            (vec![blob(0), blob(1), blob(2), blob(3)], Some(4)),
            (vec![blob(0), squashed.clone(), blob(3)], Some(3)),
            (vec![blob(0), squashed.clone(), blob(3), above], Some(3)),
            (vec![blob(0), squashed.clone()], None),
            (vec![blob(0), blob(1), blob(3)], None),
            (vec![blob(0), squashed.clone(), blob(2), blob(3)], None),
            (vec![squashed, blob(3)], None),
            (vec![], None),
        ] {
            assert_eq!(files_of(&parts, &store, &files), wanted, "{files:?}");
        }
    }
}
