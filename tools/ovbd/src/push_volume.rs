// SPDX-License-Identifier: GPL-2.0

//! Pushing a logical volume: which snapshot is the base, what differs from it, and the tags afterwards.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::Args;
use ovbd_devices::{check_root, Interrupt};
use ovbd_layers::{
    build, content_hash::uuid_text, delta, direct::DirectFile, layer::LayerPath, parents::Parents,
    report::Report as _, same, stack::Stack, units,
};
use ovbd_lvm::{
    active::Active,
    changes::{self, Sizes},
    difference::{self, Context},
    partial,
    pool::Turn,
    snapshot::{self, Made},
    tags,
    undo::{self, Undo},
    Name, Volume, Volumes,
};
use ovbd_oci::{Digest, Outgoing};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    base::{find_base, Base},
    cli::{wrong_usage, Compression},
    commands::{
        images::{layer_count, stored},
        push::{wrapped, Push, Shared, ToSend},
    },
    documents::{chain, content_of, rfc3339, Composition, NewLayer},
    filesystem,
    layer_files::fetch_layers,
    names::block_layers,
    place::Place,
    report::Report,
    watch::Watch,
};

/// How a logical volume is pushed.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Logical volumes")]
pub struct VolumeOptions {
    /// Take a read-only snapshot of the volume, and push that [default name: LV.TIME]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub snapshot: Option<String>,
    /// The snapshot that the new layer is to be on top of [default: the newest that was pushed to the repository]
    #[arg(long, value_name = "VG/LV", conflicts_with = "full")]
    pub base: Option<Name>,
    /// Send all that the volume holds, on top of nothing
    #[arg(long)]
    pub full: bool,
    /// Take a base that can be written to: nobody did since it was pushed
    #[arg(long)]
    pub trust_base: bool,
    /// Compare the base with its image first, all of it: LVM does not know whether somebody wrote to it
    #[arg(long, conflicts_with = "full")]
    pub check: bool,
    /// Do all but sending: say what would be sent, and leave nothing behind
    #[arg(long)]
    pub dry_run: bool,
    /// How the new layer is compressed.
    #[command(flatten)]
    pub compression: Compression,
}

impl VolumeOptions {
    /// Whether any of them is given.
    pub fn is_given(&self) -> bool {
        self.snapshot.is_some()
            || self.base.is_some()
            || self.full
            || self.trust_base
            || self.check
            || self.dry_run
            || self.compression.given().next().is_some()
    }

    /// How a new layer is written.
    fn layer(&self) -> build::Options {
        build::Options {
            tar: true,
            zfile: Some(self.compression.zfile(true)),
            level: self.compression.level,
            ..build::Options::default()
        }
    }
}

/// Pushes the volume `name`.
///
/// # Errors
///
/// A volume that cannot be pushed as it is, those of LVM, of reading and of the registry. Nothing is left behind then.
pub fn run(push: &Push, name: Name, place: &Place, report: &Report) -> Result<ExitCode> {
    let options = &push.volume;
    if let Err(what) = options.layer().check() {
        wrong_usage("push", what);
    }
    check_root()?;
    let repo = place.repository();
    for text in [repo.as_str(), place.tag()] {
        if !tags::is_allowed(text) {
            return Err(name
                .error(format!("LVM allows no tag with \"{text}\""))
                .into());
        }
    }
    let interrupt = Interrupt::install()?;
    for said in undo::recover(report)?.done {
        report.note(said);
    }
    let undo = Undo::begin()?;
    // One snapshot after the other, so that two get names that differ.
    let turn = match options.snapshot {
        Some(_) => Some(Turn::wait(&name, &interrupt, report)?),
        None => None,
    };
    let volumes = Volumes::of_group(&name.vg)?;
    check_kind(&volumes, volumes.get(&name)?, options)?;
    let (new, made) = match &options.snapshot {
        None => (volumes.get(&name)?.clone(), None),
        Some(given) => {
            let made = take_snapshot(&volumes, &name, given, &undo)?;
            drop(turn);
            let new = Volumes::of_group(&name.vg)?.get(made.name())?.clone();
            report.note(format_args!("{name}: snapshot {} (read-only)", new.name));
            (new, Some(made))
        }
    };
    let pool = volumes.pool_of(&new).ok().cloned();
    if let Some(pool) = pool.as_ref().filter(|pool| !pool.zeroes) {
        let what = "the pool does not zero new chunks (-Zn): what other volumes held may be in parts of chunks that were \
                    never written, and is sent too";
        report.warn(&pool.name.error(what));
    }
    let base = match options.full {
        true => None,
        false => find_base(push, &volumes, &name, &new, place, report)?,
    };
    let names = Naming {
        place,
        base: base.as_ref(),
    };
    match &base {
        Some(base) => report.note(format_args!(
            "base: {} is {}, {} on {repo}",
            base.volume.name,
            base.image.descriptor.digest.short(),
            layer_count(base.image.manifest.layers.len())
        )),
        None => report.note("base: none, all that the volume holds is sent"),
    }
    let context = Context {
        undo: &undo,
        interrupt: &interrupt,
        report,
    };
    if let Some(base) = base.as_ref().filter(|_| options.check) {
        check_content(push, base, place, context, report)?;
    }
    let folder = Folder::make(&undo)?;
    let work = Work {
        push,
        report,
        new: &new,
        pool: pool.as_ref(),
        base: base.as_ref(),
    };
    let found = work.find_changes(folder.0.path(), context)?;
    let mut image = work.compose(&found)?;
    let sizes = image_sizes(&image, &found);
    if options.dry_run {
        let text = format!(
            "would send {}, holding {}; {place} would have {}\n",
            units::size(sizes.new_stored),
            units::size(found.written.counts.data),
            layer_count(image.manifest.layers.len())
        );
        let answer = json!({
            "name": place.to_string(), "snapshot": new.name.to_string(), "base": base_name(&base),
            "would-send": sizes.new_stored, "changed": found.changed, "read": found.written.counts.read,
            "data": found.written.counts.data, "zeroed": found.written.counts.zeroed,
            "layers": image.manifest.layers.len(),
        });
        return report.print(&if push.json {
            format!("{answer}\n")
        } else {
            text
        });
    }
    interrupt.check(&new.name.path())?;
    let (mark, path) = (
        made.as_ref().map(|made| made.mark().clone()),
        folder.0.path().to_owned(),
    );
    let _watch = Watch::begin(&interrupt, move || {
        if let Some(mark) = &mark {
            // The note stays where it cannot be removed.
            let _ = partial::remove_marked(mark);
        }
        let _ = std::fs::remove_dir_all(&path);
    });
    let (digest, counts) = match (&base, found.written.layers.is_empty()) {
        // Nothing differs: the name gets the image of the base.
        (Some(base), true) => {
            let media_type = base.image.media_type();
            let bytes = &base.image.manifest_bytes;
            (place.name(media_type, bytes)?, Default::default())
        }
        _ => push.send(place, &mut image, report)?,
    };
    names.tag(&new, &digest, &found)?;
    if let Some(made) = made {
        made.keep();
    }
    let answer = json!({
        "name": place.to_string(), "digest": digest, "layers": image.manifest.layers.len(), "stored": sizes.stored,
        "virtual": new.bytes, "sent": counts.done, "present": counts.present, "mounted": counts.mounted,
        "snapshot": new.name.to_string(), "base": base_name(&base), "changed": found.changed,
        "read": found.written.counts.read, "data": found.written.counts.data,
        "zeroed": found.written.counts.zeroed, "layer-bytes": sizes.new_stored,
    });
    report.print(&match push.json {
        true => format!("{answer}\n"),
        false => format!(
            "{place}  {digest}  {}, {} of {}\n",
            layer_count(image.manifest.layers.len()),
            units::size(sizes.stored),
            units::size(new.bytes)
        ),
    })
}

fn base_name(base: &Option<Base>) -> Option<String> {
    base.as_ref().map(|base| base.volume.name.to_string())
}

fn temporary_folder() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(folder) => folder.into(),
        // Layers can be large, and /tmp is often memory.
        None => "/var/tmp".into(),
    }
}

/// Refuses volumes of which no push can be made.
fn check_kind(volumes: &Volumes, volume: &Volume, options: &VolumeOptions) -> Result<()> {
    let name = &volume.name;
    if volume.is_pool() {
        return Err(name.error("is a thin pool: push one of its volumes").into());
    }
    if volume.tags.is_partial() {
        let what = "is not complete: what made it was killed (\"ovbd lvm prune\" removes it)";
        return Err(name.error(what).into());
    }
    if volume.is_classic_snapshot() && volume.invalid {
        let what = "the snapshot is invalid: it was full, and lost what it held";
        return Err(name.error(what).into());
    }
    if options.snapshot.is_some() {
        return match volume.is_thin() {
            true => Ok(()),
            false => Err(name
                .error("not a thin volume: make a snapshot with \"lvcreate --snapshot --permission r\", and push that")
                .into()),
        };
    }
    if volume.writable {
        let what = "can be written to: what is read would be of no one moment (--snapshot pushes a snapshot of it; \
                    \"lvchange --permission r\" makes it read-only)";
        return Err(name.error(what).into());
    }
    if !volume.is_thin() && !volume.is_classic_snapshot() && !options.full {
        let what = "neither a thin volume nor a snapshot: LVM does not know what changed (--full sends all; \"ovbd build \
                    --base\" makes the next layer of it)";
        return Err(name.error(what).into());
    }
    if volume.is_thin() {
        volumes.pool_of(volume)?;
    }
    Ok(())
}

fn take_snapshot(volumes: &Volumes, volume: &Name, given: &str, undo: &Undo) -> Result<Made> {
    let name = match given {
        "" => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = rfc3339(now.map_or(0, |now| now.as_secs() as i64));
            let time: String = now
                .chars()
                .filter(|c| c.is_ascii_digit() || *c == 'T')
                .collect();
            let first = volume.sibling(format!("{}.{time}", volume.lv));
            let more = (1..).map(|n| volume.sibling(format!("{}.{n}", first.lv)));
            let mut names = std::iter::once(first.clone()).chain(more);
            let free = names.find(|name| volumes.find(name).is_none());
            free.unwrap_or(first)
        }
        given => volume.sibling(given),
    };
    if !ovbd_lvm::volume::is_name(&name.lv) {
        return Err(name.error("LVM allows no such name").into());
    }
    if volumes.find(&name).is_some() {
        let what = "exists: give the snapshot another name (--snapshot=NAME), or push this one without --snapshot";
        return Err(name.error(what).into());
    }
    Ok(Made::snapshot(volume, &name, undo)?)
}

/// One push.
struct Work<'a> {
    push: &'a Push,
    report: &'a Report,
    new: &'a Volume,
    pool: Option<&'a Volume>,
    base: Option<&'a Base>,
}

/// What is new.
struct Found {
    written: delta::Written,
    /// Bytes that may have changed, as metadata says.
    changed: u64,
    fs_type: Option<String>,
    /// Layers with their digests.
    layers: Vec<(LayerPath, NewLayer)>,
}

impl Work<'_> {
    /// Reads what may have changed and writes it as layers into `folder`.
    fn find_changes(&self, folder: &Path, context: Context<'_>) -> Result<Found> {
        for volume in [Some(self.new), self.base.map(|base| &base.volume)] {
            // They are active with their origin, whose business that is.
            if let Some(volume) = volume.filter(|v| v.is_classic_snapshot() && !v.active) {
                return Err(volume
                    .name
                    .error("is not active: activate its origin")
                    .into());
            }
        }
        let old = self
            .base
            .map(|base| &base.volume)
            // It was pushed before: nothing is new.
            .filter(|volume| volume.uuid != self.new.uuid);
        let both: Vec<&Volume> = [self.new].into_iter().chain(old).collect();
        let active = Active::new(&both, context.undo, context.interrupt, context.report)?;
        let ranges = match (self.base, self.pool, old) {
            // It was read-only, and may have been made larger.
            (Some(base), _, None) => changes::grown(Sizes {
                old: base.volume.bytes,
                new: self.new.bytes,
                external: false,
            }),
            (_, Some(pool), _) => difference::thin(pool, old, self.new, context)?,
            (_, None, Some(old)) => difference::classic(old, self.new)?,
            (None, None, None) => changes::all(self.new.bytes),
        };
        let freed = ranges.totals().zeroed;
        let changed = ranges.totals().all - freed;
        self.report.note(format_args!(
            "changed: {} at most, discarded: {}",
            units::size(changed),
            units::size(freed)
        ));
        self.report.begin("reading", changed + freed);
        let new = DirectFile::open(self.new.device())?;
        if new.bytes() != self.new.bytes {
            let what = format!("has {} bytes, and LVM says {}", new.bytes(), self.new.bytes);
            return Err(self.new.name.error(what).into());
        }
        let old = match old {
            Some(old) => Some(DirectFile::open(old.device())?),
            None => None,
        };
        let pair = delta::Pair {
            new: &new,
            old: old.as_ref(),
            ranges: &ranges,
            always: match self.base {
                Some(base) => base.volume.bytes != self.new.bytes,
                None => true,
            },
        };
        let parent = self.base.and_then(|base| base.volume.tags.get(tags::UUID));
        let options = build::Options {
            parent_uuid: parent.and_then(|uuid| uuid.parse().ok()).map(uuid_text),
            ..self.push.volume.layer()
        };
        let path = self.new.name.path();
        let check = || context.interrupt.check(&path);
        let written = delta::write(pair, folder, &options, context.report, &check)?;
        let fs_type = match self.push.fs.as_deref() {
            Some("none") => None,
            Some(given) => Some(given.to_owned()),
            None => filesystem::ask(self.new.device()),
        };
        drop((new, old));
        let counts = written.counts;
        self.report.note(format_args!(
            "{} read, {} differ in blocks of 4 KiB, {} became zeros",
            units::size(counts.read),
            units::size(counts.data),
            units::size(counts.zeroed)
        ));
        active.end()?;
        let mut layers = Vec::new();
        for (path, _) in &written.layers {
            let path = LayerPath::Sealed(path.clone());
            let source = wrapped(&path)?;
            let digests = source.digests(|_| ());
            let (digest, chunks) =
                digests.with_context(|| format!("{}: cannot read", path.data().display()))?;
            let bytes = source.size();
            let new = NewLayer {
                digest,
                bytes,
                made_of: Some(self.new.name.to_string()),
                tar_bytes: None,
                chunks,
            };
            layers.push((path, new));
        }
        Ok(Found {
            written,
            changed,
            fs_type,
            layers,
        })
    }

    fn compose(&self, found: &Found) -> Result<ToSend> {
        let composed = Composition {
            base: self.base.map(|base| (None, &base.image)),
            new: found.layers.iter().map(|(_, new)| new.clone()).collect(),
            virtual_bytes: self.new.bytes,
            source: if self.new.is_thin() { "thin" } else { "thick" },
            fs_type: found.fs_type.as_deref(),
            docker_types: self.push.docker_types,
            config: self.push.config.as_deref(),
        };
        let (manifest, config) = composed.documents()?;
        let mut blobs = Vec::new();
        for (path, new) in &found.layers {
            let mut layers = manifest.layers.iter();
            let layer = layers.find(|layer| layer.digest == new.digest);
            let blob = layer.context("a layer is not in its manifest")?.clone();
            blobs.push(Outgoing {
                blob,
                source: Box::new(Shared(wrapped(path)?)),
                from: Vec::new(),
            });
        }
        blobs.push(Outgoing {
            blob: manifest.config.clone(),
            source: Box::new(config),
            from: Vec::new(),
        });
        Ok(ToSend {
            bytes: manifest.to_bytes(),
            media_type: composed.media_type(),
            manifest,
            blobs,
        })
    }
}

/// Refuses a base that does not hold what its image holds. Its layers are fetched where they are missing.
fn check_content(
    push: &Push,
    base: &Base,
    place: &Place,
    context: Context<'_>,
    report: &Report,
) -> Result<()> {
    let path = base.volume.name.path();
    let (image, transfer) = (&base.image, &push.transfer);
    let _watch = Watch::begin(context.interrupt, || ());
    let created;
    let (from, store) = match place {
        Place::Layout { store, .. } => (None, store),
        Place::Registry(reference, _) => {
            created = push.store.create()?;
            (Some(reference.at(&image.descriptor.digest)), &created)
        }
    };
    let _guard = store.protect()?;
    let layers = fetch_layers(image, 0, from.as_ref(), store, transfer, report)?;
    drop(_watch);
    let stack = Stack::open(&layers, Parents::Ignored)?;
    let active = Active::new(
        &[&base.volume],
        context.undo,
        context.interrupt,
        context.report,
    )?;
    report.begin("checking", 0);
    let device = DirectFile::open(base.volume.device())?;
    let check = || context.interrupt.check(&path);
    let found = same::first_difference(&stack, &device, report, &check)?;
    drop(device);
    active.end()?;
    match found {
        None => {
            report.note(format_args!(
                "{}: holds what its image holds",
                base.volume.name
            ));
            Ok(())
        }
        Some(byte) => {
            let what = format!(
                "is not its image {} any more: somebody wrote to it (--full sends all; --base names another)",
                image.descriptor.digest.short()
            );
            Err(ovbd_layers::Error::new(&path, what).at_byte(byte).into())
        }
    }
}

struct ImageSizes {
    /// Of all layers.
    stored: u64,
    /// Of the new ones.
    new_stored: u64,
}

fn image_sizes(image: &ToSend, found: &Found) -> ImageSizes {
    ImageSizes {
        stored: stored(&image.manifest),
        new_stored: found.layers.iter().map(|(_, new)| new.bytes).sum(),
    }
}

/// A folder for new layers, which is removed when this is dropped.
struct Folder(TempDir, Undo, u64);

impl Folder {
    fn make(undo: &Undo) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(undo::FOLDER_PREFIX)
            .tempdir_in(temporary_folder())
            .context("cannot make a temporary folder")?;
        let number = undo.note(undo::Action::Folder {
            path: folder.path().to_owned(),
        })?;
        Ok(Self(folder, undo.clone(), number))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0.path());
        self.1.forget(self.2);
    }
}

/// What a volume is tagged with.
struct Naming<'a> {
    place: &'a Place,
    base: Option<&'a Base>,
}

impl Naming<'_> {
    fn tag(&self, volume: &Volume, digest: &Digest, found: &Found) -> Result<()> {
        let mut ids = Vec::new();
        if let Some(base) = self.base {
            let layers = block_layers(&base.image, "base")?;
            ids.extend(layers.into_iter().map(content_of));
        }
        ids.extend(found.layers.iter().map(|(_, new)| &new.digest));
        let chain = chain(ids);
        let mut new = vec![
            (tags::MANIFEST, digest.to_string()),
            (tags::REPO, self.place.repository()),
            (tags::TAG, self.place.tag().to_owned()),
        ];
        new.extend(chain.map(|chain| (tags::CHAIN, chain.to_string())));
        let uuid = match found.written.layers.last() {
            Some((_, uuid)) => Some(uuid.as_str().to_owned()),
            None => self
                .base
                .and_then(|base| base.volume.tags.get(tags::UUID))
                .map(str::to_owned),
        };
        new.extend(uuid.map(|uuid| (tags::UUID, uuid)));
        // Those that it got when it was made are not in what was asked before.
        let volumes = Volumes::of_group(&volume.name.vg)?;
        let now = volumes.get(&volume.name)?;
        if now.uuid != volume.uuid || now.writable != volume.writable {
            let what = "is not the volume any more that was sent: it is not tagged";
            return Err(volume.name.error(what).into());
        }
        Ok(snapshot::tag(&volume.name, &now.tags, &new)?)
    }
}
