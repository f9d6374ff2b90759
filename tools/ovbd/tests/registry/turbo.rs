// SPDX-License-Identifier: GPL-2.0

//! Images of TurboOCI layers, as the original's converter pushes them: a small tar with the metadata of file systems, and an
//! annotation that names a layer of the original image in the same repository.

use std::{fs, io::Write as _};

use ovbd_image::lsmt::Entry;
use ovbd_oci::{Config, Descriptor, Digest};

use crate::{
    layers::{self, tars::Tar, turbo::blob, Random},
    registry::{made_of, scripted::Scripted, Made},
    Place,
};

const TARGET: &str = "containerd.io/snapshot/overlaybd/turbo-oci/target-digest";
const OLD_TARGET: &str = "containerd.io/snapshot/overlaybd/fastoci/target-digest";

/// In two members, of which the original reads one.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let (one, two) = bytes.split_at(bytes.len() / 3);
    let mut packed = Vec::new();
    for part in [one, two] {
        let mut encoder = flate2::write::GzEncoder::new(&mut packed, flate2::Compression::fast());
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap();
    }
    packed
}

/// A layer as the converter packs it.
fn packed(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = Tar::default();
    for (name, content) in files {
        tar = tar.file(name, content);
    }
    gzip(&tar.file(".turbo.ociv1", b"").end())
}

/// A layer, and the annotation of its target if it is TurboOCI.
type Stored<'a> = (Vec<u8>, Option<(&'a str, Digest)>);

/// An image of these layers.
fn image(stored: Vec<Stored<'_>>) -> Made {
    let (bytes, targets): (Vec<_>, Vec<_>) = stored.into_iter().unzip();
    let mut made = made_of(bytes);
    for (layer, target) in made.manifest.layers.0.iter_mut().zip(targets) {
        let Some((name, digest)) = target else {
            continue;
        };
        layer.media_type = "application/vnd.oci.image.layer.v1.tar+gzip".to_owned();
        let notes = &mut layer.annotations;
        notes.insert(name.to_owned(), digest.to_string());
    }
    let env = serde_json::json!({ "Env": ["A=1"] });
    let mut config = Config::parse(&made.config, &"x").unwrap();
    config.other.insert("config".to_owned(), env);
    made.config = config.to_bytes();
    made.manifest.config = Descriptor::of(&made.manifest.config.media_type, &made.config);
    made.bytes = made.manifest.to_bytes();
    made
}

fn hold_blob(server: &Scripted, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let mut state = server.state.lock().unwrap();
    state.blobs.insert(digest.to_string(), bytes.to_vec());
    digest
}

fn entry(start: u64, sectors: u32, stored: u64, tag: u8) -> Entry {
    Entry {
        start,
        sectors,
        stored,
        zeroed: false,
        tag,
    }
}

/// Two tars and the metadata of both, the second of which goes over the first; and what all of it reads.
struct Two {
    tars: [Vec<u8>; 2],
    metas: [Vec<u8>; 2],
    wanted: Vec<u8>,
}

impl Two {
    fn new() -> Self {
        let mut random = Random::new(3);
        let tars = [random.bytes(40 * 512), random.bytes(30 * 512)];
        let data = [random.bytes(4 * 512), random.bytes(512)];
        let entries = [
            vec![entry(0, 4, 8, 0), entry(8, 30, 2, 1)],
            vec![entry(2, 1, 8, 0), entry(20, 8, 22, 1)],
        ];
        let mut wanted = vec![0; layers::turbo::VIRTUAL_BYTES as usize];
        let mut put = |sector: usize, bytes: &[u8]| {
            wanted[sector * 512..][..bytes.len()].copy_from_slice(bytes);
        };
        put(0, &data[0]);
        put(8, &tars[0][2 * 512..32 * 512]);
        put(2, &data[1]);
        put(20, &tars[1][22 * 512..]);
        Self {
            metas: [0, 1].map(|number| blob(&data[number], &entries[number])),
            tars,
            wanted,
        }
    }
}

#[test]
fn each_layer_and_its_target_become_one() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let two = Two::new();
    let targets = [
        gzip(&two.tars[0]),
        zstd::encode_all(&two.tars[1][..], 1).unwrap(),
    ]
    .map(|target| hold_blob(&server, &target));
    let files = |number: usize| {
        let meta = &two.metas[number][..];
        // The original takes the metadata of EROFS where it is in all of them.
        match number {
            0 => packed(&[("erofs.fs.meta", b"no"), ("./ext4.fs.meta", meta)]),
            _ => packed(&[("ext4.fs.meta", meta), ("gzip.meta", b"not read")]),
        }
    };
    let made = image(vec![
        (files(0), Some((TARGET, targets[0].clone()))),
        (files(1), Some((OLD_TARGET, targets[1].clone()))),
    ]);
    server.hold("x/y", "turbo", &made);
    let name = format!("{host}/x/y:turbo");
    here.good(&format!("pull --plain-http --store s {name}"));
    let is_wanted = |place: &Place, name: &str| {
        place.good(&format!(
            "export -f --store s --ignore-parents {name} -o raw"
        ));
        assert!(fs::read(place.path().join("raw")).unwrap() == two.wanted);
    };
    is_wanted(&here, &name);
    // The tars can be checked and are there, as in layers that were made of them.
    let ids = two.tars.each_ref().map(|tar| Digest::of(tar));
    here.good(&format!(
        "verify --store s --ignore-parents --diff-id {} --diff-id {} {name}",
        ids[0], ids[1]
    ));
    for (number, tar) in two.tars.iter().enumerate() {
        here.good(&format!(
            "export -f --store s --tar={number} {name} -o back"
        ));
        assert!(fs::read(here.path().join("back")).unwrap() == *tar);
    }
    let manifest = here.json(&format!("inspect --store s --raw {name}"));
    for (layer, id) in manifest["layers"].as_array().unwrap().iter().zip(&ids) {
        let notes = &layer["annotations"];
        assert_eq!(notes["vnd.dm-overlaybd.tar-diff-id"], id.to_string());
        let kind = &notes["containerd.io/snapshot/overlaybd/blob-fs-type"];
        assert_eq!(kind, "ext4");
        assert!(notes.get(TARGET).is_none());
    }
    let from = &manifest["annotations"]["vnd.dm-overlaybd.restored-from"];
    assert_eq!(*from, made.digest().to_string());
    // Nothing else is needed any more: it is an image like others.
    here.good("gc --store s --older 0");
    is_wanted(&here, &name);
    here.good(&format!(
        "push --plain-http --store s {name} {host}/x/y:blocks"
    ));
    let other = Place::new();
    let blocks = format!("{host}/x/y:blocks");
    other.good(&format!("pull --plain-http --store s {blocks}"));
    is_wanted(&other, &blocks);
    // The same again is the same.
    let digest = |place: &Place| {
        let text = place.good(&format!("pull --plain-http --store s {name}"));
        text.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(digest(&here), digest(&other));
}

/// The converter may put a layer with an empty file system first.
#[test]
fn over_an_ordinary_layer() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    let read = |name: &str| fs::read(here.path().join(name)).unwrap();
    let two = Two::new();
    let target = hold_blob(&server, &gzip(&two.tars[1]));
    let top = packed(&[("ext4.fs.meta", &two.metas[1])]);
    let stored = vec![(read("one.layer"), None), (top, Some((TARGET, target)))];
    server.hold("x/y", "mixed", &image(stored));
    let name = format!("{host}/x/y:mixed");
    // One that was made for nothing in particular does not say what is below it.
    here.good(&format!(
        "pull --plain-http --store s --ignore-parents {name}"
    ));
    here.good(&format!("export --store s --ignore-parents {name} -o raw"));
    let mut wanted = read("one.raw");
    wanted.truncate(two.wanted.len());
    for sectors in [2..3, 20..28] {
        let range = sectors.start * 512..sectors.end * 512;
        wanted[range.clone()].copy_from_slice(&two.wanted[range]);
    }
    assert!(read("raw") == wanted);
    let manifest = here.json(&format!("inspect --store s --raw {name}"));
    let digest = &manifest["layers"][0]["digest"];
    assert_eq!(*digest, Digest::of(&read("one.layer")).to_string());
}

#[test]
fn what_the_original_made() {
    let Some(case) = layers::fixtures().map(|all| all.join("x-turbooci")) else {
        return;
    };
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let tar = fs::read(case.join("target0.tar")).unwrap();
    let meta = fs::read(case.join("layer0")).unwrap();
    let target = hold_blob(&server, &gzip(&tar));
    let made = image(vec![(
        packed(&[("ext4.fs.meta", &meta)]),
        Some((TARGET, target)),
    )]);
    server.hold("x/y", "turbo", &made);
    let name = format!("{host}/x/y:turbo");
    here.good(&format!("pull --plain-http --store s {name}"));
    here.good(&format!(
        "verify --store s --diff-id {} {name}",
        Digest::of(&tar)
    ));
    here.good(&format!("export --store s {name} -o raw"));
    let case = fs::read_to_string(case.join("case.json")).unwrap();
    let case: serde_json::Value = serde_json::from_str(&case).unwrap();
    let raw = Digest::of(&fs::read(here.path().join("raw")).unwrap());
    assert_eq!(raw.hex(), case["sha256"].as_str().unwrap());
}

#[test]
fn images_that_lack_something() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let two = Two::new();
    let meta = &two.metas[0][..];
    let target = gzip(&two.tars[0]);
    let known = hold_blob(&server, &target);
    let small = hold_blob(&server, &two.tars[0][..5000]);
    let lying = Digest::of(b"other");
    let state = &server.state;
    state
        .lock()
        .unwrap()
        .blobs
        .insert(lying.to_string(), target.clone());
    let bomb = hold_blob(&server, &gzip(&vec![0; 20 << 20]));
    let ext4 = packed(&[("ext4.fs.meta", meta)]);
    let erofs = packed(&[("erofs.fs.meta", meta)]);
    let mut cut = packed(&[("ext4.fs.meta", meta)]);
    cut.truncate(cut.len() / 2);
    type Case<'a> = (&'a str, Vec<(Vec<u8>, Digest)>, &'a str);
    let cases: Vec<Case<'_>> = vec![
        (
            "missing",
            vec![(ext4.clone(), Digest::of(b"none"))],
            "cannot be found",
        ),
        ("another", vec![(ext4.clone(), lying)], "have the digest"),
        (
            "small",
            vec![(ext4.clone(), small)],
            "beyond the 5000 bytes",
        ),
        ("bomb", vec![(ext4.clone(), bomb)], "--max-size"),
        (
            "mixed",
            vec![(ext4.clone(), known.clone()), (erofs, known.clone())],
            "do not all have",
        ),
        (
            "bare",
            vec![(packed(&[]), known.clone())],
            "do not all have",
        ),
        ("cut", vec![(cut, known.clone())], "damaged"),
        (
            "noise",
            vec![(packed(&[("ext4.fs.meta", &[7; 9000])]), known.clone())],
            "not a layer",
        ),
        (
            "large",
            vec![(
                packed(&[("ext4.fs.meta", &vec![0; 20 << 20])]),
                known.clone(),
            )],
            "--max-size",
        ),
    ];
    for (tag, stored, says) in cases {
        let stored = stored.into_iter();
        let stored = stored.map(|(bytes, target)| (bytes, Some((TARGET, target))));
        server.hold("x/y", tag, &image(stored.collect()));
        let said = here.bad(&format!(
            "pull --plain-http --store s --retries 1 --max-size 10M {host}/x/y:{tag}"
        ));
        assert!(said.contains(says), "{tag}: {said}");
    }
    let mut made = image(vec![(ext4, Some((TARGET, known)))]);
    let notes = &mut made.manifest.layers.0[0].annotations;
    notes.remove(TARGET);
    let version = "containerd.io/snapshot/overlaybd/version";
    notes.insert(version.to_owned(), "0.1.0-turbo.ociv1".to_owned());
    made.bytes = made.manifest.to_bytes();
    server.hold("x/y", "unnamed", &made);
    let said = here.bad(&format!("pull --plain-http --store s {host}/x/y:unnamed"));
    assert!(said.contains("without the digest of its target"), "{said}");
    assert_eq!(here.good("images --store s"), "");
}
