// SPDX-License-Identifier: GPL-2.0

//! `ovbd system`.

use std::{fmt::Write as _, path::Path, process::ExitCode};

use anyhow::Result;
use clap::{Args, Subcommand};
use ovbd_devices::Interrupt;
use ovbd_layers::{error::Error, parents::Parents, units};
use ovbd_oci::{Digest, Kind, Platform, Reference};
use ovbd_system::{
    boot_folder::{BootFolder, Generation},
    choice,
    entry::State,
};
use serde_json::{json, Value};

use crate::{
    commands::pull,
    deploy::{deploy, Below, Parts},
    names::{Found, StoreOption},
    remote::Transfer,
    report::Report,
    system_commit::Commit,
    system_place::{
        command_line, device_of, entries, is_mount_point, running, Changing, SystemPlace,
    },
};

/// Words of the first generation's command line. With panic= what fails in the initramfs or the kernel is tried again, and
/// so falls back in the end.
const FIRST_WORDS: &str = "root=/dev/mapper/root ro panic=30";

const EXAMPLES: &str = "Examples:

  ovbd system init --boot /mnt/efi --store /mnt/layers/lib/ovbd --append ovbd.state=LABEL=state reg.example/vm/root:mon
      the first generation of a new disk, of an image that was pulled into its store

  ovbd system update
      the newest image of the same name becomes the default; it boots next time

  ovbd system commit reg.example/vm/root:tuesday
      the system as it runs, changed by hand, becomes an image and the default

  ovbd system rollback
      the next boot takes what was the default before

  ovbd system prune --keep 3 && ovbd gc
      removes the others, but for those that must stay, and the files that nothing needs then";

/// Boot a machine from images: add one, boot it, roll back.
///
/// A generation is an image of the store with the kernel's command line that it boots with. It is an entry for the boot
/// loader, after the Boot Loader Specification, and its kernel and initrd are copied out of the image to the boot partition.
/// The image has a name with its digest in the store, so that "ovbd gc" keeps it. Of an image of many layers, runs of 16 are
/// squashed, each to one more file of the store, which is mapped in their place.
///
/// A new generation is the default at once, and has a few tries. The loader counts them down, and takes the generation before
/// when none is left; systemd-bless-boot takes the counter away once the system is up. See docs/system.rst.
///
/// Nothing of the running system changes. Interrupted at any moment, the machine boots what it booted before, or the new
/// generation, whole.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct System {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum Command {
    Init(Init),
    Add(Add),
    Commit(Commit),
    Update(Update),
    List(List),
    Status(Status),
    SetDefault(SetDefault),
    Rollback(Rollback),
    Prune(Prune),
}

/// What a generation of an image of the store is made of.
#[derive(Debug, Args)]
pub struct NewGeneration {
    /// What else it gets.
    #[command(flatten)]
    pub parts: Parts,
    /// Where.
    #[command(flatten)]
    pub place: SystemPlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The image
    #[arg(value_name = "IMAGE")]
    pub image: String,
}

/// Make the first generation, of an image that is in the store
#[derive(Debug, Args)]
pub struct Init {
    /// How the initramfs finds the file system with the store: /dev/..., UUID=, LABEL=, PARTUUID= or PARTLABEL= [default: the
    /// UUID of the one that it is on]
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,
    /// The generation.
    #[command(flatten)]
    pub new: NewGeneration,
}

/// Make a generation of an image that is in the store, which is the default then
#[derive(Debug, Args)]
pub struct Add {
    /// The generation.
    #[command(flatten)]
    pub new: NewGeneration,
}

/// Fetch an image, of which the store lacks layers, and make a generation of it, which is the default then
#[derive(Debug, Args)]
pub struct Update {
    /// What else it gets.
    #[command(flatten)]
    pub parts: Parts,
    /// Where.
    #[command(flatten)]
    pub place: SystemPlace,
    /// How to fetch.
    #[command(flatten)]
    pub transfer: Transfer,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The image [default: what the name of the default generation's image stands for by now]
    #[arg(value_name = "REF")]
    pub image: Option<Reference>,
}

/// List the generations, in the order in which the boot loader takes them
#[derive(Debug, Args)]
pub struct List {
    /// Where.
    #[command(flatten)]
    pub place: SystemPlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Say what runs, what the next boot takes, and what is missing; exit status 1 if something is
#[derive(Debug, Args)]
pub struct Status {
    /// Where.
    #[command(flatten)]
    pub place: SystemPlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Have the boot loader take a generation from now on
#[derive(Debug, Args)]
pub struct SetDefault {
    /// How often the boot loader may try one again that is bad
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=99))]
    pub tries: u32,
    /// Where.
    #[command(flatten)]
    pub place: SystemPlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Its number
    #[arg(value_name = "NUMBER")]
    pub number: u64,
}

/// Have the boot loader take the generation that was the default before; a second time it is the way back
#[derive(Debug, Args)]
pub struct Rollback {
    /// Where.
    #[command(flatten)]
    pub place: SystemPlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Remove generations: those named, or all but the newest. The running one, the default and the newest that has come up stay
#[derive(Debug, Args)]
pub struct Prune {
    /// Keep the first N of the list
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        conflicts_with = "numbers"
    )]
    pub keep: usize,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Where.
    #[command(flatten)]
    pub place: SystemPlace,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Their numbers
    #[arg(value_name = "NUMBER")]
    pub numbers: Vec<u64>,
}

fn device(text: &str) -> Result<String, String> {
    let known = ["/dev/", "UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="];
    let is_word = !text.contains(|c: char| c.is_whitespace() || c == ':');
    match is_word && known.iter().any(|prefix| text.starts_with(prefix)) {
        true => Ok(text.to_owned()),
        false => Err("not /dev/..., UUID=, LABEL=, PARTUUID= or PARTLABEL=".to_owned()),
    }
}

impl System {
    /// Whether the answer is to be JSON.
    pub fn wants_json(&self) -> bool {
        match &self.command {
            Command::Init(verb) => verb.new.json,
            Command::Add(verb) => verb.new.json,
            Command::Commit(verb) => verb.new.json,
            Command::Update(verb) => verb.json,
            Command::List(verb) => verb.json,
            Command::Status(verb) => verb.json,
            Command::SetDefault(verb) => verb.json,
            Command::Rollback(verb) => verb.json,
            Command::Prune(verb) => verb.json,
        }
    }

    /// Does it.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        match self.command {
            Command::Init(verb) => verb.run(report),
            Command::Add(verb) => verb.run(report),
            Command::Commit(verb) => verb.run(report),
            Command::Update(verb) => verb.run(report),
            Command::List(verb) => verb.run(report),
            Command::Status(verb) => verb.run(report),
            Command::SetDefault(verb) => verb.run(report),
            Command::Rollback(verb) => verb.run(report),
            Command::Prune(verb) => verb.run(report),
        }
    }
}

impl Init {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let new = &self.new;
        let store = new.place.store();
        let found = image(&store, &new.image)?;
        let device = match &self.device {
            Some(device) => device.clone(),
            None => device_of(&store.path())?,
        };
        let interrupt = Interrupt::install()?;
        let boot = BootFolder::create(&match &new.place.boot {
            Some(path) => path.clone(),
            None => new.place.boot_path()?,
        })?;
        let _changing = Changing::begin(&boot, &store.path(), &interrupt, report)?;
        if let Some(known) = boot.generations()?.first() {
            let what = format!(
                "has generation {} already: \"ovbd system add\" makes more of them",
                known.name.number
            );
            return Err(Error::new(&entries(&boot), what).into());
        }
        let below = Below {
            device,
            options: FIRST_WORDS.to_owned(),
            of_other: false,
        };
        let generation = deploy(&boot, &found, &below, &new.parts, &interrupt, report)?;
        boot.write_settings()?;
        let warn = |what: &str| report.warning(&Error::new(boot.path(), what).into());
        if !boot.is_preferred() {
            warn("loader/loader.conf has no \"default ovbd-*\": systemd-boot may take entries of others first");
        }
        if !is_mount_point(boot.path()) {
            warn("is no mount point: entries have paths from the top of the boot partition on, which it must become");
        }
        say(&boot, &generation, new.json, report)
    }
}

impl Add {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let new = &self.new;
        let store = new.place.store();
        let found = image(&store, &new.image)?;
        let interrupt = Interrupt::install()?;
        let boot = new.place.boot()?;
        let _changing = Changing::begin(&boot, &store.path(), &interrupt, report)?;
        let below = Below::of(choice::default(&boot.generations()?), &entries(&boot))?;
        let generation = deploy(&boot, &found, &below, &new.parts, &interrupt, report)?;
        say(&boot, &generation, new.json, report)
    }
}

impl Update {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let option = self.place.store();
        let interrupt = Interrupt::install()?;
        let boot = self.place.boot()?;
        // First, so that nothing is fetched where nothing can be added.
        let _changing = Changing::begin(&boot, &option.path(), &interrupt, report)?;
        let generations = boot.generations()?;
        let default = choice::default(&generations);
        let below = Below::of(default, &entries(&boot))?;
        let old = default.and_then(image_name).unwrap_or_default();
        let reference = match &self.image {
            Some(reference) => reference.clone(),
            None => newest(old)?,
        };
        let store = option.create()?;
        let _guard = store.protect()?;
        {
            // What was fetched stays, for the next time.
            let _watch = crate::watch::Watch::begin(&interrupt, || ());
            let platform = Platform::here();
            pull::fetch(
                &reference,
                &store,
                &self.transfer,
                &platform,
                u64::MAX,
                Parents::All,
                report,
            )?;
        }
        let found = image(&option, &reference.to_string())?;
        let digest = found.image()?.descriptor.digest;
        if let Some(default) = default.filter(|_| digest_of(old) == Some(digest)) {
            if self.parts.append.is_none() {
                let number = default.name.number;
                report.note(format_args!(
                    "{reference} is generation {number}, which is the default: nothing to do"
                ));
                return say(&boot, default, self.json, report);
            }
        }
        let generation = deploy(&boot, &found, &below, &self.parts, &interrupt, report)?;
        say(&boot, &generation, self.json, report)
    }
}

/// The name that an image was pulled by, without its digest.
fn newest(image: &str) -> Result<Reference> {
    let reference: Reference = image.parse()?;
    match reference.tag() {
        Some(tag) => Ok(reference.with_tag(tag)?),
        None => {
            let what = "was pulled by its digest, which stands for nothing newer: name a REF";
            Err(ovbd_oci::Error::new(Kind::Refused, image, what).into())
        }
    }
}

/// The image of a name in the store.
pub fn image(store: &StoreOption, name: &str) -> Result<Found> {
    let opened = store.open()?;
    let named = opened.find(Some(name))?;
    Ok(Found {
        store: opened,
        named,
        takes_squashed: true,
    })
}

/// The image of a generation, as the store calls it.
fn image_name(generation: &Generation) -> Option<&str> {
    generation.text.stack().map(|(_, image)| image)
}

fn digest_of(image: &str) -> Option<Digest> {
    image.parse::<Reference>().ok()?.digest().cloned()
}

impl List {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let boot = self.place.boot()?;
        let generations = boot.generations()?;
        let order = choice::boot_order(&generations);
        if self.json {
            let list = order
                .iter()
                .map(|generation| as_json(&boot, &generations, generation))
                .collect::<Result<Vec<_>>>()?;
            return report.print(&(serde_json::to_string_pretty(&list)? + "\n"));
        }
        let line = command_line()?;
        let mut text = String::new();
        for generation in order {
            let number = generation.name.number;
            let version = generation.text.version.as_deref().unwrap_or("-");
            let image = image_name(generation).unwrap_or("-");
            let short = match image.split_once('@') {
                Some((name, _)) => {
                    let digest = digest_of(image);
                    let digest = digest.as_ref().map(Digest::short).unwrap_or_default();
                    format!("{name}  {digest}")
                }
                None => image.to_owned(),
            };
            let mut words = vec![generation.state().to_string()];
            if choice::default(&generations) == Some(generation) {
                words.push("default".to_owned());
            }
            if running(&line).is(generation) {
                words.push("running".to_owned());
            }
            // Whoever wrote the entries may have written anything.
            let line = format!("{number:3}  {short}  {version}  {}", words.join(", "));
            writeln!(text, "{}", ovbd_layers::error::escaped(&line))?;
        }
        report.print(&text)
    }
}

/// What programs read of a generation.
fn as_json(boot: &BootFolder, all: &[Generation], generation: &Generation) -> Result<Value> {
    let line = command_line()?;
    let image = image_name(generation);
    let (state, tries) = match generation.state() {
        State::Good => ("good", None),
        State::Trying(tries) => ("trying", Some(tries)),
        State::Bad(tries) => ("bad", Some(tries)),
    };
    let text = &generation.text;
    Ok(json!({
        "number": generation.name.number, "image": image, "digest": image.and_then(digest_of), "state": state,
        "tries_left": tries.map(|tries| tries.left), "tries_done": tries.map(|tries| tries.done),
        "default": choice::default(all).is_some_and(|default| default.name.number == generation.name.number),
        "running": running(&line).is(generation), "kernel": text.version, "linux": text.linux, "initrd": text.initrd,
        "options": text.options, "entry": boot.entry_path(generation).to_string_lossy(),
    }))
}

/// Prints what a verb has changed.
pub fn say(
    boot: &BootFolder,
    generation: &Generation,
    json: bool,
    report: &Report,
) -> Result<ExitCode> {
    let text = match json {
        true => {
            let all = boot.generations()?;
            serde_json::to_string_pretty(&as_json(boot, &all, generation)?)?
        }
        false => {
            let (number, state) = (generation.name.number, generation.state());
            let image = image_name(generation).unwrap_or("-");
            format!("generation {number}: {image}, the default, {state}")
        }
    };
    report.print(&(text + "\n"))
}

/// What a generation needs and what is not there.
fn missing(boot: &BootFolder, store: &StoreOption, generation: &Generation) -> Vec<String> {
    let number = generation.name.number;
    let files = boot.missing(generation).into_iter();
    let mut missing: Vec<String> = files
        .map(|path| format!("generation {number}: {} is missing", path.display()))
        .collect();
    let layers = match image_name(generation) {
        None => Err(anyhow::anyhow!("its command line has no ovbd=DEVICE:IMAGE")),
        Some(name) => image(store, name).and_then(|found| found.layers()),
    };
    if let Err(error) = layers {
        missing.push(format!("generation {number}: {error}"));
    }
    missing
}

impl Status {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let (boot, store) = (self.place.boot()?, self.place.store());
        let generations = boot.generations()?;
        let line = command_line()?;
        let now = running(&line);
        let runs = generations.iter().find(|generation| now.is(generation));
        let default = choice::default(&generations);
        let next = choice::before_default(&generations);
        let good = choice::last_good(&generations);
        let problems: Vec<String> = generations
            .iter()
            .flat_map(|generation| missing(&boot, &store, generation))
            .collect();
        let number = |one: Option<&Generation>| one.map(|one| one.name.number);
        let text = match self.json {
            true => {
                let answer = json!({
                    "running": number(runs), "default": number(default), "fallback": number(next), "last_good": number(good),
                    "boot": boot.path().to_string_lossy(), "store": store.path().to_string_lossy(),
                    "problems": problems,
                });
                serde_json::to_string_pretty(&answer)? + "\n"
            }
            false => {
                let show = |one: Option<&Generation>| match one {
                    None => "none".to_owned(),
                    Some(one) => {
                        let image = image_name(one).unwrap_or("-");
                        format!("{}  {image}  {}", one.name.number, one.state())
                    }
                };
                let mut text = String::new();
                for (what, one) in [
                    ("running", runs),
                    ("next boot", default),
                    ("else", next),
                    ("newest good", good),
                ] {
                    writeln!(
                        text,
                        "{what:12}  {}",
                        ovbd_layers::error::escaped(&show(one))
                    )?;
                }
                let space = |path: &Path| {
                    let space = rustix::fs::statvfs(path);
                    space.map_or(String::new(), |space| {
                        let free = space.f_bavail.saturating_mul(space.f_frsize);
                        format!(", {} free", units::size(free))
                    })
                };
                for (what, path) in [("boot", boot.path()), ("store", &store.path())] {
                    writeln!(text, "{what:12}  {}{}", path.display(), space(path))?;
                }
                text
            }
        };
        report.answer(&text)?;
        if !self.json {
            for problem in &problems {
                report.error(&anyhow::anyhow!("{problem}"));
            }
        }
        Ok(match problems.is_empty() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

/// Makes a generation the default, if all is there that it needs.
fn make_default(
    boot: &BootFolder,
    store: &StoreOption,
    generation: &Generation,
    tries: u32,
) -> Result<Generation> {
    if let Some(what) = missing(boot, store, generation).into_iter().next() {
        return Err(Error::new(&boot.entry_path(generation), what).into());
    }
    Ok(boot.make_default(generation, tries)?)
}

impl SetDefault {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let (boot, store) = (self.place.boot()?, self.place.store());
        let interrupt = Interrupt::install()?;
        let _changing = Changing::begin(&boot, Path::new(""), &interrupt, report)?;
        let generation = boot.find(self.number)?;
        let generations = boot.generations()?;
        let is_default = choice::default(&generations) == Some(&generation);
        let is_bad = matches!(generation.state(), State::Bad(_));
        // Its name stays, by which systemd-bless-boot knows it.
        let chosen = match is_default && !is_bad {
            true => generation,
            false => make_default(&boot, &store, &generation, self.tries)?,
        };
        say(&boot, &chosen, self.json, report)
    }
}

impl Rollback {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let (boot, store) = (self.place.boot()?, self.place.store());
        let interrupt = Interrupt::install()?;
        let _changing = Changing::begin(&boot, Path::new(""), &interrupt, report)?;
        let generations = boot.generations()?;
        let Some(before) = choice::before_default(&generations) else {
            let what = "no other generation that could be booted";
            return Err(Error::new(&entries(&boot), what).into());
        };
        let chosen = make_default(&boot, &store, before, 0)?;
        say(&boot, &chosen, self.json, report)
    }
}

impl Prune {
    fn run(self, report: &Report) -> Result<ExitCode> {
        let (boot, option) = (self.place.boot()?, self.place.store());
        let interrupt = Interrupt::install()?;
        let _changing = match self.dry_run {
            true => None,
            false => Some(Changing::begin(&boot, &option.path(), &interrupt, report)?),
        };
        let generations = boot.generations()?;
        let line = command_line()?;
        let now = running(&line);
        let mut chosen = Vec::new();
        for number in &self.numbers {
            let known = generations.iter().find(|one| one.name.number == *number);
            let Some(known) = known else {
                return Err(boot.find(*number).map(drop).unwrap_err().into());
            };
            if let Some(why) = choice::why_kept(&generations, known, now) {
                let what = format!("generation {number} stays: {why}");
                return Err(Error::new(&boot.entry_path(known), what).into());
            }
            chosen.push(known);
        }
        if self.numbers.is_empty() {
            chosen = choice::superfluous(&generations, self.keep, now);
        }
        let store = option.open()?;
        let mut removed = Vec::new();
        for generation in chosen {
            if !self.dry_run {
                boot.remove(generation)?;
                remove_name(&boot, &store, generation)?;
            }
            removed.push(generation);
        }
        if self.json {
            let numbers: Vec<u64> = removed.iter().map(|one| one.name.number).collect();
            let answer = json!({"removed": !self.dry_run, "generations": numbers});
            return report.print(&(serde_json::to_string_pretty(&answer)? + "\n"));
        }
        let mut text = String::new();
        for generation in removed {
            let image = image_name(generation).unwrap_or("-");
            let verb = if self.dry_run {
                "would be removed"
            } else {
                "removed"
            };
            writeln!(
                text,
                "generation {}: {image} {verb}",
                generation.name.number
            )?;
        }
        report.print(&text)
    }
}

/// Takes the name away that an image has as a generation, when none has it any more. Other names of it stay.
fn remove_name(boot: &BootFolder, store: &ovbd_oci::Store, generation: &Generation) -> Result<()> {
    let Some(name) = image_name(generation) else {
        return Ok(());
    };
    let left = boot.generations()?;
    let used = left.iter().any(|other| image_name(other) == Some(name));
    if !used && digest_of(name).is_some() {
        store.remove_name(name)?;
    }
    Ok(())
}
