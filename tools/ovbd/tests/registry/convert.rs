// SPDX-License-Identifier: GPL-2.0

//! Ordinary container images that become block layers over their tars.

use std::{fs, io::Write as _};

use ovbd_oci::{Bounded, Config, Descriptor, Digest};

use crate::{
    layers::{programs::has, tars::Tar, Random},
    registry::{made_of, scripted::Scripted, Made},
    Place,
};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image of `tars`, each with its media type and as it is stored.
fn ordinary(tars: &[Vec<u8>], stored: Vec<(&str, Vec<u8>)>) -> Made {
    let (types, layers): (Vec<_>, Vec<_>) = stored.into_iter().unzip();
    let mut made = made_of(layers);
    let mut config = Config::parse(&made.config, &"x").unwrap();
    config.rootfs.diff_ids = Bounded(tars.iter().map(|tar| Digest::of(tar)).collect());
    let env = serde_json::json!({ "Env": ["A=1"], "Cmd": ["/bin/sh"] });
    config.other.insert("config".to_owned(), env);
    made.config = config.to_bytes();
    made.manifest.config = Descriptor::of(&made.manifest.config.media_type, &made.config);
    for (layer, kind) in made.manifest.layers.0.iter_mut().zip(types) {
        layer.media_type = format!("application/vnd.oci.image.layer.v1.tar{kind}");
    }
    made.bytes = made.manifest.to_bytes();
    made
}

fn three_tars() -> Vec<Vec<u8>> {
    let mut random = Random::new(5);
    let one = Tar::default()
        .folder("bin")
        .file("bin/sh", &random.text(300_000))
        .folder("etc")
        .file("etc/gone", &random.bytes(9000));
    // As of WORKDIR and the like.
    let two = Tar::default();
    let three = Tar::default()
        .file("etc/.wh.gone", b"")
        .file("etc/new", &random.bytes(7000));
    [one, two, three].map(Tar::end).to_vec()
}

#[test]
fn an_ordinary_image_becomes_block_layers() {
    if !has("mkfs.erofs") {
        return;
    }
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let tars = three_tars();
    let stored = vec![
        ("+gzip", gzip(&tars[0])),
        ("", tars[1].clone()),
        ("+zstd", zstd::encode_all(&tars[2][..], 1).unwrap()),
    ];
    let original = ordinary(&tars, stored);
    server.hold("x/y", "1", &original);
    let name = format!("{host}/x/y:1");
    let pull = format!("pull --plain-http --store s --convert {name}");
    let said = here.good(&pull);
    assert!(said.contains("3 layers"), "{said}");
    // Whoever has the original's configuration can check each layer, and have the tars back.
    let ids: Vec<String> = tars
        .iter()
        .map(|tar| format!("--diff-id {}", Digest::of(tar)))
        .collect();
    let ids = ids.join(" ");
    here.good(&format!("verify --store s {ids} {name}"));
    for (number, tar) in tars.iter().enumerate() {
        here.good(&format!(
            "export --store s --tar={number} {name} -f -o back.tar"
        ));
        assert!(fs::read(here.path().join("back.tar")).unwrap() == *tar);
    }
    let manifest = here.good(&format!("inspect --store s --raw {name}"));
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["subject"]["digest"], original.digest().to_string());
    for (layer, tar) in manifest["layers"].as_array().unwrap().iter().zip(&tars) {
        let note = |name: &str| layer["annotations"][name].as_str().unwrap().to_owned();
        assert_eq!(
            note("vnd.dm-overlaybd.tar-diff-id"),
            Digest::of(tar).to_string()
        );
        assert_eq!(note("vnd.dm-overlaybd.tar-bytes"), tar.len().to_string());
        assert_eq!(
            note("containerd.io/snapshot/overlaybd/blob-fs-type"),
            "erofs"
        );
    }
    let config = manifest["config"]["digest"]
        .as_str()
        .unwrap()
        .replace(':', "/");
    let config = fs::read_to_string(here.path().join("s/blobs").join(config)).unwrap();
    assert!(config.contains("\"Cmd\":[\"/bin/sh\"]"), "{config}");
    // The same again is the same image, and as that of another name it goes to a registry.
    let other = Place::new();
    let digest = |text: &str| text.split_whitespace().nth(1).unwrap().to_owned();
    assert_eq!(digest(&other.good(&pull)), digest(&said));
    // What is not wanted any more goes: the layers of the original have no name.
    here.good("gc --store s");
    here.good(&format!("verify --store s {ids} {name}"));
    // An image of block layers is not converted again.
    here.good(&format!(
        "push --plain-http --store s {name} {host}/x/y:blocks"
    ));
    let said = here.bad(&format!(
        "pull --plain-http --store s --convert {host}/x/y:blocks"
    ));
    assert!(said.contains("no ordinary container image"), "{said}");
    here.good(&format!("pull --plain-http --store s {host}/x/y:blocks"));
}

/// What is pushed by hand says of its tar too.
#[test]
fn layers_over_tars_are_pushed() {
    if !has("mkfs.erofs") {
        return;
    }
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let tars = three_tars();
    fs::write(here.path().join("one.tar"), &tars[0]).unwrap();
    here.good("build --from-tar one.tar -o one.layer");
    here.good(&format!("push --plain-http one.layer {host}/x/y:hand"));
    let manifest = here.good(&format!("inspect --plain-http --raw {host}/x/y:hand"));
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let annotations = &manifest["layers"][0]["annotations"];
    let bytes = tars[0].len().to_string();
    assert_eq!(annotations["vnd.dm-overlaybd.tar-bytes"], bytes.as_str());
}

#[test]
fn images_that_are_not_what_they_say() {
    if !has("mkfs.erofs") {
        return;
    }
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let tars = three_tars();
    let pull = |tag: &str| format!("pull --plain-http --store s --convert {host}/x/y:{tag}");
    let hold = |tag: &str, ids: &[Vec<u8>], stored: Vec<u8>| {
        let image = ordinary(ids, vec![("+gzip", stored)]);
        server.hold("x/y", tag, &image);
    };
    hold("wrong", &tars[1..2], gzip(&tars[0]));
    hold("bomb", &tars[..1], gzip(&vec![0; 20 << 20]));
    hold("cut", &tars[..1], gzip(&tars[0])[..5000].to_vec());
    hold("noise", &tars[..1], vec![7; 5000]);
    let mut trailing = gzip(&tars[0]);
    trailing.extend_from_slice(b"trailing");
    hold("trailing", &tars[..1], trailing);
    for (tag, says) in [
        ("wrong", "and the configuration says"),
        ("cut", "compression is damaged"),
        ("noise", "is no tar archive"),
        ("trailing", "compression is damaged"),
    ] {
        let said = here.bad(&pull(tag));
        assert!(said.contains(says), "{tag}: {said}");
    }
    let said = here.bad(&format!("{} --max-size 1M", pull("bomb")));
    assert!(said.contains("--max-size allows more"), "{said}");
    assert_eq!(here.good("images --store s"), "");
}
