// SPDX-License-Identifier: GPL-2.0

//! What the tests of registries share: images to send, a scripted registry, a proxy that breaks connections, and Debian's
//! docker-registry.

#![allow(dead_code, missing_docs)]

pub mod proxy;
pub mod scripted;
pub mod server;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use ovbd_oci::{
    send_blobs, Bounded, Config, Descriptor, Digest, Error, Event, Image, Keychain, Manifest,
    MediaType, Options, Outgoing, Platform, Progress, Reference, Registry, Retries, RootFs, Store,
    OCI_CONFIG, OCI_LAYER,
};

/// Numbers that look random and are always the same.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..count.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .collect();
        bytes.truncate(count);
        bytes
    }
}

/// An image in memory.
#[derive(Clone)]
pub struct Made {
    pub layers: Vec<Vec<u8>>,
    pub config: Vec<u8>,
    pub manifest: Manifest,
    pub bytes: Vec<u8>,
}

/// An image with layers of these sizes.
pub fn made(seed: u64, sizes: &[usize]) -> Made {
    let mut random = Random(seed | 1);
    made_of(sizes.iter().map(|size| random.bytes(*size)).collect())
}

pub fn made_of(layers: Vec<Vec<u8>>) -> Made {
    let descriptors: Vec<Descriptor> = layers
        .iter()
        .map(|layer| Descriptor::of(OCI_LAYER, layer))
        .collect();
    let config = Config {
        architecture: Platform::here().architecture,
        os: "linux".to_owned(),
        rootfs: RootFs {
            kind: "layers".to_owned(),
            diff_ids: Bounded(
                descriptors
                    .iter()
                    .map(|layer| layer.digest.clone())
                    .collect(),
            ),
        },
        history: Vec::new(),
        other: serde_json::Map::new(),
    }
    .to_bytes();
    let manifest = Manifest::new(
        MediaType::OciManifest,
        Descriptor::of(OCI_CONFIG, &config),
        descriptors,
    );
    let bytes = manifest.to_bytes();
    Made {
        layers,
        config,
        manifest,
        bytes,
    }
}

impl Made {
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    fn outgoing(&self, from: &[String]) -> Vec<Outgoing<'static>> {
        let layers = self.manifest.layers.iter().cloned().zip(&self.layers);
        let config = (self.manifest.config.clone(), &self.config);
        let out = |(blob, bytes): (Descriptor, &Vec<u8>)| Outgoing {
            blob,
            source: Box::new(bytes.clone()),
            from: from.to_vec(),
        };
        layers.chain([config]).map(out).collect()
    }

    /// Sends all of it.
    pub fn push(
        &self,
        registry: &Registry,
        from: &[String],
        notes: Option<&Store>,
        progress: &dyn Progress,
    ) -> Result<(), Error> {
        self.push_jobs(registry, from, notes, progress, 2)
    }

    /// Sends all of it, so many blobs at once.
    pub fn push_jobs(
        &self,
        registry: &Registry,
        from: &[String],
        notes: Option<&Store>,
        progress: &dyn Progress,
        jobs: usize,
    ) -> Result<(), Error> {
        send_blobs(registry, &self.outgoing(from), jobs, notes, progress)?;
        let tag = registry.reference().target();
        assert_eq!(
            registry.put_document(&tag, MediaType::OciManifest.name(), &self.bytes)?,
            self.digest()
        );
        Ok(())
    }
}

/// Fetches an image into a store, and names it there.
pub fn pull(registry: &Registry, store: &Store, progress: &dyn Progress) -> Result<Image, Error> {
    let _guard = store.protect()?;
    let image = registry.image(&Platform::here())?;
    ovbd_oci::fetch_blobs(registry, store, &image.manifest.layers, 2, progress)?;
    store.put(&image.manifest.config, &image.config_bytes)?;
    store.put(&image.descriptor, &image.manifest_bytes)?;
    store.set_name(&registry.reference().to_string(), &image.descriptor)?;
    Ok(image)
}

pub fn reference(host: &str, rest: &str) -> Reference {
    format!("{host}/{rest}").parse().unwrap()
}

/// Quick to give up and to try again.
pub fn options() -> Options {
    Options {
        plain_http: true,
        retries: Retries {
            tries: 4,
            first: Duration::from_millis(2),
        },
        stall: Duration::from_secs(30),
        ..Options::default()
    }
}

/// Options with a password for `host`, saved in `file`.
pub fn signed_in(options: Options, file: &Path, host: &str, password: &str) -> Options {
    let keychain = Keychain::new(Some(file), |_| None);
    keychain.save(host, "me", password).unwrap();
    Options {
        keychain: keychain.into(),
        ..options
    }
}

pub fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path()).unwrap();
    (folder, store)
}

/// Writes down what happens, without what happens often.
#[derive(Default)]
pub struct Events(Arc<Mutex<Vec<String>>>);

impl Events {
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Progress for Events {
    fn event(&self, _blob: &Digest, event: Event<'_>) {
        let text = match event {
            Event::At(_) => return,
            Event::Started { .. } => "started".to_owned(),
            Event::Waiting { why, .. } => format!("waiting: {why}"),
            Event::Elsewhere => "elsewhere".to_owned(),
            Event::Done => "done".to_owned(),
            Event::Present => "present".to_owned(),
            Event::Mounted { from } => format!("mounted {from}"),
        };
        self.0.lock().unwrap().push(text);
    }
}

/// Whether everything in the store is as it must be.
pub fn is_clean(store: &Store) {
    let damage = store.check(|_| ()).unwrap();
    assert!(damage.is_empty(), "{damage:?}");
}
