// SPDX-License-Identifier: GPL-2.0

//! The local store: an OCI image layout, which skopeo, oras and umoci read, with a folder `ingest` for what is on its way, and
//! a folder `squashed` for runs of layers that are there as one file too.
//!
//! ```text
//! oci-layout  index.json  blobs/sha256/<hex>
//! ingest/<algorithm>-<hex>.part   bytes of a blob that is not complete
//! ingest/<algorithm>-<hex>.lock   held by who writes it
//! ingest/transfers.lock           shared by transfers, exclusive for who removes blobs
//! ingest/index.lock               held while index.json is replaced
//! ingest/upload-*.json            where an upload can be continued
//! squashed/<hex>                  the layers of a run as one layer
//! ```
//!
//! A layout may come from somebody else. Paths are made of digests alone, and no symbolic link is followed below the folder.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, ResolveFlags};
use serde::Deserialize;
use serde_json::{json, Value};

use crate::{
    annotations::{CONTAINERD_NAME, REF_NAME},
    blob::FilePart,
    chunk_list::ChunkList,
    digest::Digest,
    document::{check_values, Descriptor, Document, MediaType, Platform, MAX_DOCUMENT_BYTES},
    error::{Error, Kind, Result},
    image::{digest_of, Image},
    ingest::lock_exclusive,
    reference::Reference,
    squashed::FOLDER,
};

/// Most bytes of `index.json`: some 20,000 images.
const MAX_INDEX_BYTES: u64 = 8 << 20;
/// What temporary files in the folder itself begin with.
pub(crate) const TEMPORARY: &str = ".ovbd-";
/// Depth of indexes in indexes.
const MAX_DEPTH: usize = 2;

/// An image layout.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
    root: Arc<OwnedFd>,
}

/// An entry of `index.json`.
#[derive(Clone, Debug)]
pub struct Named {
    /// The name, as it stands there.
    pub name: Option<String>,
    /// The manifest or index.
    pub descriptor: Descriptor,
}

impl Store {
    /// Opens a layout that is there.
    ///
    /// # Errors
    ///
    /// The system's, and a folder that is none.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| Error::io(path, "open", error.into()))?;
        let store = Self {
            path: path.to_owned(),
            root: Arc::new(root),
        };
        let text = store
            .read_file("oci-layout", 4096)
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Error::new(
                    Kind::Missing,
                    path.display(),
                    "not an image layout: it has no file oci-layout",
                ),
                _ => store.fail("read", "oci-layout", error),
            })?;
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Layout {
            image_layout_version: String,
        }
        let layout: Layout = serde_json::from_slice(&text).map_err(|_| {
            Error::invalid(
                path.join("oci-layout").display(),
                "not the file of an image layout",
            )
        })?;
        if !layout.image_layout_version.starts_with("1.") {
            return Err(Error::invalid(
                path.display(),
                "an image layout of another version than 1",
            ));
        }
        Ok(store)
    }

    /// Opens a layout, and makes it where there is nothing.
    ///
    /// # Errors
    ///
    /// The system's, and a folder that holds something else.
    pub fn create(path: &Path) -> Result<Self> {
        let fail = |error| Error::io(path, "make an image layout of", error);
        fs::create_dir_all(path).map_err(fail)?;
        // One at a time: what another process has made must not be made again, and is not foreign.
        let folder = File::open(path).map_err(fail)?;
        lock_exclusive(&folder).map_err(fail)?;
        if !path.join("oci-layout").exists() {
            let ours = |name: &std::ffi::OsStr| {
                ["blobs", "ingest", FOLDER, "index.json", "lost+found"]
                    .iter()
                    .any(|own| name == *own)
                    || name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes())
            };
            let foreign = fs::read_dir(path)
                .map_err(fail)?
                .flatten()
                .any(|entry| !ours(&entry.file_name()));
            if foreign {
                let what = "holds other files and is no image layout: name an empty folder";
                return Err(Error::new(Kind::Refused, path.display(), what));
            }
            fs::create_dir_all(path.join("blobs/sha256")).map_err(fail)?;
            fs::create_dir_all(path.join("ingest")).map_err(fail)?;
            if !path.join("index.json").exists() {
                let index = json!({"schemaVersion": 2, "mediaType": MediaType::OciIndex.name(), "manifests": []});
                replace_file(path, "index.json", index.to_string().as_bytes()).map_err(fail)?;
            }
            replace_file(path, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(fail)?;
        }
        for folder in ["blobs/sha256", "blobs/sha512", "ingest"] {
            fs::create_dir_all(path.join(folder)).map_err(fail)?;
        }
        // A blob is on the disk only with the folders that it is in.
        for folder in ["blobs", "."] {
            File::open(path.join(folder))
                .and_then(|folder| folder.sync_all())
                .map_err(fail)?;
        }
        Self::open(path)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn fail(&self, action: &str, name: &str, error: io::Error) -> Error {
        Error::io(&self.path.join(name), action, error)
    }

    /// Opens something below the folder, without following links.
    pub(crate) fn open_beneath(&self, name: &str, flags: OFlags, mode: Mode) -> io::Result<File> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let file = rustix::fs::openat2(
            &*self.root,
            name,
            flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            mode,
            resolve,
        )?;
        Ok(File::from(file))
    }

    pub(crate) fn folder(&self, name: &str) -> io::Result<File> {
        self.open_beneath(name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    /// Removes the file `name` of `folder`, which is below the folder by no link.
    pub(crate) fn remove(&self, folder: &str, name: &str) -> Result<()> {
        let remove = || -> io::Result<()> {
            let folder = self.folder(folder)?;
            Ok(rustix::fs::unlinkat(&folder, name, AtFlags::empty())?)
        };
        remove().map_err(|error| self.fail("remove", &format!("{folder}/{name}"), error))
    }

    pub(crate) fn read_file(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        // Not blocking, because it may be a FIFO.
        let file = self.open_beneath(name, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > limit {
            return Err(io::Error::other(
                "not a regular file of the size that it can have",
            ));
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Opens a file of the folder `ingest`, which layouts of others do not have yet.
    pub(crate) fn lock_file(&self, name: &str) -> Result<File> {
        let open = || {
            let flags = OFlags::CREATE | OFlags::RDWR;
            self.open_beneath(name, flags, Mode::from_raw_mode(0o600))
        };
        let opened = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                rustix::fs::mkdirat(&*self.root, "ingest", Mode::from_raw_mode(0o755)).ok();
                open()
            }
            opened => opened,
        };
        opened.map_err(|error| self.fail("open", name, error))
    }

    /// Keeps blobs from being removed until it is dropped.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn protect(&self) -> Result<File> {
        let name = "ingest/transfers.lock";
        let lock = self.lock_file(name)?;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::LockShared) {
                Ok(()) => return Ok(lock),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(self.fail("lock", name, error.into())),
            }
        }
    }

    /// Waits until nobody keeps blobs from being removed, and keeps others from that until it is dropped; `waiting`
    /// hears when it has to wait.
    pub(crate) fn exclude(&self, waiting: impl FnOnce()) -> Result<File> {
        let name = "ingest/transfers.lock";
        let lock = self.lock_file(name)?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            waiting();
            lock_exclusive(&lock).map_err(|error| self.fail("lock", name, error))?;
        }
        Ok(lock)
    }

    pub(crate) fn blob_name(digest: &Digest) -> String {
        format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
    }

    /// Path of a blob, whether it is there or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path.join(Self::blob_name(digest))
    }

    /// Opens a blob.
    ///
    /// # Errors
    ///
    /// The system's, and a file that is not as described.
    pub fn open_blob(&self, blob: &Descriptor) -> Result<File> {
        let name = Self::blob_name(&blob.digest);
        let file = self
            .open_beneath(&name, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())
            .map_err(|error| self.fail("open", &name, error))?;
        let metadata = file
            .metadata()
            .map_err(|error| self.fail("look at", &name, error))?;
        if !metadata.is_file() || metadata.len() != blob.size {
            let what = format!(
                "not a file of the {} bytes that the manifest says",
                blob.size
            );
            return Err(Error::invalid(self.path.join(&name).display(), what));
        }
        Ok(file)
    }

    /// Whether the blob is there.
    ///
    /// # Errors
    ///
    /// The system's, and a file of its name that has another size.
    pub fn has_blob(&self, blob: &Descriptor) -> Result<bool> {
        match self.open_beneath(&Self::blob_name(&blob.digest), OFlags::PATH, Mode::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            _ => self.open_blob(blob).map(|_| true),
        }
    }

    /// A blob, to be sent.
    ///
    /// # Errors
    ///
    /// As [`Store::open_blob`].
    pub fn source(&self, blob: &Descriptor) -> Result<FilePart> {
        Ok(FilePart::new(Arc::new(self.open_blob(blob)?), 0, blob.size))
    }

    /// The bytes of a small blob, which have its digest.
    ///
    /// # Errors
    ///
    /// As [`Store::open_blob`], and bytes that are not those of the digest.
    pub fn read_blob(&self, blob: &Descriptor) -> Result<Vec<u8>> {
        let name = Self::blob_name(&blob.digest);
        if blob.size > MAX_DOCUMENT_BYTES {
            return Err(Error::invalid(
                self.path.join(&name).display(),
                "a document of more than 4 MiB",
            ));
        }
        self.read_whole(blob, &name)
    }

    /// The list of the chunks of `blob` that has the digest `digest`; nothing where it is not there.
    ///
    /// # Errors
    ///
    /// As [`Store::read_blob`], and a list that is none or of another blob.
    pub fn chunk_list(&self, blob: &Descriptor, digest: &Digest) -> Result<Option<ChunkList>> {
        match ChunkList::descriptor(blob, digest.clone()) {
            Some(list) if self.has_blob(&list)? => {
                let bytes = self.read_whole(&list, &Self::blob_name(digest))?;
                ChunkList::parse(bytes, blob).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn read_whole(&self, blob: &Descriptor, name: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(blob.size as usize);
        self.open_blob(blob)?
            .take(blob.size)
            .read_to_end(&mut bytes)
            .map_err(|error| self.fail("read", name, error))?;
        if digest_of(&bytes, &blob.digest) != blob.digest {
            return Err(Error::invalid(
                self.path.join(name).display(),
                "damaged: it does not have its digest",
            ));
        }
        Ok(bytes)
    }

    fn index(&self) -> Result<Value> {
        let text = self
            .read_file("index.json", MAX_INDEX_BYTES)
            .map_err(|error| self.fail("read", "index.json", error))?;
        let fail = |what: &str| Error::invalid(self.path.join("index.json").display(), what);
        check_values(&text).map_err(fail)?;
        serde_json::from_slice(&text)
            .map_err(|error| fail(&crate::error::shown(&error.to_string())))
    }

    /// All images, in the order of the layout.
    ///
    /// # Errors
    ///
    /// The system's, and an index that cannot be understood.
    pub fn names(&self) -> Result<Vec<Named>> {
        self.index()?
            .get("manifests")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(|entry| {
                let descriptor = Descriptor::deserialize(entry).map_err(|error| {
                    Error::invalid(
                        self.path.join("index.json").display(),
                        crate::error::shown(&error.to_string()),
                    )
                })?;
                Ok(Named {
                    name: descriptor.annotations.get(REF_NAME).cloned(),
                    descriptor,
                })
            })
            .collect()
    }

    /// The entry that `name` means: the one with exactly this name, or with the reference that it stands for; without a
    /// name the only one there is.
    ///
    /// # Errors
    ///
    /// There is none, or several and no name.
    pub fn find(&self, name: Option<&str>) -> Result<Named> {
        let mut names = self.names()?;
        let missing = |what: String| Error::new(Kind::Missing, self.path.display(), what);
        let Some(name) = name else {
            return match (names.pop(), names.len()) {
                (Some(only), 0) => Ok(only),
                (None, _) => Err(missing("no image in it".to_owned())),
                _ => Err(Error::new(
                    Kind::Refused,
                    self.path.display(),
                    "several images in it: name one, as oci:DIR:NAME",
                )),
            };
        };
        let whole = name.parse::<Reference>().ok();
        let is = |entry: &Named, wanted: &str| entry.name.as_deref() == Some(wanted);
        let by_name = names.iter().position(|entry| is(entry, name)).or_else(|| {
            let whole = whole.as_ref()?.to_string();
            names.iter().position(|entry| is(entry, &whole))
        });
        // A digest names an image whatever it is called.
        let digest = whole
            .as_ref()
            .and_then(Reference::digest)
            .cloned()
            .or_else(|| name.parse().ok());
        let found = by_name.or_else(|| {
            let digest = digest?;
            names
                .iter()
                .position(|entry| entry.descriptor.digest == digest)
        });
        match found {
            Some(found) => Ok(names.swap_remove(found)),
            None => Err(missing(format!("no image {}", crate::error::shown(name)))),
        }
    }

    /// The image that `descriptor` describes, that of `platform` where there are several.
    ///
    /// # Errors
    ///
    /// What cannot be read, and what cannot be an image.
    pub fn image(&self, descriptor: &Descriptor, platform: &Platform) -> Result<Image> {
        let mut descriptor = descriptor.clone();
        let subject = self.path.join(Self::blob_name(&descriptor.digest));
        let subject = subject.display();
        for _ in 0..=MAX_DEPTH {
            let bytes = self.read_blob(&descriptor)?;
            let media_type = MediaType::from_name(&descriptor.media_type).ok_or_else(|| {
                Error::invalid(&subject, "neither a manifest nor an index of OCI or Docker")
            })?;
            match Document::parse(&bytes, media_type, &subject)? {
                Document::Index(index) => descriptor = index.select(platform, &subject)?.clone(),
                Document::Manifest(manifest) => {
                    let config = self.read_blob(&manifest.config)?;
                    descriptor.annotations.clear();
                    return Image::new(&subject, descriptor, bytes, *manifest, config);
                }
            }
        }
        Err(Error::invalid(subject, "an index in an index in an index"))
    }

    /// Gives the name `name` to `descriptor`, whose blobs are all there. Whatever had the name loses it; its digest is given
    /// back if it was another one.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn set_name(&self, name: &str, descriptor: &Descriptor) -> Result<Option<Digest>> {
        let mut entry = descriptor.clone();
        entry
            .annotations
            .insert(REF_NAME.to_owned(), name.to_owned());
        entry
            .annotations
            .insert(CONTAINERD_NAME.to_owned(), name.to_owned());
        let entry = serde_json::to_value(entry).unwrap_or_default();
        self.edit_index(|entries| {
            let mut before = None;
            entries.retain(|old| {
                let same = name_of(old) == Some(name);
                if same {
                    before = old
                        .get("digest")
                        .and_then(Value::as_str)
                        .and_then(|digest| digest.parse().ok());
                }
                // skopeo leaves images without a name: this is the same one with a name now.
                let unnamed = name_of(old).is_none() && old.get("digest") == entry.get("digest");
                !same && !unnamed
            });
            entries.push(entry.clone());
            before.filter(|before| *before != descriptor.digest)
        })
    }

    /// Takes the name away; false if nothing has it. Blobs stay until they are swept.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn remove_name(&self, name: &str) -> Result<bool> {
        self.edit_index(|entries| {
            let count = entries.len();
            entries.retain(|entry| name_of(entry) != Some(name));
            entries.len() < count
        })
    }

    fn edit_index<T>(&self, edit: impl FnOnce(&mut Vec<Value>) -> T) -> Result<T> {
        let lock = self.lock_file("ingest/index.lock")?;
        lock_exclusive(&lock).map_err(|error| self.fail("lock", "ingest/index.lock", error))?;
        let mut index = self.index()?;
        let entries = index
            .as_object_mut()
            .map(|index| index.entry("manifests").or_insert_with(|| json!([])))
            .and_then(Value::as_array_mut)
            .ok_or_else(|| {
                Error::invalid(self.path.join("index.json").display(), "not an index")
            })?;
        let result = edit(entries);
        replace_file(&self.path, "index.json", index.to_string().as_bytes())
            .map_err(|error| self.fail("replace", "index.json", error))?;
        Ok(result)
    }

    /// Bytes that the file system of the store has left for us.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn free_bytes(&self) -> Result<u64> {
        let space = rustix::fs::fstatvfs(&*self.root)
            .map_err(|error| Error::io(&self.path, "look at", error.into()))?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }
}

fn name_of(entry: &Value) -> Option<&str> {
    entry.get("annotations")?.get(REF_NAME)?.as_str()
}

/// Puts a file with `bytes` in the place of `name` in `folder`, at once and for good.
fn replace_file(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(folder.join(name))
        .map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::{
        manifest::{Config, Manifest, RootFs, OCI_CONFIG, OCI_LAYER},
        Bounded,
    };

    /// A store with one image of one layer.
    fn store(folder: &Path, name: &str) -> (Store, Descriptor) {
        let store = Store::create(folder).unwrap();
        let layer = Descriptor::of(OCI_LAYER, b"layer");
        let config = Config {
            architecture: Platform::here().architecture,
            os: "linux".to_owned(),
            rootfs: RootFs {
                kind: "layers".to_owned(),
                diff_ids: Bounded(vec![layer.digest.clone()]),
            },
            history: Vec::new(),
            other: serde_json::Map::new(),
        }
        .to_bytes();
        let manifest = Manifest::new(
            MediaType::OciManifest,
            Descriptor::of(OCI_CONFIG, &config),
            vec![layer.clone()],
        );
        let bytes = manifest.to_bytes();
        let descriptor = Descriptor::of(MediaType::OciManifest.name(), &bytes);
        store.put(&layer, b"layer").unwrap();
        store.put(&manifest.config, &config).unwrap();
        store.put(&descriptor, &bytes).unwrap();
        store.set_name(name, &descriptor).unwrap();
        (store, descriptor)
    }

    #[test]
    fn names_come_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let (store, descriptor) = store(folder.path(), "h.x/a:1");
        store
            .set_name("docker.io/library/web:latest", &descriptor)
            .unwrap();
        for name in [
            "h.x/a:1",
            "web",
            "docker.io/library/web",
            &descriptor.digest.to_string(),
            &format!("h.y/z@{}", descriptor.digest),
        ] {
            assert_eq!(
                store.find(Some(name)).unwrap().descriptor.digest,
                descriptor.digest,
                "{name}"
            );
        }
        assert!(store.find(Some("h.x/a:2")).is_err());
        assert!(store.find(None).unwrap_err().what().contains("several"));
        let image = store
            .image(
                &store.find(Some("web")).unwrap().descriptor,
                &Platform::here(),
            )
            .unwrap();
        assert_eq!(image.layers().count(), 1);
        assert!(store.remove_name("h.x/a:1").unwrap());
        assert!(!store.remove_name("h.x/a:1").unwrap());
        assert_eq!(
            store.find(None).unwrap().name.unwrap(),
            "docker.io/library/web:latest"
        );
    }

    #[test]
    fn what_others_wrote_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (store, descriptor) = store(folder.path(), "a.x/a:1");
        let path = folder.path().join("index.json");
        let text = fs::read_to_string(&path).unwrap().replace(
            "\"schemaVersion\"",
            "\"theirs\":{\"x\":1},\"schemaVersion\"",
        );
        fs::write(&path, text).unwrap();
        store.set_name("b.x/b:1", &descriptor).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("\"theirs\""));
    }

    #[test]
    fn folders_of_others_and_links_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "x").unwrap();
        assert_eq!(
            Store::create(folder.path()).unwrap_err().kind(),
            Kind::Refused
        );
        assert_eq!(
            Store::open(folder.path()).unwrap_err().kind(),
            Kind::Missing
        );

        let folder = tempfile::tempdir().unwrap();
        let (store, descriptor) = store(folder.path(), "a.x/a:1");
        let blob = store.blob_path(&descriptor.digest);
        let outside = tempfile::tempdir().unwrap();
        let copy = outside.path().join("copy");
        fs::copy(&blob, &copy).unwrap();
        fs::remove_file(&blob).unwrap();
        symlink(&copy, &blob).unwrap();
        assert!(store.read_blob(&descriptor).is_err());
        fs::remove_file(&blob).unwrap();
        fs::remove_dir_all(folder.path().join("blobs/sha512")).unwrap();
        symlink(outside.path(), folder.path().join("blobs/sha512")).unwrap();
        assert!(store.folder("blobs/sha512").is_err());
    }

    #[test]
    fn many_make_a_store_and_none_loses_a_name() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store");
            let descriptor = Descriptor::of(MediaType::OciManifest.name(), b"{}");
            std::thread::scope(|scope| {
                for number in 0..8 {
                    let (path, descriptor) = (&path, &descriptor);
                    scope.spawn(move || {
                        let store = Store::create(path).unwrap();
                        let name = format!("a.x/a:{number}");
                        store.set_name(&name, descriptor).unwrap();
                    });
                }
            });
            assert_eq!(Store::open(&path).unwrap().names().unwrap().len(), 8);
        }
    }

    #[test]
    fn damaged_documents_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let (store, descriptor) = store(folder.path(), "a.x/a:1");
        let blob = store.blob_path(&descriptor.digest);
        let text = fs::read_to_string(&blob).unwrap();
        fs::remove_file(&blob).unwrap();
        fs::write(&blob, text.replace("layer.v1.tar", "layer.v1.tat")).unwrap();
        assert!(store
            .read_blob(&descriptor)
            .unwrap_err()
            .what()
            .contains("damaged"));
        fs::write(&blob, "short").unwrap();
        assert!(store.has_blob(&descriptor).is_err());
    }
}
