// SPDX-License-Identifier: GPL-2.0

//! Which blobs of a store are needed, which are damaged, and removing those that are neither named nor in use.

use std::{
    collections::HashSet,
    io,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Stat},
    io::Errno,
};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    annotations::CHUNK_LIST,
    digest::{Algorithm, Digest, Hasher},
    document::{check_values, Descriptor, MAX_DOCUMENT_BYTES},
    error::{Error, Kind, Result},
    squashed::{self, may_be_whole},
    store::{Store, TEMPORARY},
};

/// Parts and notes of transfers that nobody went on with for this long are given up.
const PART_AGE: Duration = Duration::from_secs(24 * 3600);

/// Something that [`Store::check`] finds.
#[derive(Debug)]
pub enum Damage {
    /// The blob does not have its digest.
    Blob(Digest),
    /// A file that no blob can have the name of, nor a run of layers.
    Stray(PathBuf),
    /// The file of a run of layers is not what it must be.
    Squashed {
        /// The run.
        run: Digest,
        /// What is wrong.
        what: String,
    },
    /// An image without one of its blobs.
    Missing {
        /// Name or digest of the image.
        image: String,
        /// The blob.
        blob: Digest,
    },
    /// An image whose manifest cannot be understood.
    Document {
        /// Name or digest of the image.
        image: String,
        /// What is wrong.
        what: String,
    },
}

/// What [`Store::sweep`] removed, or would remove.
#[derive(Debug, Default)]
pub struct Swept {
    /// The blobs, with their sizes in bytes.
    pub blobs: Vec<(Digest, u64)>,
    /// Parts and notes of transfers, and files of runs of layers.
    pub files: Vec<(PathBuf, u64)>,
    /// Blobs and files of runs that no image has, but somebody uses.
    pub in_use: Vec<Digest>,
}

/// Files that are called by digests, and what the file system says of them.
pub(crate) type Files = Vec<(Digest, Stat)>;

impl Store {
    /// The files in a folder of the store, none where it is missing. No link leads out of the store.
    fn files(&self, folder: &str) -> Result<Vec<(String, Stat)>> {
        let fail = |error: io::Error| self.fail("read", folder, error);
        let opened = match self.folder(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            opened => opened.map_err(fail)?,
        };
        let mut found = Vec::new();
        for entry in Dir::read_from(&opened).map_err(|error| fail(error.into()))? {
            let entry = entry.map_err(|error| fail(error.into()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if matches!(name.as_str(), "." | "..") {
                continue;
            }
            match rustix::fs::statat(&opened, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => found.push((name, stat)),
                // Removed since.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(self.fail("look at", &name, error.into())),
            }
        }
        found.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(found)
    }

    /// All blobs, and the paths of what else is in their folders.
    fn blobs(&self) -> Result<(Files, Vec<PathBuf>)> {
        let (mut blobs, mut strays) = (Files::new(), Vec::new());
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let folder = format!("blobs/{}", algorithm.name());
            let (found, others) = self.named_by_digests(&folder, algorithm)?;
            blobs.extend(found);
            strays.extend(others);
        }
        Ok((blobs, strays))
    }

    /// What in a folder is called by a digest, and the paths of what else is there.
    pub(crate) fn named_by_digests(
        &self,
        folder: &str,
        algorithm: Algorithm,
    ) -> Result<(Files, Vec<PathBuf>)> {
        let (mut named, mut strays) = (Files::new(), Vec::new());
        for (name, stat) in self.files(folder)? {
            match format!("{}:{name}", algorithm.name()).parse() {
                Ok(digest) => named.push((digest, stat)),
                Err(_) => strays.push(self.path().join(folder).join(name)),
            }
        }
        Ok((named, strays))
    }

    /// All that `descriptor` leads to, itself included, each as it is described. Adds to `found` also where it fails.
    fn reach(&self, descriptor: &Descriptor, found: &mut Vec<Descriptor>) -> Result<()> {
        let mut seen = HashSet::new();
        let mut next = found.len();
        found.push(descriptor.clone());
        while let Some(descriptor) = found.get(next).cloned() {
            next += 1;
            let small = descriptor.size <= MAX_DOCUMENT_BYTES;
            if !seen.insert(descriptor.digest.clone())
                || !small
                || !leads_on(&descriptor.media_type)
            {
                continue;
            }
            let text = self.read_blob(&descriptor)?;
            let path = self.blob_path(&descriptor.digest);
            let fail = |what: &str| Error::invalid(path.display(), what);
            check_values(&text).map_err(fail)?;
            let document: Value =
                serde_json::from_slice(&text).map_err(|_| fail("not a document"))?;
            let lists = ["manifests", "layers", "blobs"]
                .iter()
                .filter_map(|name| document.get(name)?.as_array())
                .flatten();
            for entry in lists.chain(document.get("config")) {
                let entry = Descriptor::deserialize(entry)
                    .map_err(|_| fail("a document with a descriptor that is none"))?;
                found.push(entry);
            }
        }
        Ok(())
    }

    /// Removes blobs that no image has and that are older than `older`, but for those that `in_use` says are used, files of
    /// runs of layers likewise, and old parts of transfers. Only tells what it would remove if `dry_run`. Waits for transfers
    /// to end; `waiting` hears of it.
    ///
    /// # Errors
    ///
    /// The system's. An image whose manifest is missing or damaged: it cannot be told which blobs it has.
    pub fn sweep(
        &self,
        older: Duration,
        dry_run: bool,
        in_use: impl Fn(&Digest) -> Result<bool>,
        waiting: impl FnOnce(),
    ) -> Result<Swept> {
        let _lock = self.exclude(waiting)?;
        let (mut needed, mut runs) = (HashSet::new(), HashSet::new());
        for entry in self.names()? {
            let mut found = Vec::new();
            self.reach(&entry.descriptor, &mut found).map_err(|error| {
                let name = entry
                    .name
                    .clone()
                    .unwrap_or_else(|| entry.descriptor.digest.to_string());
                let what = format!(
                    "cannot tell which blobs it needs ({error}): pull it again or remove its name"
                );
                Error::new(Kind::Refused, name, what)
            })?;
            for descriptor in found {
                // Layers are complete without the lists of their chunks.
                let list = descriptor.annotations.get(CHUNK_LIST);
                needed.extend(list.and_then(|digest| digest.parse().ok()));
                if needed.insert(descriptor.digest.clone()) {
                    runs.extend(self.runs_of(&descriptor));
                }
            }
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs());
        // What is from the future is young.
        let is_old = |stat: &Stat, age: Duration| {
            let from = u64::try_from(stat.st_mtime).unwrap_or(0);
            now.checked_sub(from)
                .is_some_and(|old| old >= age.as_secs())
        };
        let mut swept = Swept::default();
        // Those that go: of files that nobody needs, and that are old, the others are in use.
        let unused = |files: Files, needed: &HashSet<Digest>, used: &mut Vec<Digest>| {
            let mut unused = Files::new();
            for (digest, stat) in files {
                if needed.contains(&digest) || !is_old(&stat, older) || is_folder(&stat) {
                    continue;
                }
                match in_use(&digest)? {
                    true => used.push(digest),
                    false => unused.push((digest, stat)),
                }
            }
            Ok::<_, Error>(unused)
        };
        for (digest, stat) in unused(self.blobs()?.0, &needed, &mut swept.in_use)? {
            if !dry_run {
                let folder = format!("blobs/{}", digest.algorithm().name());
                self.remove(&folder, digest.hex())?;
            }
            swept.blobs.push((digest, stat.st_size as u64));
        }
        let squashed = self.squashed_files()?.0;
        for (run, stat) in unused(squashed, &runs, &mut swept.in_use)? {
            if !dry_run {
                self.remove(squashed::FOLDER, run.hex())?;
            }
            let path = self.squashed_path(&run);
            swept.files.push((path, stat.st_size as u64));
        }
        for (folder, is_ours) in [
            ("ingest", is_leftover as fn(&str) -> bool),
            (".", |name| name.starts_with(TEMPORARY)),
        ] {
            for (name, stat) in self.files(folder)? {
                if !is_ours(&name) || !is_old(&stat, PART_AGE) || is_folder(&stat) {
                    continue;
                }
                if !dry_run {
                    self.remove(folder, &name)?;
                }
                if !name.ends_with(".lock") {
                    let path = self.path().join(folder).join(name);
                    swept.files.push((path, stat.st_size as u64));
                }
            }
        }
        Ok(swept)
    }

    /// Reads all blobs and looks for all blobs of all images. What is in files of runs of layers is for the caller to read,
    /// who knows what layers are. `read` hears of the bytes that were read.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn check(&self, mut read: impl FnMut(u64)) -> Result<Vec<Damage>> {
        let (blobs, strays) = self.blobs()?;
        let (squashed, others) = self.squashed_files()?;
        let strays = strays.into_iter().chain(others);
        let mut damage: Vec<Damage> = strays.map(Damage::Stray).collect();
        for (run, stat) in squashed {
            if !may_be_whole(&stat) {
                let what = "not a file, or an empty one".to_owned();
                damage.push(Damage::Squashed { run, what });
            }
        }
        let mut bad = HashSet::new();
        for (digest, _) in blobs {
            if self.hash(&digest, &mut read)? != digest {
                bad.insert(digest.clone());
                damage.push(Damage::Blob(digest));
            }
        }
        for entry in self.names()? {
            let image = entry
                .name
                .clone()
                .unwrap_or_else(|| entry.descriptor.digest.to_string());
            let mut found = Vec::new();
            let reached = self.reach(&entry.descriptor, &mut found);
            let count = damage.len();
            for blob in found {
                // Blobs of another size count as missing: this image does not have what it needs.
                if !bad.contains(&blob.digest) && !self.has_blob(&blob).unwrap_or(false) {
                    damage.push(Damage::Missing {
                        image: image.clone(),
                        blob: blob.digest,
                    });
                }
            }
            if let (Err(error), true) = (reached, damage.len() == count) {
                damage.push(Damage::Document {
                    image,
                    what: error.to_string(),
                });
            }
        }
        Ok(damage)
    }

    fn hash(&self, digest: &Digest, read: &mut impl FnMut(u64)) -> Result<Digest> {
        use rustix::fs::{Mode, OFlags};
        use std::io::Read;
        let name = Self::blob_name(digest);
        let mut file =
            match self.open_beneath(&name, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
                Ok(file) => file,
                // A link is no blob.
                Err(error)
                    if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) =>
                {
                    return Ok(Digest::of(b""))
                }
                Err(error) => return Err(self.fail("open", &name, error)),
            };
        let mut hasher = Hasher::new(digest.algorithm());
        let mut buffer = vec![0; 256 << 10];
        loop {
            match file
                .read(&mut buffer)
                .map_err(|error| self.fail("read", &name, error))?
            {
                0 => return Ok(hasher.finish()),
                count => {
                    hasher.update(&buffer[..count]);
                    read(count as u64);
                }
            }
        }
    }

    /// Moves a damaged blob out of the way, to `ingest/bad-…`, so that it can be fetched again.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn set_aside(&self, digest: &Digest) -> Result<PathBuf> {
        let algorithm = digest.algorithm().name();
        let aside = format!("bad-{algorithm}-{}", digest.hex());
        self.move_aside(&format!("blobs/{algorithm}"), digest.hex(), &aside)
    }

    /// Moves the file `name` of `folder` to `ingest`, where it is called `aside`; returns its path.
    pub(crate) fn move_aside(&self, folder: &str, name: &str, aside: &str) -> Result<PathBuf> {
        let rename = || -> io::Result<()> {
            let (from, to) = (self.folder(folder)?, self.folder("ingest")?);
            Ok(rustix::fs::renameat(&from, name, &to, aside)?)
        };
        rename().map_err(|error| self.fail("move aside", &format!("{folder}/{name}"), error))?;
        Ok(self.path().join("ingest").join(aside))
    }
}

/// Whether a file of `ingest` is a part, a note, a damaged blob, the lock of a blob or temporary. Nobody holds that while no
/// transfer runs.
fn is_leftover(name: &str) -> bool {
    let of_blob = name.ends_with(".lock") && name.contains('-');
    let of_part = [".part", ".chunks", ".map", ".json"];
    let beginnings = ["bad-", TEMPORARY];
    of_blob
        || beginnings.iter().any(|begin| name.starts_with(begin))
        || of_part.iter().any(|end| name.ends_with(end))
}

/// What cannot be removed as a file is. No program puts one there.
fn is_folder(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Whether documents of this type name others.
fn leads_on(media_type: &str) -> bool {
    let known = crate::MediaType::from_name(media_type).is_some();
    known || (media_type.contains("manifest") && media_type.ends_with("json"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{manifest::Manifest, MediaType};

    fn store(folder: &std::path::Path) -> (Store, Descriptor, Descriptor) {
        let store = Store::create(folder).unwrap();
        let (config, layer) = (Descriptor::of("c", b"{}"), Descriptor::of("l", b"layer"));
        let bytes =
            Manifest::new(MediaType::OciManifest, config.clone(), vec![layer.clone()]).to_bytes();
        let manifest = Descriptor::of(MediaType::OciManifest.name(), &bytes);
        for (blob, bytes) in [
            (&config, &b"{}"[..]),
            (&layer, b"layer"),
            (&manifest, &bytes),
        ] {
            store.put(blob, bytes).unwrap();
        }
        store
            .put(&Descriptor::of("x", b"nobody's"), b"nobody's")
            .unwrap();
        store.set_name("a.x/a:1", &manifest).unwrap();
        (store, manifest, layer)
    }

    fn sweep(store: &Store, older: u64) -> Result<usize> {
        Ok(store
            .sweep(Duration::from_secs(older), false, |_| Ok(false), || ())?
            .blobs
            .len())
    }

    #[test]
    fn only_what_nobody_needs_goes() {
        let folder = tempfile::tempdir().unwrap();
        let (store, manifest, _) = store(folder.path());
        assert_eq!(sweep(&store, 3600).unwrap(), 0, "too young");
        let used = store
            .sweep(Duration::ZERO, false, |_| Ok(true), || ())
            .unwrap();
        assert_eq!((used.blobs.len(), used.in_use.len()), (0, 1));
        let dry = store
            .sweep(Duration::ZERO, true, |_| Ok(false), || ())
            .unwrap();
        assert_eq!(
            (
                dry.blobs[0].1,
                sweep(&store, 0).unwrap(),
                sweep(&store, 0).unwrap()
            ),
            (8, 1, 0)
        );
        assert!(store.check(|_| ()).unwrap().is_empty());
        store.remove_name("a.x/a:1").unwrap();
        assert_eq!(sweep(&store, 0).unwrap(), 3);
        assert!(!store.has_blob(&manifest).unwrap());
    }

    #[test]
    fn an_unreadable_manifest_stops_the_sweep() {
        let folder = tempfile::tempdir().unwrap();
        let (store, manifest, layer) = store(folder.path());
        fs::remove_file(store.blob_path(&manifest.digest)).unwrap();
        let error = sweep(&store, 0).unwrap_err();
        assert!(error.to_string().contains("a.x/a:1"), "{error}");
        assert!(store.has_blob(&layer).unwrap());
    }

    #[test]
    fn a_transfer_keeps_the_sweep_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let (store, ..) = store(folder.path());
        let (told, hear) = std::sync::mpsc::channel();
        let guard = store.protect().unwrap();
        std::thread::scope(|scope| {
            let sweeping = scope.spawn(|| {
                store.sweep(
                    Duration::ZERO,
                    false,
                    |_| Ok(false),
                    || told.send(()).unwrap(),
                )
            });
            hear.recv().unwrap();
            assert!(!sweeping.is_finished());
            drop(guard);
            assert_eq!(sweeping.join().unwrap().unwrap().blobs.len(), 1);
        });
    }

    #[test]
    fn no_link_leads_to_the_blobs_of_another_store() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (theirs, _, layer) = store(other.path());
        let ours = Store::create(one.path()).unwrap();
        let blobs = one.path().join("blobs/sha256");
        fs::remove_dir(&blobs).unwrap();
        std::os::unix::fs::symlink(other.path().join("blobs/sha256"), &blobs).unwrap();
        sweep(&ours, 0).unwrap_err();
        ours.set_aside(&layer.digest).unwrap_err();
        assert!(theirs.check(|_| ()).unwrap().is_empty());
        assert!(theirs.has_blob(&Descriptor::of("x", b"nobody's")).unwrap());
    }

    #[test]
    fn what_deep_indexes_lead_to_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (store, manifest, layer) = store(folder.path());
        let mut inner = manifest;
        // Each names the one below many times: ways to it are not counted.
        for _ in 0..8 {
            let index = crate::Index::new(vec![inner; 20]);
            let bytes = serde_json::to_vec(&index).unwrap();
            inner = Descriptor::of(MediaType::OciIndex.name(), &bytes);
            store.put(&inner, &bytes).unwrap();
        }
        store.set_name("a.x/a:1", &inner).unwrap();
        assert_eq!(sweep(&store, 0).unwrap(), 1, "nobody's");
        assert!(store.has_blob(&layer).unwrap() && store.check(|_| ()).unwrap().is_empty());
    }

    #[test]
    fn damage_is_found_and_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _, layer) = store(folder.path());
        let path = store.blob_path(&layer.digest);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "lair!").unwrap();
        fs::write(folder.path().join("blobs/sha256/what"), "").unwrap();
        let damage = store.check(|_| ()).unwrap();
        assert!(
            matches!(&damage[..], [Damage::Stray(_), Damage::Blob(bad)] if *bad == layer.digest),
            "{damage:?}"
        );
        store.set_aside(&layer.digest).unwrap();
        let damage = store.check(|_| ()).unwrap();
        assert!(
            matches!(&damage[1], Damage::Missing { image, blob } if image == "a.x/a:1" && *blob == layer.digest)
        );
    }
}
