// SPDX-License-Identifier: GPL-2.0

//! A store that is full, damaged or swept.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    layers::programs::{skip, unshare},
    registry::{
        made_of,
        scripted::{Act, Scripted},
        Random,
    },
    Place,
};

#[test]
fn a_full_disk_ends_a_pull_that_can_be_gone_on_with() {
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    // Random, so that nothing gets smaller.
    let layers: Vec<Vec<u8>> = (0..2_u64)
        .map(|number| {
            let raw = here.path().join("raw");
            fs::write(&raw, Random(number + 1).bytes(3 << 20)).unwrap();
            here.good("build -f --tar --format lsmt -o layer raw");
            fs::read(here.path().join("layer")).unwrap()
        })
        .collect();
    let image = made_of(layers);
    server.hold("vm/web", "mon", &image);
    // Most of the disk is filled when there was room for all of it at first.
    let second = image.manifest.layers[1].digest.to_string();
    let folder = here.path().to_owned();
    server.script(move |request| {
        if request.is("GET", &second) && request.header("range").is_empty() {
            fs::write(folder.join("fill"), "").unwrap();
            let end = Instant::now() + Duration::from_secs(20);
            while !folder.join("filled").exists() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Act::Usual
    });
    let script = r#"
        mkdir s && mount -t tmpfs -o size=8M none s || { echo no mounts here; exit 77; }
        (while ! test -e fill; do sleep 0.02; done; head -c 3500000 /dev/zero >s/filler; touch filled) &
        "$0" pull --plain-http --jobs 1 --store s "$1" 2>said; echo "first: $?"; cat said
        "$0" images --store s; echo "images: $?"
        rm s/filler
        "$0" fsck --store s && "$0" pull -q --plain-http --store s "$1"; echo "second: $?"
        "$0" fsck --store s; echo "fsck: $?"
        ls s/ingest | grep part"#;
    let output = unshare()
        .args(["sh", "-c", script, env!("CARGO_BIN_EXE_ovbd")])
        .arg(format!("{host}/vm/web:mon"))
        .current_dir(here.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.code() == Some(77) || said.is_empty() {
        skip(format_args!(
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        ));
        return;
    }
    let first: Vec<&str> = said
        .lines()
        .take_while(|line| *line != "images: 0")
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
    // Ranges of all requests for a layer but those that look at its first bytes.
    let ranges = |number: usize| -> Vec<String> {
        let layer = image.manifest.layers[number].digest.to_string();
        let log = &server.state.lock().unwrap().log;
        let requests = log.iter().filter(|request| request.is("GET", &layer));
        let ranges = requests.map(|request| request.header("range").to_owned());
        ranges
            .filter(|range| !range.starts_with("bytes=0-"))
            .collect()
    };
    assert_eq!(ranges(0), [""], "what was there is not fetched again");
    let second = ranges(1);
    assert!(
        second.len() == 2 && second[1].as_str() > "bytes=1",
        "{second:?}"
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
        Act::Usual
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
}
