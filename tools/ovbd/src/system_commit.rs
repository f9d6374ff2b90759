// SPDX-License-Identifier: GPL-2.0

//! `ovbd system commit`: what was written to the system that runs becomes a layer of the store, and the image with it a
//! generation.
//!
//! The layer is in the store before the stack is put on it, so whatever is interrupted later, the stack runs on a file that
//! the store has, and the next commit goes on from there.

use std::{ffi::OsString, path::Path, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use ovbd_devices::{
    check_root,
    commit::{commit, Part, Request},
    mapped,
    running::Running,
    Interrupt,
};
use ovbd_layers::build::Options;
use ovbd_oci::{Digest, Error, Kind, Reference, Store};
use ovbd_system::{
    boot_folder::{BootFolder, Generation},
    choice,
};

use crate::{
    commands::{
        push::Push,
        system::{image, say, NewGeneration},
    },
    deploy::{deploy, Below},
    names::StoreOption,
    place::Place,
    policy::Rule,
    push_stack::{check_room_for_one, image_below},
    report::Report,
    seal_note,
    signing::SignOption,
    system_place::{command_line, entries, running, Changing},
    watch::Watch,
};

/// The stack with the root file system.
const ROOT: &str = "root";
/// What is made before it is a blob of the store.
const NEW: &str = "system.zfile";

/// Make a layer of what was written to the running system, an image with it, and a generation of that, which is the
/// default then
///
/// For a system that was booted with rw and without ovbd.cow=: what it writes is in memory, and would be lost. It is
/// committed as "ovbd commit" does, goes on running, and has its memory back.
#[derive(Debug, Args)]
pub struct Commit {
    /// Name of the running stack
    #[arg(long, value_name = "NAME", default_value = ROOT)]
    pub stack: String,
    /// Seal the image, as "ovbd push --seal" does
    #[arg(long)]
    pub seal: bool,
    /// With what the root hash is signed.
    #[command(flatten)]
    pub sign: SignOption,
    /// The generation.
    #[command(flatten)]
    pub new: NewGeneration,
}

impl Commit {
    /// Does it.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        check_root()?;
        let option = self.new.place.store();
        let interrupt = Interrupt::install()?;
        let boot = self.new.place.boot()?;
        let _changing = Changing::begin(&boot, &option.path(), &interrupt, report)?;
        let store = option.open()?;
        let below = self.below(&boot)?;
        self.check(&below)?;
        let names = self.commit(&option, &store, &interrupt, report)?;
        let mut push = Push::plain(option.clone())?;
        (push.seal, push.sign) = (self.seal, self.sign.clone());
        {
            let _watch = Watch::begin(&interrupt, || ());
            let place = Place::Layout {
                folder: store.path().display().to_string(),
                name: self.new.image.clone(),
                store,
            };
            let mut send = || -> Result<()> {
                push.names = names.clone();
                let mut image = push.image(&place, report)?;
                push.send(&place, &mut image, report).map(drop)
            };
            send().with_context(|| {
                let made = names.last().map(Path::new).unwrap_or(Path::new(""));
                format!(
                    "{}: is complete; another commit makes the image",
                    made.display()
                )
            })?;
        }
        let generation = image(&option, &self.new.image)
            .and_then(|found| deploy(&boot, &found, &below, &self.new.parts, &interrupt, report))
            .with_context(|| {
                format!(
                    "{0}: is in the store; \"ovbd system add {0}\" makes a generation of it",
                    self.new.image
                )
            })?;
        say(&boot, &generation, self.new.json, report)
    }

    /// The command line is that of the system that runs, if it is that which is committed.
    fn below(&self, boot: &BootFolder) -> Result<Below> {
        let generations = boot.generations()?;
        let line = command_line()?;
        let now = running(&line);
        let runs = |generation: &&Generation| self.stack == ROOT && now.is(generation);
        let of = generations.iter().find(runs);
        Below::of(of.or(choice::default(&generations)), &entries(boot))
    }

    /// Refuses before anything is committed what would be refused afterwards.
    fn check(&self, below: &Below) -> Result<()> {
        let name = &self.new.image;
        let fail = |what: String| Err(Error::new(Kind::Refused, name, what).into());
        let reference: Reference = name.parse()?;
        if reference.digest().is_some() {
            return fail("an image is called by a tag: its digest is what it will be".to_owned());
        }
        let cow = below.options.split_whitespace().rev();
        let cow = cow.filter_map(|word| word.strip_prefix("ovbd.cow=")).next();
        if let Some(cow) = cow.filter(|_| self.stack == ROOT) {
            return fail(format!(
                "the system keeps what it writes in {cow}, which the generation before needs as it is: \"ovbd push --layer \
                 FILE --cow STORE {ROOT} {name}\" makes the image, \"ovbd system add --append ovbd.cow=STORE\" the generation"
            ));
        }
        below.append(self.new.parts.append.as_deref(), name)?;
        match seal_note::rule(&reference)? {
            Rule::SignedBy(_) if !self.seal || self.sign.sign_key.is_none() => fail(
                "the policy wants a signature: --seal --sign-key KEY --certificate FILE".to_owned(),
            ),
            _ => Ok(()),
        }
    }

    /// Commits the stack, and returns what the image is made of, at last the new layer.
    fn commit(
        &self,
        option: &StoreOption,
        store: &Store,
        interrupt: &Interrupt,
        report: &Report,
    ) -> Result<Vec<OsString>> {
        let _guard = store.protect()?;
        let blob = |digest: Digest| store.blob_path(&digest).into_os_string();
        // Of a commit that was killed: the stack may be on it.
        store.take(NEW)?;
        let files = Running::find(&mapped::open()?, &self.stack)?.layer_files()?;
        let below = image_below(option, &files)?;
        check_room_for_one(&self.stack, &below)?;
        report.begin("committing", 0);
        let request = Request {
            name: &self.stack,
            next: None,
            part: Part::Whole,
            assume_elsewhere: false,
        };
        let options = Options {
            tar: true,
            ..Options::default()
        };
        let new = store.new_blob_path(NEW);
        commit(&request, &new, &options, interrupt, report)?;
        let mut names = below.names;
        names.extend(store.take(NEW)?.map(blob));
        Ok(names)
    }
}
