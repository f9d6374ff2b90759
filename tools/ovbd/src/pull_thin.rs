// SPDX-License-Identifier: GPL-2.0

//! Pulling an image into a thin pool: a snapshot of what is there already of it, and only the rest is fetched and written.

use std::{fmt, fs::File, path::Path, process::ExitCode, str::FromStr};

use anyhow::{Context as _, Result};
use ovbd_devices::{check_root, Interrupt};
use ovbd_layers::{
    apply::{apply, needed, Target},
    layer::{Layer, LayerPath},
    parents,
    stack::Stack,
    units,
};
use ovbd_lvm::{
    difference,
    pool::{self, Turn},
    program,
    snapshot::{self, Made},
    tags,
    undo::{self, Undo},
    Name, Volume, Volumes,
};
use ovbd_oci::{Digest, Error, Image, Kind, LayerKind, Platform, Reference, Registry, Store};
use serde_json::json;

use crate::{
    commands::{
        images::layer_count,
        pull::{fetch, named_image, Pull},
    },
    documents::{chain, content_of},
    layer_files::fetch_layers,
    names::{block_layers, split_layout},
    policy::{Rule, PATH},
    pulled_volume,
    report::Report,
    seal_note::rule,
    watch::Watch,
};

/// Digits of the manifest's digest in the name of a volume.
const DIGITS: usize = 12;

/// Where an image is pulled from.
#[derive(Clone, Debug)]
pub enum ImageSource {
    /// A registry.
    Registry(Reference),
    /// A layout `oci:DIR[:NAME]`.
    Layout(String),
}

impl ImageSource {
    /// Where its layers are, or are fetched to: the layout itself, or the store.
    ///
    /// # Errors
    ///
    /// It cannot be opened.
    pub fn open_store(&self, pull: &Pull) -> Result<Store> {
        match self {
            ImageSource::Layout(layout) => Ok(Store::open(Path::new(split_layout(layout).0))?),
            ImageSource::Registry(_) => pull.open_store(),
        }
    }

    /// What is fetched from, if it is a registry.
    pub fn reference(&self) -> Option<&Reference> {
        match self {
            ImageSource::Registry(reference) => Some(reference),
            ImageSource::Layout(_) => None,
        }
    }
}

impl FromStr for ImageSource {
    type Err = ovbd_oci::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("oci:") {
            Some(rest) => Ok(ImageSource::Layout(rest.to_owned())),
            None => text.parse().map(ImageSource::Registry),
        }
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageSource::Registry(reference) => reference.fmt(f),
            ImageSource::Layout(layout) => write!(f, "oci:{layout}"),
        }
    }
}

/// `VG/POOL[/NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinTarget {
    /// The pool.
    pub pool: Name,
    /// Name of the writable volume.
    pub name: Option<String>,
}

impl FromStr for ThinTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.strip_prefix("/dev/").unwrap_or(text);
        let (pool, name) = match text.match_indices('/').nth(1) {
            Some((at, _)) => (&text[..at], Some(&text[at + 1..])),
            None => (text, None),
        };
        let pool = pool
            .parse()
            .map_err(|_| "not a thin pool, VG/POOL[/NAME]")?;
        if name.is_some_and(|name| !ovbd_lvm::volume::is_name(name)) {
            return Err("LVM allows no such name".to_owned());
        }
        Ok(Self {
            pool,
            name: name.map(str::to_owned),
        })
    }
}

/// An image, and what is known of it before its layers are there.
pub struct Known {
    /// The image.
    pub image: Image,
    /// Identity of the content of its first layers, from one to all.
    pub chains: Vec<Digest>,
    /// Registry and repository, or layout.
    pub repo: String,
    /// Tag there.
    pub tag: Option<String>,
    /// The last part of its name.
    pub short: String,
}

/// Pulls `from` into `target`.
///
/// # Errors
///
/// A pool that has no room or cannot be written to, volumes in the way, those of the registry and of LVM. Nothing is left
/// behind then but layers in the store.
pub fn run(
    pull: &Pull,
    from: &ImageSource,
    target: &ThinTarget,
    report: &Report,
) -> Result<ExitCode> {
    check_root()?;
    let interrupt = Interrupt::install()?;
    for said in undo::recover(report)?.done {
        report.note(said);
    }
    let undo = Undo::begin()?;
    let store = from.open_store(pull)?;
    // Nobody sweeps what is to be written.
    let _guard = store.protect()?;
    let known = look(pull, from, &store)?;
    let subject = from.to_string();
    let named = named_image(from.reference(), &subject, &known.image.manifest);
    if matches!(named.rule()?, Rule::SignedBy(_)) {
        let what = format!(
            "must be signed, by {PATH}, and what is written to a thin volume is not checked against the root hash: \
             pull it without --thin"
        );
        return Err(Error::new(Kind::Refused, &subject, what).into());
    }
    let name = target.name.clone().unwrap_or(known.short.clone());
    let name = target.pool.sibling(name);
    let digits = &known.image.descriptor.digest.hex()[..DIGITS];
    let whole = name.sibling(format!("{}.{digits}", name.lv));
    let part = pulled_volume::part_of(&whole);
    for name in [&name, &whole, &part] {
        if !ovbd_lvm::volume::is_name(&name.lv) {
            return Err(name
                .error("LVM allows no such name (--thin VG/POOL/NAME gives another)")
                .into());
        }
    }
    let _turn = Turn::wait(&whole, &interrupt, report)?;
    let volumes = Volumes::of_group(&name.vg)?;
    let pool = volumes.get(&target.pool)?;
    if !pool.is_pool() {
        return Err(pool.name.error("is not a thin pool").into());
    }
    if !pool.zeroes {
        let what = format!(
            "does not zero new chunks (-Zn): beside the image, what other volumes held would be in them (\"lvchange \
             --zero y {}\" changes that)",
            pool.name
        );
        return Err(pool.name.error(what).into());
    }
    // If it is not active, making the volume activates it.
    let status = pool::status(&pool::target(pool))?;
    if let Some(why) = status.as_ref().and_then(pool::defect) {
        let what = format!("{why} (lvconvert --repair {} mends it)", pool.name);
        return Err(pool.name.error(what).into());
    }
    let work = Work {
        pull,
        from,
        store: &store,
        known: &known,
        pool,
        undo: &undo,
        interrupt: &interrupt,
        report,
    };
    let written = match find_image(&volumes, &whole, &known)? {
        true => None,
        false => Some(work.make(&volumes, &whole, &part)?),
    };
    let writable = match Volumes::of_group(&name.vg)?.find(&name) {
        Some(_) => {
            report.note(format_args!(
                "{name} exists and stays as it is (\"lvcreate --snapshot --setactivationskip n --name NAME {whole}\" \
                 makes another writable volume)"
            ));
            false
        }
        None => {
            snapshot::writable(&whole, &name)?;
            true
        }
    };
    let digest = &known.image.descriptor.digest;
    let answer = match pull.json {
        true => {
            let written = written.unwrap_or_default();
            format!(
                "{}\n",
                json!({
                    "name": from.to_string(), "digest": digest, "layers": known.image.manifest.layers.len(),
                    "volume": whole.to_string(), "writable": writable.then(|| name.to_string()),
                    "base": written.base, "written": written.written, "discarded": written.discarded,
                    "fetched": written.fetched,
                })
            )
        }
        false => {
            let line = match &written {
                None => format!("{whole}: was there already (read-only)\n"),
                Some(written) => format!(
                    "{whole}: {} written, {} discarded (read-only)\n",
                    units::size(written.written),
                    units::size(written.discarded)
                ),
            };
            match writable {
                true => format!("{line}{name}: thin snapshot of it, writable\n"),
                false => line,
            }
        }
    };
    report.print(&answer)
}

impl Known {
    /// The tags of a volume that is this image, and one more, as far as LVM takes them.
    pub fn tags(&self, more: Option<(&'static str, String)>) -> Vec<(&'static str, String)> {
        let mut new = vec![(tags::MANIFEST, self.image.descriptor.digest.to_string())];
        let chain = self.chains.last();
        new.extend(chain.map(|chain| (tags::CHAIN, chain.to_string())));
        // Where it came from is for people, and for the next push.
        new.push((tags::REPO, self.repo.clone()));
        new.extend(self.tag.clone().map(|tag| (tags::TAG, tag)));
        new.extend(more);
        new.retain(|(_, value)| tags::is_allowed(value));
        new
    }
}

/// Looks at an image, of which nothing but its documents is fetched.
///
/// # Errors
///
/// Those of the registry or layout, and an image that is none of block layers.
pub fn look(pull: &Pull, from: &ImageSource, store: &Store) -> Result<Known> {
    let platform = pull.platform.clone().unwrap_or_else(Platform::here);
    let (image, repo, tag, short) = match from {
        ImageSource::Registry(reference) => {
            rule(reference)?;
            let registry = Registry::to_pull(reference, pull.transfer.options());
            let short = reference.repository().rsplit('/').next().unwrap_or("image");
            (
                registry.image(&platform)?,
                reference.name(),
                reference.tag().map(str::to_owned),
                short.to_owned(),
            )
        }
        ImageSource::Layout(layout) => {
            let (folder, name) = split_layout(layout);
            let named = store.find(name)?;
            let folder =
                std::fs::canonicalize(folder).with_context(|| format!("{folder}: cannot find"))?;
            let short = folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            (
                store.image(&named.descriptor, &platform)?,
                format!("oci:{}", folder.display()),
                named.name,
                short,
            )
        }
    };
    let subject = from.to_string();
    named_image(from.reference(), &subject, &image.manifest).check()?;
    let layers = block_layers(&image, &subject)?;
    let chains = (1..=layers.len())
        .filter_map(|count| chain(layers[..count].iter().cloned().map(content_of)))
        .collect();
    Ok(Known {
        chains,
        image,
        repo,
        tag,
        short,
    })
}

/// Whether the image is there under its name. What an earlier pull has left of it is put in order.
fn find_image(volumes: &Volumes, whole: &Name, known: &Known) -> Result<bool> {
    let chain = known.chains.last().map(ToString::to_string);
    let found = pulled_volume::find(volumes, whole, "the image", |volume| {
        snapshot::is_unchanged(volume) && volume.tags.get(tags::CHAIN) == chain.as_deref()
    });
    Ok(found?)
}

/// What a pull did.
#[derive(Default)]
struct Written {
    base: Option<String>,
    written: u64,
    discarded: u64,
    fetched: u64,
}

/// One pull.
struct Work<'a> {
    pull: &'a Pull,
    from: &'a ImageSource,
    store: &'a Store,
    known: &'a Known,
    pool: &'a Volume,
    undo: &'a Undo,
    interrupt: &'a Interrupt,
    report: &'a Report,
}

impl Work<'_> {
    /// Makes the read-only volume of the image.
    fn make(&self, volumes: &Volumes, whole: &Name, part: &Name) -> Result<Written> {
        let ancestor = self.ancestor(volumes);
        let kept = ancestor.as_ref().map_or(0, |(_, count)| *count);
        match &ancestor {
            Some((volume, count)) => self.report.note(format_args!(
                "base: {} has {count} of {}",
                volume.name,
                layer_count(self.known.chains.len())
            )),
            None => self.report.note("base: none, all layers are fetched"),
        }
        let paths = self.layers(kept)?;
        let fetched = paths.iter().map(|path| size_of(path.data())).sum();
        let stack = match paths.is_empty() {
            true => None,
            // What is below is on the volume; the registry vouches for the order.
            false => Some(Stack::open(
                &paths,
                match kept {
                    0 => self.pull.parents.of_device(),
                    _ => parents::Parents::Ignored,
                },
            )?),
        };
        let bytes = match (&stack, &ancestor) {
            (Some(stack), _) => stack.virtual_bytes(),
            (None, Some((volume, _))) => volume.bytes,
            (None, None) => 0,
        };
        let made = match &ancestor {
            Some((volume, _)) => Made::copy(&volume.name, part, self.undo)?,
            None => Made::empty(&self.pool.name, part, bytes, self.undo)?,
        };
        let now = Volumes::of_group(&part.vg)?;
        let volume = now.get(part)?;
        self.resize(volume, bytes)?;
        let mut written = Written {
            base: ancestor.map(|(volume, _)| volume.name.to_string()),
            fetched,
            ..Written::default()
        };
        let mut uuid = None;
        if let Some(stack) = &stack {
            let discards =
                match self.pool.discards && difference::external_origin(volume)?.is_none() {
                    true => Some(self.pool.chunk_bytes).filter(|bytes| *bytes > 0),
                    false => None,
                };
            self.check_room(stack, kept == 0, discards)?;
            uuid = stack.top().and_then(Layer::uuid);
            let file = File::options().read(true).write(true).open(volume.device());
            let file = file.with_context(|| format!("{part}: cannot open"))?;
            let to = Target {
                file: &file,
                path: &part.path(),
                blank: kept == 0,
                discards,
            };
            self.report.begin("writing", 0);
            let path = part.path();
            let done = apply(stack, to, self.report, &|| self.interrupt.check(&path))?;
            written.written = done.written;
            written.discarded = done.discarded;
        }
        let words = ["--activate", "n", &part.to_string()];
        program::run(&part.path(), "lvchange", words)?;
        let uuid = match uuid {
            Some(uuid) => Some(uuid.as_str().to_owned()),
            None => volumes
                .iter()
                .find(|volume| Some(volume.name.to_string()) == written.base)
                .and_then(|volume| volume.tags.get(tags::UUID).map(str::to_owned)),
        };
        self.tag(now.get(part)?, uuid)?;
        made.keep();
        snapshot::rename(part, whole)?;
        Ok(written)
    }

    /// The volume of the pool that has most of the image's layers, and how many.
    fn ancestor<'a>(&self, volumes: &'a Volumes) -> Option<(&'a Volume, usize)> {
        let chains = self.known.chains.iter().enumerate().rev();
        chains
            .map(|(n, chain)| (n + 1, chain.to_string()))
            .find_map(|(count, chain)| {
                let volume = volumes.iter().find(|volume| {
                    volume.pool.as_ref() == Some(&self.pool.name)
                        && snapshot::is_unchanged(volume)
                        && volume.tags.get(tags::CHAIN) == Some(&chain)
                })?;
                Some((volume, count))
            })
    }

    /// The files of the layers above the first `kept`.
    fn layers(&self, kept: usize) -> Result<Vec<LayerPath>> {
        let _watch = Watch::begin(self.interrupt, || ());
        let subject = self.from.to_string();
        let layers = block_layers(&self.known.image, &subject)?;
        let plain = layers[kept..]
            .iter()
            .all(|layer| layer.kind == LayerKind::Overlaybd);
        let reference = self.from.reference();
        let Some(reference) = reference.filter(|_| kept == 0 || !plain) else {
            let (image, transfer) = (&self.known.image, &self.pull.transfer);
            return fetch_layers(image, kept, reference, self.store, transfer, self.report);
        };
        let (_, paths) = fetch(
            reference,
            self.store,
            &self.pull.transfer,
            &self.pull.platform.clone().unwrap_or_else(Platform::here),
            self.pull.max_size.unwrap_or(u64::MAX),
            self.pull.parents.of_device(),
            self.report,
        )?;
        Ok(paths.into_iter().skip(kept).collect())
    }

    /// Makes the volume as large as the image, to whole extents.
    fn resize(&self, volume: &Volume, bytes: u64) -> Result<()> {
        if volume.bytes < bytes {
            return Ok(snapshot::extend(&volume.name, bytes)?);
        }
        // LVM rounds up: what is no extent smaller stays.
        if bytes.next_multiple_of(volume.extent_bytes.max(1)) < volume.bytes {
            snapshot::reduce(&volume.name, bytes)?;
        }
        Ok(())
    }

    /// Refuses what would fill the pool, with data or with metadata: writes to a full pool wait, and then fail.
    fn check_room(&self, stack: &Stack, blank: bool, discards: Option<u64>) -> Result<()> {
        let Some(status) = pool::status(&pool::target(self.pool))? else {
            return Err(self.pool.name.error("the pool is not active").into());
        };
        if status.mode != "rw" {
            let what = format!("the pool is {} and cannot be written to", status.mode);
            return Err(self.pool.name.error(what).into());
        }
        let chunk = self.pool.chunk_bytes.max(1);
        let needed = needed(stack, chunk, blank, discards);
        let all = stack.virtual_bytes().div_ceil(chunk);
        let lacking = |what: &str, needed: u64, free: u64, unit: u64, how: &str| {
            let (needed, free) = (needed.saturating_mul(unit), free.saturating_mul(unit));
            let (needed, free) = (units::size(needed), units::size(free));
            let what =
                format!("the image needs {needed}{what} and the pool has {free} left ({how})");
            Err(self.pool.name.error(what).into())
        };
        let free = |(used, all): (u64, u64)| all.saturating_sub(used);
        let (data, metadata) = (free(status.data), free(status.metadata));
        let blocks = pool::metadata_blocks(needed.mapped, all);
        if needed.written > data {
            return lacking("", needed.written, data, chunk, "lvextend makes it larger");
        }
        if blocks > metadata {
            let how = "lvextend --poolmetadatasize makes room";
            return lacking(" of metadata", blocks, metadata, pool::METADATA_BLOCK, how);
        }
        Ok(())
    }

    fn tag(&self, volume: &Volume, uuid: Option<String>) -> Result<()> {
        let new = self.known.tags(uuid.map(|uuid| (tags::UUID, uuid)));
        Ok(snapshot::tag_read_only(&volume.name, &volume.tags, &new)?)
    }
}

fn size_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_and_names() {
        let target: ThinTarget = "vg-1/pool/my.name".parse().unwrap();
        assert_eq!(target.pool.to_string(), "vg-1/pool");
        assert_eq!(target.name.as_deref(), Some("my.name"));
        let target: ThinTarget = "/dev/vg/pool".parse().unwrap();
        assert_eq!(
            (target.pool.to_string(), target.name),
            ("vg/pool".to_owned(), None)
        );
        for bad in ["vg", "vg/pool/", "vg/pool/a/b", "vg/pool/..", ""] {
            assert!(bad.parse::<ThinTarget>().is_err(), "{bad}");
        }
    }
}
