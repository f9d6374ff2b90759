// SPDX-License-Identifier: GPL-2.0

//! Images that are none, or claim to be more than they are.

use std::{fs, process::Command};

use crate::{
    registry::{made_of, scripted::Scripted},
    Place,
};

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
        ("a\\u001b[2Jb\\n", "a\\u{1b}[2Jb\\n"),
        ("a\\u202egpj", "a\\u{202e}gpj"),
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
fn an_export_does_not_fill_the_disk() {
    let here = Place::new();
    here.two_layers();
    let said = here.bad("export one.layer two.layer --max-size 100k -o out.raw");
    assert!(said.contains("100.0 KiB is allowed (--max-size"), "{said}");
    assert!(!here.path().join("out.raw").exists());
    here.good("export one.layer two.layer --max-size 3M -o out.raw");
}
