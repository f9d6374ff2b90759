// SPDX-License-Identifier: GPL-2.0

//! Runs of layers that a store has once more, each as one file, so that a stack of many layers is of few devices.
//!
//! `squashed/<hex>` is one layer that holds what the layers of a run hold together. Its name is the SHA-256 of their digests,
//! bottom first, one in a line: images that share these layers share the file. No image has it, and none needs it, as the
//! layers themselves stay. Which layers are a run depends on their places alone, so each layer is in one at most.

use std::{fs::File, io, ops::Range, path::PathBuf};

use rustix::{
    fs::{FileType, Mode, OFlags, Stat},
    io::Errno,
};

use crate::{
    digest::{Algorithm, Digest, Hasher},
    document::{Descriptor, Document, MediaType},
    error::Result,
    image::kind,
    manifest::Manifest,
    store::Store,
    sweep::Files,
};

/// Layers of a run.
const RUN_LAYERS: usize = 16;
/// Where the files are.
pub(crate) const FOLDER: &str = "squashed";

/// Neighbouring layers of an image that one file may stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Their places among the layers of the image that hold data, from the bottom.
    pub layers: Range<usize>,
    /// What the file is called.
    pub name: Digest,
}

impl Run {
    /// The runs of layers, bottom first: always 16, from the second layer on, and never the topmost, on which there may be
    /// more next time, or which is a seal.
    fn all(digests: &[&Digest]) -> Vec<Self> {
        let between = digests.len().saturating_sub(2);
        let starts = (0..between / RUN_LAYERS).map(|number| 1 + number * RUN_LAYERS);
        starts
            .map(|start| {
                let layers = start..start + RUN_LAYERS;
                let mut hasher = Hasher::new(Algorithm::Sha256);
                for digest in &digests[layers.clone()] {
                    hasher.update(format!("{digest}\n").as_bytes());
                }
                Self {
                    layers,
                    name: hasher.finish(),
                }
            })
            .collect()
    }
}

impl Manifest {
    /// The runs of its layers.
    pub fn runs(&self) -> Vec<Run> {
        let layers = self.layers.iter();
        let data = layers.filter(|layer| kind(layer).holds_data());
        let digests: Vec<&Digest> = data.map(|layer| &layer.digest).collect();
        Run::all(&digests)
    }
}

impl Store {
    /// Path of the file of a run, whether it is there or not.
    pub fn squashed_path(&self, run: &Digest) -> PathBuf {
        self.path().join(FOLDER).join(run.hex())
    }

    /// Whether there is a file of a run, which no link leads to. What it holds is not looked at.
    pub fn has_squashed(&self, run: &Digest) -> bool {
        let name = format!("{FOLDER}/{}", run.hex());
        // Not blocking, because it may be a FIFO.
        let file = self.open_beneath(&name, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty());
        file.is_ok_and(|file| rustix::fs::fstat(&file).is_ok_and(|stat| may_be_whole(&stat)))
    }

    /// Path at which the file of a run is made, where nothing is. Whoever makes it protects the store.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn begin_squashed(&self, run: &Digest) -> Result<PathBuf> {
        let part = part_name(run);
        let begin = || -> io::Result<()> {
            let ingest = self.folder("ingest")?;
            match rustix::fs::unlinkat(&ingest, &part, rustix::fs::AtFlags::empty()) {
                Err(error) if error != Errno::NOENT => return Err(error.into()),
                _ => {}
            }
            let root = self.folder(".")?;
            match rustix::fs::mkdirat(&root, FOLDER, Mode::from_raw_mode(0o755)) {
                Err(error) if error != Errno::EXIST => Err(error.into()),
                _ => root.sync_all(),
            }
        };
        begin().map_err(|error| self.fail("begin to make", &format!("ingest/{part}"), error))?;
        Ok(self.path().join("ingest").join(part))
    }

    /// Gives the file that was made at [`Store::begin_squashed`] its name, when it is on the disk.
    ///
    /// # Errors
    ///
    /// The system's. The file is gone then.
    pub fn keep_squashed(&self, run: &Digest) -> Result<()> {
        let part = part_name(run);
        let path = format!("ingest/{part}");
        let keep = || -> io::Result<()> {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK;
            let file: File = self.open_beneath(&path, flags, Mode::empty())?;
            self.move_synced(&file, &part, FOLDER, run.hex())
        };
        keep().map_err(|error| {
            // The first error is what matters.
            let _ = self.drop_squashed(run);
            self.fail("put into the store", &path, error)
        })
    }

    /// Removes what was made at [`Store::begin_squashed`].
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn drop_squashed(&self, run: &Digest) -> Result<()> {
        self.remove("ingest", &part_name(run))
    }

    /// The runs of which there are files that may be whole.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn squashed(&self) -> Result<Vec<Digest>> {
        let (found, _) = self.squashed_files()?;
        let whole = found.into_iter().filter(|(_, stat)| may_be_whole(stat));
        Ok(whole.map(|(run, _)| run).collect())
    }

    /// What is there under the name of a run, and the paths of what else is there.
    pub(crate) fn squashed_files(&self) -> Result<(Files, Vec<PathBuf>)> {
        self.named_by_digests(FOLDER, Algorithm::Sha256)
    }

    /// The names of the runs of a manifest. What is none that can be understood, and so is not mapped, has none.
    pub(crate) fn runs_of(&self, document: &Descriptor) -> Vec<Digest> {
        let runs = || {
            let media_type = MediaType::from_name(&document.media_type)?;
            let bytes = self.read_blob(document).ok()?;
            match Document::parse(&bytes, media_type, &document.digest).ok()? {
                Document::Manifest(manifest) => Some(manifest.runs()),
                Document::Index(_) => None,
            }
        };
        let runs = runs().into_iter().flatten();
        runs.map(|run| run.name).collect()
    }

    /// Moves the damaged file of a run out of the way, to `ingest/bad-…`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn set_squashed_aside(&self, run: &Digest) -> Result<PathBuf> {
        self.move_aside(FOLDER, run.hex(), &format!("bad-squashed-{}", run.hex()))
    }
}

/// Not empty, and a file.
pub(crate) fn may_be_whole(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size > 0
}

fn part_name(run: &Digest) -> String {
    format!("squashed-{}.part", run.hex())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path, time::Duration};

    use super::*;
    use crate::{
        manifest::{OCI_CONFIG, OCI_LAYER},
        Damage,
    };

    /// A store with one image of 18 layers, and its run.
    fn store(folder: &Path) -> (Store, Digest) {
        let store = Store::create(folder).unwrap();
        let layers = (0..18).map(|n| Descriptor::of(OCI_LAYER, &[n])).collect();
        let manifest = Manifest::new(
            MediaType::OciManifest,
            Descriptor::of(OCI_CONFIG, b"{}"),
            layers,
        );
        let bytes = manifest.to_bytes();
        let image = Descriptor::of(MediaType::OciManifest.name(), &bytes);
        store.put(&image, &bytes).unwrap();
        // By a way that is longer.
        let index = serde_json::to_vec(&crate::Index::new(vec![image])).unwrap();
        let of_index = Descriptor::of(MediaType::OciIndex.name(), &index);
        store.put(&of_index, &index).unwrap();
        store.set_name("h.x/a:1", &of_index).unwrap();
        (store, manifest.runs()[0].name.clone())
    }

    fn make(store: &Store, run: &Digest) {
        fs::write(store.begin_squashed(run).unwrap(), "squashed").unwrap();
        store.keep_squashed(run).unwrap();
    }

    fn sweep(store: &Store, older: u64, used: bool) -> usize {
        let swept = store.sweep(Duration::from_secs(older), false, |_| Ok(used), || ());
        swept.unwrap().files.len()
    }

    #[test]
    fn a_file_stays_while_an_image_has_its_run() {
        let folder = tempfile::tempdir().unwrap();
        let (store, run) = store(folder.path());
        assert!(!store.has_squashed(&run) && store.squashed().unwrap().is_empty());
        make(&store, &run);
        make(&store, &Digest::of(b"nobody's"));
        assert_eq!(store.squashed().unwrap().len(), 2);
        assert_eq!(sweep(&store, 3600, false), 0, "too young");
        assert_eq!(sweep(&store, 0, true), 0, "in use");
        assert_eq!(sweep(&store, 0, false), 1);
        assert!(store.has_squashed(&run));
        store.remove_name("h.x/a:1").unwrap();
        assert_eq!(sweep(&store, 0, false), 1);
        assert!(!store.has_squashed(&run));
    }

    #[test]
    fn what_is_made_replaces_what_was_left() {
        let folder = tempfile::tempdir().unwrap();
        let (store, run) = store(folder.path());
        let victim = folder.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        symlink(&victim, store.begin_squashed(&run).unwrap()).unwrap();
        assert!(store.keep_squashed(&run).is_err(), "a link is no file");
        make(&store, &run);
        make(&store, &run);
        assert_eq!(fs::read(store.squashed_path(&run)).unwrap(), b"squashed");
        assert_eq!(fs::read(&victim).unwrap(), b"untouched");
        // A folder that leads elsewhere is not written to.
        fs::rename(folder.path().join(FOLDER), folder.path().join("moved")).unwrap();
        symlink(folder.path().join("moved"), folder.path().join(FOLDER)).unwrap();
        assert!(!store.has_squashed(&run));
        fs::write(store.begin_squashed(&run).unwrap(), "squashed").unwrap();
        assert!(store.keep_squashed(&run).is_err());
    }

    #[test]
    fn what_is_no_file_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        let (store, run) = store(folder.path());
        make(&store, &run);
        // The layers and the configuration are missing.
        let missing = store.check(|_| ()).unwrap().len();
        assert_eq!(missing, 19);
        let path = store.squashed_path(&run);
        fs::write(path.with_file_name("what"), "").unwrap();
        fs::rename(&path, folder.path().join("aside")).unwrap();
        symlink(folder.path().join("aside"), &path).unwrap();
        assert!(!store.has_squashed(&run) && store.squashed().unwrap().is_empty());
        let damage = store.check(|_| ()).unwrap();
        assert!(
            matches!(&damage[..2], [Damage::Stray(_), Damage::Squashed { run: found, .. }] if *found == run),
            "{damage:?}"
        );
        store.set_squashed_aside(&run).unwrap();
        assert_eq!(store.check(|_| ()).unwrap().len(), missing + 1);
    }

    fn runs(count: usize) -> Vec<Range<usize>> {
        let digests: Vec<Digest> = (0..count).map(|n| Digest::of(&n.to_le_bytes())).collect();
        let digests: Vec<&Digest> = digests.iter().collect();
        Run::all(&digests)
            .into_iter()
            .map(|run| run.layers)
            .collect()
    }

    #[test]
    fn runs_depend_on_places_alone() {
        for count in [0, 1, 2, 16, 17] {
            assert_eq!(runs(count), [], "{count}");
        }
        for count in [18, 33] {
            assert_eq!(runs(count), vec![1..17], "{count}");
        }
        assert_eq!(runs(34), [1..17, 17..33]);
        assert_eq!(runs(50), [1..17, 17..33, 33..49]);
        let most = runs(255);
        assert_eq!((most.len(), most.last()), (15, Some(&(225..241))));
        // The base, the files of the runs, and the layers above.
        assert_eq!(255 - most.len() * RUN_LAYERS + most.len(), 30);
    }

    #[test]
    fn images_that_share_layers_share_files() {
        let digests: Vec<Digest> = (0..40_u8).map(|n| Digest::of(&[n])).collect();
        let all: Vec<&Digest> = digests.iter().collect();
        let mut other = all.clone();
        other[16] = &digests[39];
        let (one, more, changed) = (Run::all(&all[..20]), Run::all(&all), Run::all(&other));
        assert_eq!(one[..], more[..1]);
        assert_ne!(one[0].name, changed[0].name);
        assert_eq!(more[1], changed[1]);
        let lines: Vec<String> = digests[1..17].iter().map(Digest::to_string).collect();
        assert_eq!(
            one[0].name,
            Digest::of((lines.join("\n") + "\n").as_bytes())
        );
    }
}
