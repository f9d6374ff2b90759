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
use ovbd_oci::{Error, Kind, MAX_LAYERS};

use crate::{
    cli::UnknownStorage,
    commands::{commit::warn_of_config, push::Push},
    names::StoreOption,
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
    push.names = image_below(&push.store, &below)?;
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

/// Whether an image can have one layer more than a stack.
///
/// # Errors
///
/// The stack has as many as there can be.
pub fn check_room_for_one(name: &str, layers: &[PathBuf]) -> Result<()> {
    let count = layers.len();
    if count < MAX_LAYERS {
        return Ok(());
    }
    let what = format!(
        "has {count} layers, and nobody reads an image of more than {MAX_LAYERS}: \"ovbd squash\" makes fewer of them"
    );
    Err(Error::new(Kind::Refused, name, what).into())
}

/// The layers as words of a command line. The lowest are one word where they are an image of the store, whose
/// configuration the new one gets too.
///
/// # Errors
///
/// Those of reading the store.
pub fn image_below(option: &StoreOption, layers: &[PathBuf]) -> Result<Vec<OsString>> {
    let files = || layers.iter().map(|layer| layer.clone().into_os_string());
    let Ok(store) = option.open() else {
        return Ok(files().collect());
    };
    let mut best: Option<(OsString, usize)> = None;
    for named in store.names()? {
        let Some(name) = named.name.map(OsString::from) else {
            continue;
        };
        // What cannot be read is not below a stack that runs.
        let Ok(Some(found)) = option.find(&name) else {
            continue;
        };
        let Ok(own) = found.layers() else {
            continue;
        };
        let is_below = own.len() <= layers.len()
            && (own.iter().zip(layers)).all(|(own, layer)| is_same_file(own.data(), layer));
        if is_below && best.as_ref().is_none_or(|(_, count)| *count < own.len()) {
            best = Some((name, own.len()));
        }
    }
    Ok(match best {
        Some((name, count)) => std::iter::once(name).chain(files().skip(count)).collect(),
        None => files().collect(),
    })
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let id = |path| ovbd_layers::file_id::FileId::at(path).ok().flatten();
    id(one).is_some_and(|found| id(other) == Some(found))
}
