// SPDX-License-Identifier: GPL-2.0

//! Images between files, store and registry, by the command: what goes there comes back, also by way of other tools, and
//! what is no image of block layers is refused by name.

#[path = "../../oci/tests/common/mod.rs"]
mod registry;

#[path = "../../layers/tests/common/mod.rs"]
mod layers;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, SystemTime},
};

use layers::{change, raw_image};
use ovbd_oci::{Digest, Registry};
use registry::{
    made_of, options, reference,
    scripted::Scripted,
    server::{has, run, DockerRegistry},
};
use serde_json::Value;

/// A folder with a store, in which the command runs.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn run(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ovbd"))
            .args(line.split_whitespace())
            .current_dir(self.path())
            .env("XDG_RUNTIME_DIR", self.path())
            .env("HOME", self.path())
            .env_remove("SOURCE_DATE_EPOCH")
            .output()
            .unwrap()
    }

    /// What a command prints that must succeed.
    fn good(&self, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that must fail.
    fn bad(&self, line: &str) -> String {
        let output = self.run(line);
        assert_eq!(output.status.code(), Some(1), "{line}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.good(line)).unwrap()
    }

    /// Two layers, two.raw being what both are together.
    fn two_layers(&self) {
        raw_image(&self.path().join("one.raw"), 3 << 20, 1);
        fs::copy(self.path().join("one.raw"), self.path().join("two.raw")).unwrap();
        change(&self.path().join("two.raw"), 2);
        self.good("build -o one.layer one.raw");
        self.good("build --base one.layer --tar -o two.layer two.raw");
    }

    fn is_two(&self, layers: &str) {
        self.good(&format!("export -f --store s {layers} -o out.raw"));
        assert!(
            fs::read(self.path().join("out.raw")).unwrap()
                == fs::read(self.path().join("two.raw")).unwrap()
        );
    }
}

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
    fs::write(
        here.path().join("one.raw"),
        registry::Random(9).bytes(2 << 20),
    )
    .unwrap();
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
fn an_export_does_not_fill_the_disk() {
    let here = Place::new();
    here.two_layers();
    let said = here.bad("export one.layer two.layer --max-size 100k -o out.raw");
    assert!(said.contains("100.0 KiB is allowed (--max-size"), "{said}");
    assert!(!here.path().join("out.raw").exists());
    here.good("export one.layer two.layer --max-size 3M -o out.raw");
}

#[test]
fn what_is_no_image_of_blocks() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let pull = |tag: &str| format!("pull --plain-http --store s {host}/x/y:{tag}");
    server.hold("x/y", "ordinary", &made_of(vec![vec![0; 10_240]]));
    let said = here.bad(&pull("ordinary"));
    assert!(said.contains("ordinary container image: layer 0"), "{said}");
    let mut turbo = made_of(vec![b"turbo".to_vec()]);
    let note = "containerd.io/snapshot/overlaybd/turbo-oci/target-digest";
    turbo.manifest.layers.0[0]
        .annotations
        .insert(note.to_owned(), "sha256:x".to_owned());
    turbo.bytes = turbo.manifest.to_bytes();
    server.hold("x/y", "turbo", &turbo);
    assert!(here.bad(&pull("turbo")).contains("TurboOCI"));
    // What only says that it is a layer gets no name.
    let mut lying = made_of(vec![vec![7; 5000]]);
    let note = "containerd.io/snapshot/overlaybd/blob-digest";
    lying.manifest.layers.0[0]
        .annotations
        .insert(note.to_owned(), "x".to_owned());
    lying.bytes = lying.manifest.to_bytes();
    server.hold("x/y", "lying", &lying);
    here.bad(&pull("lying"));
    assert_eq!(here.good("images --store s"), "");
    assert_eq!(
        server
            .state
            .lock()
            .unwrap()
            .log
            .iter()
            .filter(|request| request.path.contains(lying.manifest.layers[0].digest.hex()))
            .count(),
        1
    );
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

#[test]
fn a_damaged_store_is_repaired_and_swept() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    here.good(&format!(
        "push --plain-http one.layer two.layer {host}/vm/web:mon"
    ));
    here.good(&format!("pull --plain-http --store s {host}/vm/web:mon"));
    here.good("fsck --store s");
    let images = here.json("images --json --store s");
    let file = images[0]["files"][1].as_str().unwrap();
    let file = here.path().join(file);
    let mut bytes = fs::read(&file).unwrap();
    bytes[3000] ^= 1;
    fs::remove_file(&file).unwrap();
    fs::write(&file, bytes).unwrap();
    assert!(here.bad("fsck --store s").contains("damaged"));
    here.good("fsck --plain-http --repair --store s");
    here.is_two(&format!("{host}/vm/web:mon"));
    // Young files stay, files of images stay.
    here.good(&format!("tag --store s {host}/vm/web:mon kept:1"));
    here.good(&format!("rmi --store s {host}/vm/web:mon"));
    assert!(here
        .good("gc --store s --older 0")
        .starts_with("0 B removed"));
    here.good("rmi --store s kept:1");
    assert!(here.bad("rmi --store s kept:1").contains("kept:1"));
    assert!(here.good("gc --store s").starts_with("0 B removed"));
    assert_eq!(
        here.json("gc --store s --older 0 --dry-run --json")["blobs"]
            .as_array()
            .unwrap()
            .len(),
        4
    );
    here.good("gc --store s --older 0");
    let blobs = fs::read_dir(here.path().join("s/blobs/sha256"))
        .unwrap()
        .count();
    assert_eq!(blobs, 0);
    assert!(
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            > Duration::ZERO
    );
}

#[test]
fn a_full_disk_ends_a_pull_that_can_be_gone_on_with() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    // Random, so that nothing gets smaller.
    let layers: Vec<Vec<u8>> = (0..2_u64)
        .map(|number| {
            let raw = here.path().join("raw");
            fs::write(&raw, registry::Random(number + 1).bytes(3 << 20)).unwrap();
            here.good("build -f --tar --format lsmt -o layer raw");
            fs::read(here.path().join("layer")).unwrap()
        })
        .collect();
    let image = made_of(layers);
    server.hold("vm/web", "mon", &image);
    // The disk is filled up when there was room for all of it at first.
    let second = image.manifest.layers[1].digest.to_string();
    let folder = here.path().to_owned();
    server.script(move |request| {
        if request.is("GET", &second) && request.header("range").is_empty() {
            fs::write(folder.join("fill"), "").unwrap();
            let end = std::time::Instant::now() + Duration::from_secs(20);
            while !folder.join("filled").exists() && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        registry::scripted::Act::Usual
    });
    let script = r#"
        mkdir s && mount -t tmpfs -o size=8M none s || { echo no mounts here; exit 77; }
        (while ! test -e fill; do sleep 0.02; done; cat /dev/zero >s/filler; touch filled) 2>/dev/null &
        "$0" pull --plain-http --jobs 1 --store s "$1" 2>said; echo "first: $?"; cat said
        "$0" images --store s
        rm s/filler
        "$0" fsck --store s && "$0" pull -q --plain-http --store s "$1"; echo "second: $?"
        "$0" fsck --store s; echo "fsck: $?"
        ls s/ingest | grep part"#;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_ovbd")])
        .arg(format!("{host}/vm/web:mon"))
        .current_dir(here.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.code() == Some(77) || said.is_empty() {
        println!("skipped: {said}{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let first: Vec<&str> = said
        .lines()
        .take_while(|line| !line.starts_with("second"))
        .collect();
    assert!(
        first[0] == "first: 1" && said.contains("No space left on device"),
        "{said}"
    );
    assert!(
        !first.iter().any(|line| line.contains("sha256:")),
        "no image: {said}"
    );
    assert!(
        said.contains("second: 0\n") && said.ends_with("fsck: 0\n"),
        "{said}"
    );
    let layer = |number: usize| image.manifest.layers[number].digest.to_string();
    assert_eq!(
        server.count("GET", &layer(0)),
        1,
        "what was there is not fetched again"
    );
    let ranges: Vec<String> = server
        .state
        .lock()
        .unwrap()
        .log
        .iter()
        .filter(|request| request.is("GET", &layer(1)))
        .map(|request| request.header("range").to_owned())
        .collect();
    assert!(
        ranges.len() == 2 && ranges[1].as_str() > "bytes=1",
        "{ranges:?}"
    );
}

#[test]
fn gc_waits_for_a_pull() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    here.good(&format!(
        "push --plain-http one.layer two.layer {host}/vm/web:mon"
    ));
    here.good(&format!("pull --plain-http --store s {host}/vm/web:mon"));
    here.good(&format!("rmi --store s {host}/vm/web:mon"));
    here.good("gc --store s --older 0");
    // When the second layer is asked for, the first has no name that keeps it.
    let manifest: Value =
        serde_json::from_str(&here.good(&format!("inspect --plain-http --raw {host}/vm/web:mon")))
            .unwrap();
    let second = manifest["layers"][1]["digest"].as_str().unwrap().to_owned();
    let (asked, hear) = std::sync::mpsc::channel();
    server.script(move |request| {
        if request.is("GET", &second) {
            asked.send(()).ok();
            std::thread::sleep(Duration::from_millis(500));
        }
        registry::scripted::Act::Usual
    });
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| {
            here.good(&format!(
                "pull --plain-http --jobs 1 --store s {host}/vm/web:mon"
            ))
        });
        hear.recv().unwrap();
        let swept = here.good("gc --store s --older 0");
        assert!(pull.is_finished() || swept.starts_with("0 B"), "{swept}");
        pull.join().unwrap();
    });
    here.good("fsck --store s");
    here.is_two(&format!("{host}/vm/web:mon"));
}

#[test]
fn names_that_would_move_the_cursor() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    here.two_layers();
    here.good(&format!("push --plain-http one.layer {host}/vm/web:mon"));
    here.good(&format!("pull --plain-http --store s {host}/vm/web:mon"));
    let index = here.path().join("s/index.json");
    let text = fs::read_to_string(&index).unwrap();
    let name = format!("{host}/vm/web:mon");
    for (bad, shown) in [
        ("a\\u001b[2Jb\\n", "a?[2Jb?"),
        ("../../no/such", "../../no/such"),
    ] {
        fs::write(&index, text.replace(&name, bad)).unwrap();
        assert!(here.good("images --store s").starts_with(shown), "{bad}");
    }
    // A name is looked up, and never a path.
    assert!(here
        .bad("export -o x.raw --store s ../../no/thing")
        .contains("no/thing"));
    here.good("export -o x.raw --store s ../../no/such");
    for bad in [
        "x/../y:z",
        "h.x/../y",
        "h.x/y@sha256:../../x",
        "h.x/Y\u{1b}",
        "h.x/y:a/b",
    ] {
        let said = here.run(&format!("pull --store s {bad}"));
        assert_eq!(said.status.code(), Some(2), "{bad}");
    }
}

#[test]
fn large_documents_need_little_memory() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let image = made_of(vec![b"layer".to_vec()]);
    server.hold("x/y", "mon", &image);
    let inspect = |kib: u64| {
        Command::new("sh")
            .args(["-c", &format!("ulimit -d {kib} && exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_ovbd"))
            .args(["inspect", "--plain-http", &format!("{host}/x/y:mon")])
            .current_dir(here.path())
            .output()
            .unwrap()
    };
    // That such a limit works is what tests/memory.rs shows.
    assert!(inspect(32 << 10).status.success());
    let layer = r#"{"mediaType":"l","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000001","size":1}"#;
    let list = |count: usize| vec![layer; count].join(",");
    let notes: Vec<String> = (0..250_000).map(|n| format!(r#""{n}":"""#)).collect();
    for (what, reason) in [
        (
            format!(r#""config":{layer},"layers":[{}]"#, list(10_000)),
            "more than 255",
        ),
        (format!(r#""x":[{}0]"#, "0,".repeat(2_000_000)), "131,072"),
        (
            format!(r#""x":{}0{}"#, "[".repeat(1_000_000), "]".repeat(1_000_000)),
            "missing field",
        ),
        (
            format!(
                r#""config":{layer},"layers":[],"annotations":{{{}}}"#,
                notes.join(",")
            ),
            "131,072",
        ),
    ] {
        let text = format!(r#"{{"schemaVersion":2,{what}}}"#);
        let kind = "application/vnd.oci.image.manifest.v1+json";
        server.hold_bytes("x/y", "mon", kind, text.as_bytes());
        let output = inspect(32 << 10);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(1) && said.contains(reason),
            "{reason}: {said}"
        );
    }
}

#[test]
fn what_a_layer_claims_is_bounded_by_what_it_has() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    let pull = |layer: Vec<u8>| {
        server.hold("x/y", "mon", &made_of(vec![layer]));
        let line =
            format!("ulimit -d 65536 && exec \"$0\" pull --plain-http --store s {host}/x/y:mon");
        let output = Command::new("sh")
            .args(["-c", &line, env!("CARGO_BIN_EXE_ovbd")])
            .current_dir(here.path())
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    // A disk of 1 TiB in some KiB is no fault.
    let large = fs::File::create(here.path().join("large.raw")).unwrap();
    large.set_len(1 << 40).unwrap();
    here.good("build -o large.layer large.raw");
    let layer = fs::read(here.path().join("large.layer")).unwrap();
    assert!(layer.len() < 8192);
    let (status, said) = pull(layer);
    assert_eq!(status, Some(0), "{said}");
    // More of an index than the blob has bytes: nothing in this format has a checksum.
    here.two_layers();
    here.good("build --format lsmt -o plain.layer one.raw");
    let good = fs::read(here.path().join("plain.layer")).unwrap();
    let trailer = good.len() - 4096;
    for (at, value) in [(40, 1_u64 << 30), (40, u64::MAX >> 1), (32, u64::MAX >> 9)] {
        let mut bad = good.clone();
        bad[trailer + at..trailer + at + 8].copy_from_slice(&value.to_le_bytes());
        let (status, said) = pull(bad);
        assert_eq!(status, Some(1), "byte {at} of the trailer: {said}");
        assert_eq!(
            here.good("images --store s").lines().count(),
            1,
            "only the large one"
        );
    }
}

#[test]
fn a_helper_is_told_the_host_and_nothing_else() {
    use std::os::unix::fs::PermissionsExt;
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    server.script(|request| {
        match request.header("authorization") == "Basic bWU6dG9wLXNlY3JldA==" {
            true => registry::scripted::Act::Usual,
            false => registry::scripted::Act::Reply(
                401,
                vec![("WWW-Authenticate", "Basic realm=\"x\"".to_owned())],
                Vec::new(),
            ),
        }
    });
    let helper = here.path().join("docker-credential-here");
    let script = "#!/bin/sh\n{ echo \"$@\"; cat; env; } >asked\n\
                  echo '{\"Username\":\"me\",\"Secret\":\"top-secret\"}'\n";
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    // The password of another registry is in the same file.
    let file = format!(
        r#"{{"auths":{{"other.example":{{"auth":"eDpvdGhlci1zZWNyZXQ="}}}},"credHelpers":{{"{host}":"here"}}}}"#
    );
    fs::write(here.path().join("auth.json"), file).unwrap();
    here.two_layers();
    let path = format!(
        "{}:{}",
        here.path().display(),
        std::env::var("PATH").unwrap()
    );
    let output = Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args([
            "push",
            "-v",
            "--plain-http",
            "--creds-file",
            "auth.json",
            "one.layer",
        ])
        .arg(format!("{host}/vm/web:mon"))
        .current_dir(here.path())
        .env("PATH", path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}");
    let asked = fs::read_to_string(here.path().join("asked")).unwrap();
    assert!(asked.starts_with(&format!("get\n{host}")), "{asked}");
    for secret in ["secret", "eDpvdGhlc", "bWU6"] {
        assert!(
            !asked.contains(secret) && !said.contains(secret),
            "{secret}: {asked}{said}"
        );
    }
}

#[test]
fn passwords_are_saved_and_never_shown() {
    use std::io::Write;
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    server.script(|request| {
        let right = request.header("authorization") == "Basic bWU6dG9wLXNlY3JldA==";
        match right {
            true => registry::scripted::Act::Usual,
            false => registry::scripted::Act::Reply(
                401,
                vec![("WWW-Authenticate", "Basic realm=\"x\"".to_owned())],
                Vec::new(),
            ),
        }
    });
    let login = |password: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ovbd"))
            .args([
                "login",
                "--plain-http",
                "--user",
                "me",
                "--creds-file",
                "auth.json",
                host,
            ])
            .current_dir(here.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(password.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    };
    let (right, said) = login("wrong-secret\n");
    assert!(!right && !said.contains("wrong-secret"), "{said}");
    assert!(!here.path().join("auth.json").exists());
    let (right, said) = login("top-secret\n");
    assert!(
        right && said.contains("auth.json") && !said.contains("top-secret"),
        "{said}"
    );
    here.two_layers();
    here.good(&format!(
        "push --plain-http --creds-file auth.json one.layer {host}/vm/web:mon"
    ));
    let verbose = here.run(&format!(
        "pull -v --plain-http --creds-file auth.json --store s {host}/vm/web:mon"
    ));
    let said = String::from_utf8_lossy(&verbose.stderr).into_owned();
    assert!(
        verbose.status.success() && !said.contains("secret") && !said.contains("bWU6"),
        "{said}"
    );
    here.good(&format!("logout --creds-file auth.json {host}"));
    let said = here.bad(&format!(
        "pull --plain-http --creds-file auth.json --store s {host}/vm/web:mon"
    ));
    assert!(said.contains("not allowed to pull"), "{said}");
    assert!(Registry::to_pull(&reference(host, "vm/web:mon"), options())
        .document("mon")
        .is_err());
}
