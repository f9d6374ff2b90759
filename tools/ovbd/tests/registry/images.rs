// SPDX-License-Identifier: GPL-2.0

//! Images that go to a registry and come back, also by way of other tools and from the original.

use std::fs;

use ovbd_oci::Digest;
use serde_json::Value;

use crate::{
    layers::change,
    registry::{
        made_of,
        scripted::Scripted,
        server::{has, run, DockerRegistry},
        Random,
    },
    Place,
};

#[test]
fn a_session() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    let pushed = here.json(&format!(
        "push --json --store s one.layer two.layer {host}/vm/web:mon"
    ));
    assert_eq!((&pushed["layers"], &pushed["sent"]), (&2.into(), &3.into()));
    assert_eq!(pushed["virtual"], 3 << 20);
    // The same again is the same, and nothing is sent.
    let again = here.json(&format!(
        "push --json --store s one.layer two.layer {host}/vm/web:tue"
    ));
    assert_eq!(
        (&again["digest"], &again["sent"], &again["present"]),
        (&pushed["digest"], &0.into(), &3.into())
    );

    let pulled = here.good(&format!("pull --store s {host}/vm/web:mon"));
    assert!(
        pulled.contains(pushed["digest"].as_str().unwrap()) && pulled.contains("2 layers"),
        "{pulled}"
    );
    let name = format!("{host}/vm/web:mon");
    here.is_two(&name);
    here.good(&format!("verify --store s {name}"));
    assert!(here
        .good(&format!("info --store s {name}"))
        .contains("layer 1"));
    // A layer on top of an image is sent alone, and the layers below keep their digests.
    change(&here.path().join("two.raw"), 3);
    here.good(&format!(
        "build --tar -o three.layer two.raw --store s --base {name}"
    ));
    let next = here.json(&format!(
        "push --json --store s {name} three.layer {host}/vm/web:wed"
    ));
    assert_eq!(
        (&next["layers"], &next["sent"], &next["present"]),
        (&3.into(), &2.into(), &2.into())
    );
    let manifest: Value =
        serde_json::from_str(&here.good(&format!("inspect --raw {host}/vm/web:wed"))).unwrap();
    assert_eq!(
        manifest["annotations"]["org.opencontainers.image.base.name"],
        name.as_str()
    );
    assert_eq!(
        manifest["annotations"]["org.opencontainers.image.base.digest"],
        pushed["digest"]
    );
    here.good(&format!("pull --store s {host}/vm/web:wed"));
    here.is_two(&format!("{host}/vm/web:wed"));

    here.good(&format!("tag --store s {name} local/x:1"));
    let images = here.json("images --json --store s");
    assert_eq!(images.as_array().unwrap().len(), 3);
    here.is_two(&format!("{host}/vm/web:wed"));
    // From the store into another repository: the registry has it all.
    let moved = here.json(&format!(
        "push --json --store s {name} {host}/other/web:mon"
    ));
    assert_eq!(
        (&moved["digest"], &moved["mounted"]),
        (&pushed["digest"], &3.into())
    );
    here.good(&format!("pull -o copy {host}/other/web:mon"));
    here.good("verify oci:copy");
    here.good("fsck --store copy");
    assert!(here
        .bad(&format!("pull --store s {host}/vm/web:none"))
        .contains("no such image"));
    assert!(here
        .bad("export --store s no/such:image -o x.raw")
        .contains("no/such:image"));
}

#[test]
fn what_is_pushed_is_as_the_original_wants_it() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    here.good(&format!(
        "push --plain-http --fs ext4 one.layer two.layer {host}/vm/web:mon"
    ));
    let manifest: Value =
        serde_json::from_str(&here.good(&format!("inspect --plain-http --raw {host}/vm/web:mon")))
            .unwrap();
    let state = server.state.lock().unwrap();
    let config: Value =
        serde_json::from_slice(&state.blobs[manifest["config"]["digest"].as_str().unwrap()])
            .unwrap();
    assert_eq!(config["rootfs"]["type"], "layers");
    for (number, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        let (digest, size) = (
            layer["digest"].as_str().unwrap(),
            layer["size"].as_u64().unwrap(),
        );
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar");
        let notes = &layer["annotations"];
        assert_eq!(
            notes["containerd.io/snapshot/overlaybd/blob-digest"],
            digest
        );
        assert_eq!(
            notes["containerd.io/snapshot/overlaybd/blob-size"],
            size.to_string()
        );
        assert_eq!(
            notes["containerd.io/snapshot/overlaybd/blob-fs-type"],
            "ext4"
        );
        assert_eq!(notes["containerd.io/snapshot/overlaybd/version"], "0.1.0");
        assert_eq!(config["rootfs"]["diff_ids"][number], digest);
        // Each in the tar, also the one that was given without.
        let blob = &state.blobs[digest];
        assert_eq!(blob.len() as u64, size);
        assert_eq!(&blob[257..262], b"ustar");
        assert_eq!(&blob[1536..1541], b"ZFile");
    }
    let wanted = fs::read(here.path().join("two.layer")).unwrap();
    assert!(
        state.blobs.values().any(|blob| *blob == wanted),
        "a tar is sent as it is"
    );
    drop(state);
    here.good("build -f --tar -o tarred.layer one.raw");
    let tarred = Digest::of(&fs::read(here.path().join("tarred.layer")).unwrap());
    assert_eq!(
        manifest["layers"][0]["digest"],
        tarred.to_string(),
        "the wrapper is the same everywhere"
    );
    let tcmu = here.json(&format!("inspect --plain-http --tcmu {host}/vm/web:mon"));
    assert_eq!(
        tcmu["repoBlobUrl"],
        format!("http://{host}/v2/vm/web/blobs")
    );
    assert_eq!(tcmu["lowers"][1]["digest"], manifest["layers"][1]["digest"]);
    assert_eq!(tcmu["lowers"][1]["size"], manifest["layers"][1]["size"]);

    fs::write(
        here.path().join("config.json"),
        r#"{"Env":["A=1"],"Cmd":["/sbin/init"]}"#,
    )
    .unwrap();
    here.good(&format!("push --plain-http --fs none --docker-types --config config.json --subject {host}/vm/web:mon one.layer {host}/vm/web:docker"));
    let manifest: Value = serde_json::from_str(
        &here.good(&format!("inspect --plain-http --raw {host}/vm/web:docker")),
    )
    .unwrap();
    assert_eq!(
        manifest["mediaType"],
        "application/vnd.docker.distribution.manifest.v2+json"
    );
    assert_eq!(
        manifest["layers"][0]["mediaType"],
        "application/vnd.docker.image.rootfs.diff.tar"
    );
    assert!(manifest["layers"][0]["annotations"]
        .get("containerd.io/snapshot/overlaybd/blob-fs-type")
        .is_none());
    let state = server.state.lock().unwrap();
    let config: Value =
        serde_json::from_slice(&state.blobs[manifest["config"]["digest"].as_str().unwrap()])
            .unwrap();
    assert_eq!(config["config"]["Cmd"][0], "/sbin/init");
    assert!(
        state
            .manifests
            .keys()
            .any(|name| name.starts_with("vm/web/sha256-")),
        "listed as a referrer"
    );
}

#[test]
fn a_first_push_in_several_layers() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    let push = |split: &str, tag: &str| {
        here.json(&format!(
            "push --json --plain-http {split} one.layer two.layer {host}/vm/web:{tag}"
        ))
    };
    let whole = push("", "whole");
    assert_eq!(whole["layers"], 2);
    assert_eq!(push("--split=1G", "large")["digest"], whole["digest"]);
    assert_eq!(push("--split", "default")["digest"], whole["digest"]);
    let several = push("--split=64k", "several");
    let layers = several["layers"].as_u64().unwrap();
    assert!(layers > 4, "{several}");
    // Always the same, so that nothing is sent twice.
    let again = push("--split=64k", "again");
    assert_eq!(
        (&again["digest"], &again["sent"]),
        (&several["digest"], &0.into())
    );
    here.good(&format!(
        "pull --plain-http --store s {host}/vm/web:several"
    ));
    here.is_two(&format!("{host}/vm/web:several"));
    let images = here.json("images --json --store s");
    for file in &images[0]["files"].as_array().unwrap()[..layers as usize - 1] {
        let info = here.json(&format!("info --json {}", file.as_str().unwrap()));
        assert!(
            info["layers"][0]["data_bytes"].as_u64().unwrap() <= 64 << 10,
            "{info}"
        );
    }
    let name = format!("{host}/vm/web:several");
    here.good(&format!(
        "build -o three.layer two.raw --store s --base {name}"
    ));
    let said = here.bad(&format!(
        "push --plain-http --store s --split=1M {name} three.layer {host}/vm/web:no"
    ));
    assert!(said.contains("first push"), "{said}");
    // Said before any of them is made.
    fs::write(here.path().join("one.raw"), Random(9).bytes(2 << 20)).unwrap();
    here.good("build -f -o one.layer one.raw");
    let said = here.bad(&format!(
        "push --plain-http --split=4k one.layer {host}/vm/web:no"
    ));
    assert!(said.contains("at most 255"), "{said}");
}

#[test]
fn inspect_reads_headers_only() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    here.good("build -f --format lsmt -o one.layer one.raw");
    here.good("build -f --algo zstd --block-size 16k --tar -o two.layer two.raw --base one.layer");
    here.good(&format!(
        "push --plain-http one.layer two.layer {host}/vm/web:mon"
    ));
    here.good(&format!("pull --plain-http --store s {host}/vm/web:mon"));
    server.forget();
    let remote = here.good(&format!("inspect --plain-http {host}/vm/web:mon"));
    assert!(remote.contains("(not compressed)"), "{remote}");
    assert!(remote.contains("(zstd in blocks of 16.0 KiB, "), "{remote}");
    let sent = server.state.lock().unwrap().sent;
    assert!(sent < 16 << 10, "{sent} bytes");
    let local = here.good(&format!("inspect --store s {host}/vm/web:mon"));
    assert_eq!(local, remote);
    let facts = here.json(&format!("inspect --json --store s {host}/vm/web:mon"));
    assert_eq!(facts["layers"][1]["content"]["algorithm"], "zstd");
    assert_eq!(facts["layers"][1]["content"]["block_bytes"], 16384);
}

#[test]
fn copies_of_other_tools_are_the_same_images() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    let pushed = here.json(&format!(
        "push --json one.layer two.layer {host}/vm/web:mon"
    ));
    let mut copies = Vec::new();
    if has("skopeo") {
        let (from, to) = (
            format!("docker://{host}/vm/web:mon"),
            format!("oci:{}/skopeo:x", here.path().display()),
        );
        let keep = [
            "--insecure-policy",
            "copy",
            "--preserve-digests",
            "--src-tls-verify=false",
        ];
        run("skopeo", &[&keep[..], &[&from, &to]].concat());
        copies.push("skopeo");
    }
    if has("oras") {
        let to = format!("{}/oras:x", here.path().display());
        let from = format!("{host}/vm/web:mon");
        run(
            "oras",
            &["cp", "--from-plain-http", "--to-oci-layout", &from, &to],
        );
        copies.push("oras");
    }
    for copy in copies {
        here.is_two(&format!("oci:{copy}:x"));
        here.good(&format!("verify oci:{copy}"));
        here.good(&format!("fsck --store {copy}"));
        let back = here.json(&format!("push --json oci:{copy}:x {host}/{copy}/web:x"));
        assert_eq!(back["digest"], pushed["digest"], "{copy}");
        let pulled = here.json(&format!("pull --json --store s {host}/{copy}/web:x"));
        assert_eq!(pulled["digest"], pushed["digest"], "{copy}");
    }
}

#[test]
fn images_that_a_tool_compressed() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    if !has("skopeo") {
        return;
    }
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    here.good(&format!("push one.layer two.layer {host}/vm/web:mon"));
    for how in ["gzip", "zstd"] {
        let from = format!("docker://{host}/vm/web:mon");
        let (packed, to) = (
            format!("oci:{}/{how}:x", here.path().display()),
            format!("docker://{host}/{how}/web:x"),
        );
        let compress = ["--dest-compress-format", how];
        let copy = ["--insecure-policy", "copy", "--src-tls-verify=false"];
        run(
            "skopeo",
            &[&copy[..], &compress, &[&from, &packed]].concat(),
        );
        let keep = [
            "--preserve-digests",
            "--dest-tls-verify=false",
            &packed,
            &to,
        ];
        run("skopeo", &[&copy[..2], &keep].concat());
        let output = here.run(&format!("pull --store s {host}/{how}/web:x"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success() && said.contains("--preserve-digests"),
            "{said}"
        );
        here.is_two(&format!("{host}/{how}/web:x"));
        here.good("fsck --store s");
    }
    let small = here.bad(&format!("pull --store t --max-size 10k {host}/gzip/web:x"));
    assert!(small.contains("more than 10240 bytes"), "{small}");
    assert_eq!(here.good("images --store t"), "");
}

#[test]
fn images_of_the_original_are_read() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    let two = fs::read(here.path().join("two.layer")).unwrap();
    let one = fs::read(here.path().join("one.layer")).unwrap();
    // As the converter writes them: a base without any tar, zeros after the end, no version, and a record of reads on top.
    let mut padded = two.clone();
    padded.extend_from_slice(&[0; 1024]);
    let mut image = made_of(vec![one, padded, b"trace".to_vec()]);
    for (layer, name) in
        image
            .manifest
            .layers
            .0
            .iter_mut()
            .zip(["blob-digest", "blob-digest", "acceleration-layer"])
    {
        let value = if name == "blob-digest" {
            layer.digest.to_string()
        } else {
            "yes".to_owned()
        };
        layer
            .annotations
            .insert(format!("containerd.io/snapshot/overlaybd/{name}"), value);
        layer.media_type = "application/vnd.docker.image.rootfs.diff.tar".to_owned();
    }
    image.manifest.media_type =
        Some("application/vnd.docker.distribution.manifest.v2+json".to_owned());
    image.bytes = image.manifest.to_bytes();
    server.hold("x/y", "mixed", &image);
    here.good(&format!("pull --plain-http --store s {host}/x/y:mixed"));
    here.is_two(&format!("{host}/x/y:mixed"));
    here.good("fsck --store s");

    // The converter's base layer is behind one header, as Go's archive/tar writes it.
    let one = fs::read(here.path().join("one.layer")).unwrap();
    let mut header = [0; 512];
    let mut field =
        |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    field(0, "overlaybd.commit");
    field(100, "0000444\0" /* mode */);
    field(108, "0000000\0" /* user */);
    field(116, "0000000\0" /* group */);
    field(124, &format!("{:011o}\0", one.len()));
    field(136, "00000000000\0" /* time */);
    field(148, "        " /* checksum, for now */);
    field(156, "0" /* a file */);
    field(257, "ustar\u{0}00" /* magic and version */);
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut base = [&header[..], &one].concat();
    base.resize(base.len().next_multiple_of(512) + 1024, 0);
    let image = made_of(vec![base, two]);
    server.hold("x/y", "based", &image);
    here.good(&format!("pull --plain-http --store s {host}/x/y:based"));
    here.is_two(&format!("{host}/x/y:based"));
}
