// SPDX-License-Identifier: GPL-2.0

//! A stack that is sealed again by its changes alone has the seal that reading all of it gives; what it is made of is
//! checked against the old root, and nothing else is read.

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use common::{layers, make, plain, raw_image, Random};
use ovbd_image::lsmt::Identity;
use ovbd_layers::{
    build::{finish_output, start_blob, Options},
    content_hash::uuid_text,
    layer::Layer,
    layer_writer::LayerWriter,
    seal::{seal, Sealed},
    verity::Geometry,
    Result,
};
use tempfile::{tempdir, TempDir};

const BLOCK: u64 = 4096;

/// Layers that are made one after the other, uncompressed: a changed byte is a changed byte.
struct Images {
    folder: TempDir,
    layers: Vec<PathBuf>,
    random: Random,
    bytes: u64,
}

impl Images {
    fn new(bytes: u64) -> Self {
        let folder = tempdir().unwrap();
        let (raw, base) = (folder.path().join("raw"), folder.path().join("base"));
        raw_image(&raw, bytes, bytes);
        // So that no block that is not zeros is missing.
        let file = File::options().write(true).open(&raw).unwrap();
        file.write_all_at(&[1], bytes - 1).unwrap();
        make(&raw, &base, &plain());
        Self {
            folder,
            layers: vec![base],
            random: Random::new(bytes),
            bytes,
        }
    }

    fn options(&self) -> Options {
        let paths: Vec<&Path> = self.layers.iter().map(PathBuf::as_path).collect();
        Options {
            base: layers(&paths),
            ..plain()
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Seals the stack.
    fn seal(&mut self, name: &str, old: Option<&Sealed>) -> Result<Sealed> {
        let path = self.path(name);
        let sealed = seal(&path, &self.options(), old.map(|old| old.root), &())?;
        self.layers.push(path);
        Ok(sealed)
    }

    /// Puts a layer on top that changes these sectors, each data or zeros.
    fn change(&mut self, name: &str, virtual_size: u64, ranges: &[(u64, u64)]) {
        let path = self.path(name);
        let options = self.options();
        let below = Layer::open(options.base.last().unwrap(), 0).unwrap();
        let identity = Identity {
            virtual_size,
            uuid: uuid_text(uuid::Uuid::from_u128(self.random.next().into())),
            parent_uuid: below.uuid().unwrap(),
        };
        let output = options.create_file(&path, &[]).unwrap();
        let (blob, start) = start_blob(&output, &path, &options).unwrap();
        let mut layer = LayerWriter::new(blob, &path, &identity).unwrap();
        layer.set_blank(0);
        for (number, (from, to)) in ranges.iter().enumerate() {
            match self.random.below(4) {
                // The first one is a change in any case.
                0 if number > 0 => layer.zeros(*from, to - from).unwrap(),
                _ => {
                    let data = self.random.bytes(((to - from) * 512) as usize);
                    layer.data(*from, &data).unwrap();
                }
            }
        }
        let end = layer.finish(&identity).unwrap();
        finish_output(output, &options, start, end).unwrap();
        self.layers.push(path);
    }

    /// Sectors that have nothing to do with blocks.
    fn ranges(&mut self, count: usize) -> Vec<(u64, u64)> {
        let end = self.bytes.div_ceil(512);
        let mut places: Vec<u64> = (0..2 * count).map(|_| self.random.below(end + 1)).collect();
        places.sort_unstable();
        let pairs = places.chunks(2).map(|pair| (pair[0], pair[1]));
        // Mostly short ones.
        let pairs = pairs.map(|(from, to)| (from, to.min(from + 1 + from % 40)));
        let ranges: Vec<_> = pairs.filter(|(from, to)| from < to).collect();
        match ranges.is_empty() {
            true => vec![(0, 1)],
            false => ranges,
        }
    }

    /// The layer that was made last is not in the stack any more.
    fn drop_top(&mut self) -> Vec<u8> {
        fs::read(self.layers.pop().unwrap()).unwrap()
    }
}

/// Flips a bit of a layer that is not compressed, of what it stores for byte `at` of the image.
fn damage(path: &Path, at: u64) {
    let layer = Layer::open(&layers(&[path])[0], 0).unwrap();
    let sector = at / 512;
    let mut segments = layer.segments().iter();
    let segment = segments
        .find(|segment| (segment.start()..segment.end()).contains(&sector))
        .unwrap();
    let place = (segment.stored() + sector - segment.start()) * 512 + at % 512;
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 4], place).unwrap();
}

#[test]
fn the_seal_is_the_same() {
    for bytes in [
        BLOCK + 512,
        2 * BLOCK,
        128 * BLOCK,
        129 * BLOCK - 512,
        (40 << 20) + 512,
    ] {
        let mut images = Images::new(bytes);
        let mut old = images.seal("seal", None).unwrap();
        for round in 0..3 {
            let count = if bytes < 1 << 20 { 2 } else { 60 };
            for part in 0..=round {
                // Of the image's size, or of that with the tree.
                let size = match part % 2 {
                    0 => bytes,
                    _ => Geometry::new(old.data_bytes).unwrap().bytes(),
                };
                let mut ranges = images.ranges(count);
                if part == 2 && bytes > BLOCK {
                    // Somebody wrote to the tree.
                    let tree = old.data_bytes / 512 + 9;
                    ranges.push((tree, tree + 3));
                }
                images.change(&format!("change{round}.{part}"), size.max(bytes), &ranges);
            }
            let name = format!("seal{round}");
            let all = images.seal(&name, None).unwrap();
            let whole = images.drop_top();
            fs::remove_file(images.path(&name)).unwrap();
            let changed = images.seal(&name, Some(&old)).unwrap();
            assert_eq!(changed, all, "{bytes} {round}");
            let made = fs::read(images.path(&name)).unwrap();
            assert!(made == whole, "{bytes} {round}: other bytes");
            old = changed;
        }
    }
}

#[test]
fn only_what_changed_is_read_and_that_is_checked() {
    let bytes = 40 << 20;
    let mut images = Images::new(bytes);
    let old = images.seal("seal", None).unwrap();
    let raw = fs::read(images.path("raw")).unwrap();
    let blocks = raw.chunks(BLOCK as usize).zip(0..);
    let stored: Vec<u64> = blocks
        .filter(|(block, _)| block.iter().any(|byte| *byte != 0))
        .map(|(_, number)| number)
        .collect();
    let (partial, whole) = (stored[3], stored[stored.len() / 2]);
    let other = stored[stored.len() - 9];
    images.change(
        "change",
        bytes,
        &[
            (partial * 8 + 3, partial * 8 + 4),
            (whole * 8, whole * 8 + 8),
        ],
    );
    let try_again = |images: &mut Images, root: &Sealed| {
        let _ = fs::remove_file(images.path("again"));
        let result = images.seal("again", Some(root));
        if result.is_ok() {
            images.drop_top();
        }
        result.map_err(|e| e.to_string())
    };
    let again = try_again(&mut images, &old).unwrap();

    let (base, seal) = (images.path("base"), images.path("seal"));
    let levels = old.data_bytes + BLOCK;
    // With 10240 blocks of data there are a root block and 80 blocks of digests.
    let digests = |block: u64| levels + BLOCK + block / 128 * BLOCK;
    assert_ne!(
        digests(partial),
        digests(other),
        "they share no block of digests"
    );
    for (layer, at) in [
        (&base, other * BLOCK),
        // All of it was written anew.
        (&base, whole * BLOCK + 100),
        (&seal, digests(other)),
    ] {
        damage(layer, at);
        assert_eq!(try_again(&mut images, &old), Ok(again.clone()), "byte {at}");
        damage(layer, at);
    }
    for (layer, at, what) in [
        (
            &base,
            partial * BLOCK,
            format!("block {partial} of the image is not what was sealed"),
        ),
        (
            &seal,
            digests(partial) + 77,
            format!(
                "block {} of the hash tree is not what was sealed",
                digests(partial) / BLOCK
            ),
        ),
        (&seal, levels + 77, "with that root hash".to_owned()),
    ] {
        damage(layer, at);
        let said = try_again(&mut images, &old).unwrap_err();
        assert!(said.contains(&what), "{said}");
        damage(layer, at);
        assert!(!images.path("again").exists());
    }
    let mut wrong = old.clone();
    wrong.root[31] ^= 1;
    let said = try_again(&mut images, &wrong).unwrap_err();
    assert!(said.contains("with that root hash"), "{said}");
    assert_eq!(try_again(&mut images, &old), Ok(again));
}
