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
use ovbd_oci::{Descriptor, Digest, Registry, OCI_LAYER};
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
    let _ = Descriptor::of(OCI_LAYER, b"x");
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
