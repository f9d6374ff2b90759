// SPDX-License-Identifier: GPL-2.0

//! What a registry may do to a client, each against a registry that does just that.

mod common;

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use common::{
    is_clean, made, made_of, options, pull, reference,
    scripted::{reply, Act, Request, Scripted},
    store, Events, Random,
};
use ovbd_oci::{
    annotations::ARTIFACT_TYPE, Descriptor, Digest, Index, Ingested, Kind, Login, Manifest,
    MediaType, NoProgress, Options, Platform, Registry, Retries,
};

const TAG: &str = "vm/web:mon";

fn puller(server: &Scripted) -> Registry {
    Registry::to_pull(&reference(&server.host, TAG), options())
}

fn pusher(server: &Scripted, part_bytes: u64) -> Registry {
    Registry::to_push(
        &reference(&server.host, TAG),
        Options {
            part_bytes,
            ..options()
        },
    )
}

/// Pulls an image of one layer from a server that does as `script` says with requests for the layer.
fn pull_scripted(
    mut script: impl FnMut(usize) -> Act + Send + 'static,
) -> Result<(), ovbd_oci::Error> {
    let server = Scripted::start();
    let image = made(1, &[100_000]);
    server.hold("vm/web", "mon", &image);
    let layer = image.manifest.layers[0].digest.to_string();
    let mut count = 0;
    server.script(move |request| {
        if request.is("GET", &layer) {
            count += 1;
            script(count)
        } else {
            Act::Usual
        }
    });
    let (_folder, store) = store();
    let result = pull(&puller(&server), &store, &NoProgress);
    is_clean(&store);
    match &result {
        Ok(_) => assert!(store.has_blob(&image.manifest.layers[0]).unwrap()),
        Err(error) => {
            assert!(!store.has_blob(&image.manifest.layers[0]).unwrap());
            assert!(store.names().unwrap().is_empty());
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("{}/vm/web: ", server.host)),
                "{error}"
            );
        }
    }
    result.map(|_| ())
}

#[test]
fn wrong_bodies_never_enter_the_store() {
    for (name, change) in [
        (
            "wrong byte",
            (|_, bytes| {
                if let Some(byte) = bytes.get_mut(50_000) {
                    *byte ^= 1
                }
            }) as fn(&mut Vec<(String, String)>, &mut Vec<u8>),
        ),
        ("longer", |_, bytes| bytes.push(0)),
        ("empty", |_, bytes| bytes.clear()),
        ("without a length, longer", |headers, bytes| {
            headers.push(("Transfer-Encoding".to_owned(), "chunked".to_owned()));
            headers.push(("Content-Length".to_owned(), "0".to_owned()));
            headers.pop();
            bytes.extend_from_slice(&[1; 64]);
            let chunk = format!("{:x}\r\n", bytes.len());
            bytes.splice(0..0, chunk.into_bytes());
            bytes.extend_from_slice(b"\r\n0\r\n\r\n");
        }),
    ] {
        let error = pull_scripted(move |_| Act::Change(change)).unwrap_err();
        assert!(error.to_string().contains("sha256:"), "{name}: {error}");
    }
    // Once wrong, then right: by another connection.
    pull_scripted(|count| {
        if count == 1 {
            Act::Change(|_, bytes| bytes[7] ^= 1)
        } else {
            Act::Usual
        }
    })
    .unwrap();
}

#[test]
fn wrong_ranges_are_refused() {
    let cut_then = |act: fn() -> Act| {
        pull_scripted(move |count| {
            if count == 1 {
                Act::CutAnswer(30_000)
            } else {
                act()
            }
        })
    };
    // All of it instead of the rest is no fault.
    cut_then(|| Act::Change(|headers, _| headers.clear())).unwrap_err();
    for wrong in [
        (|headers, _| headers[0].1 = "bytes 0-69999/100000".to_owned())
            as fn(&mut Vec<(String, String)>, &mut Vec<u8>),
        |headers, _| headers[0].1 = "bytes 30000-99999/100001".to_owned(),
        |headers, _| headers[0].1 = "nonsense".to_owned(),
        |headers, _| headers[0].1 = "bytes 30000-200000/100000".to_owned(),
    ] {
        let error = pull_scripted(move |count| {
            if count == 1 {
                Act::CutAnswer(30_000)
            } else {
                Act::Change(wrong)
            }
        })
        .unwrap_err();
        assert!(error.what().contains("range"), "{error}");
    }
    pull_scripted(|count| match count {
        1 => Act::CutAnswer(30_000),
        2 => reply(416),
        _ => Act::Usual,
    })
    .unwrap();
}

#[test]
fn a_registry_that_ignores_ranges_starts_over() {
    let server = Scripted::start();
    let image = made(1, &[100_000]);
    server.hold("vm/web", "mon", &image);
    let layer = image.layers[0].clone();
    let mut first = true;
    server.script(
        move |request| match request.is("GET", "/blobs/") && request.length == 0 {
            true if request.header("range").is_empty() && std::mem::take(&mut first) => Act::Usual,
            true if request.header("range").is_empty() => Act::CutAnswer(40_000),
            true => Act::Reply(200, Vec::new(), layer.clone()),
            false => Act::Usual,
        },
    );
    let (_folder, store) = store();
    pull(&puller(&server), &store, &NoProgress).unwrap();
    is_clean(&store);
}

#[test]
fn a_size_that_is_wrong_in_the_manifest() {
    let server = Scripted::start();
    let mut image = made(1, &[100_000]);
    for size in [99_999, 100_001, 5] {
        image.manifest.layers.0[0].size = size;
        image.bytes = image.manifest.to_bytes();
        server.hold("vm/web", "mon", &image);
        server.forget();
        let (_folder, store) = store();
        let error = pull(&puller(&server), &store, &NoProgress).unwrap_err();
        assert!(error.what().contains("100000 bytes"), "{error}");
        is_clean(&store);
    }
}

#[test]
fn busy_for_a_while_and_for_ever() {
    for status in [408, 429, 500, 502, 503, 504] {
        pull_scripted(move |count| if count < 3 { reply(status) } else { Act::Usual }).unwrap();
        let error = pull_scripted(move |_| reply(status)).unwrap_err();
        assert_eq!(
            (error.kind(), error.status()),
            (Kind::Temporary, Some(status))
        );
    }
    for status in [400, 404, 410, 413, 451] {
        let seen = std::sync::Arc::new(Mutex::new(0));
        let inside = seen.clone();
        let error = pull_scripted(move |count| {
            *inside.lock().unwrap() = count;
            reply(status)
        })
        .unwrap_err();
        assert_eq!(
            (error.status(), *seen.lock().unwrap()),
            (Some(status), 1),
            "tried once"
        );
    }
}

#[test]
fn retry_after_is_obeyed() {
    let server = Scripted::start();
    let image = made(1, &[1000]);
    server.hold("vm/web", "mon", &image);
    let mut asked: Option<Instant> = None;
    server.script(move |request| match (request.is("GET", "/blobs/"), asked) {
        (true, None) => {
            asked = Some(Instant::now());
            Act::Reply(429, vec![("Retry-After", "1".to_owned())], Vec::new())
        }
        (true, Some(then)) => {
            assert!(then.elapsed() >= Duration::from_secs(1));
            Act::Usual
        }
        _ => Act::Usual,
    });
    let (_folder, store) = store();
    pull(&puller(&server), &store, &NoProgress).unwrap();
}

#[test]
fn a_stalled_connection_is_given_up() {
    let server = Scripted::start();
    let image = made(1, &[200_000]);
    server.hold("vm/web", "mon", &image);
    let layer = image.manifest.layers[0].digest.to_string();
    let mut stalls = 1;
    server.script(move |request| {
        if request.is("GET", &layer) && stalls > 0 {
            stalls -= 1;
            return Act::Stall(Duration::from_millis(500));
        }
        Act::Usual
    });
    let options = Options {
        stall: Duration::from_millis(200),
        retries: Retries {
            tries: 20,
            first: Duration::from_millis(2),
        },
        ..options()
    };
    let (_folder, store) = store();
    let events = Events::default();
    pull(
        &Registry::to_pull(&reference(&server.host, TAG), options),
        &store,
        &events,
    )
    .unwrap();
    assert!(events
        .take()
        .iter()
        .any(|event| event.contains("no answer") || event.contains("nothing")));
}

#[test]
fn documents_beyond_the_limits() {
    let server = Scripted::start();
    let layers = |count: usize| {
        (0..count)
            .map(|n| Descriptor::new("l", Digest::of(&n.to_le_bytes()), 1))
            .collect()
    };
    let config = Descriptor::of("c", b"{}");
    let manifest =
        |count| Manifest::new(MediaType::OciManifest, config.clone(), layers(count)).to_bytes();
    let (oci, index_type) = (MediaType::OciManifest.name(), MediaType::OciIndex.name());
    let index_of = |bytes: &[u8], media_type: &str| {
        serde_json::to_vec(&Index::new(vec![Descriptor::of(media_type, bytes)])).unwrap()
    };
    let innermost = manifest(1);
    let one = index_of(&innermost, oci);
    let two = index_of(&one, index_type);
    let three = index_of(&two, index_type);
    let many = serde_json::to_vec(&Index::new(layers(1025))).unwrap();
    let mut large = manifest(1);
    large.resize((4 << 20) + 1, b' ');
    for (name, media_type, bytes) in [
        ("4 MiB + 1", oci, large),
        ("256 layers", oci, manifest(256)),
        ("10,000 layers", oci, manifest(10_000)),
        ("no layers", oci, manifest(0)),
        ("index in index in index", index_type, three),
        ("1,025 entries", index_type, many),
        ("not JSON", oci, b"{".to_vec()),
    ] {
        for inner in [&innermost, &one, &two] {
            let media_type = if inner == &innermost { oci } else { index_type };
            server.hold_bytes("vm/web", "inner", media_type, inner);
        }
        server
            .state
            .lock()
            .unwrap()
            .blobs
            .insert(config.digest.to_string(), b"{}".to_vec());
        server.hold_bytes("vm/web", "mon", media_type, &bytes);
        let start = Instant::now();
        let error = puller(&server).image(&Platform::here()).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{name}: {error}");
        assert!(start.elapsed() < Duration::from_secs(5), "{name}");
    }
    // One index in another is what some tools write.
    let image = made(3, &[10]);
    server.hold("vm/web", "x", &image);
    let one = index_of(&image.bytes, oci);
    let two = index_of(&one, index_type);
    server.hold_bytes("vm/web", "one", index_type, &one);
    server.hold_bytes("vm/web", "mon", index_type, &two);
    assert_eq!(
        puller(&server)
            .image(&Platform::here())
            .unwrap()
            .descriptor
            .digest,
        image.digest()
    );
}

#[test]
fn a_manifest_is_what_its_digest_says() {
    let server = Scripted::start();
    let (image, other) = (made(1, &[10]), made(2, &[10]));
    server.hold("vm/web", "mon", &image);
    server.hold_bytes("vm/web", "x", MediaType::OciManifest.name(), &other.bytes);
    let by_digest = reference(&server.host, &format!("vm/web@{}", other.digest()));
    let key = format!("vm/web/{}", other.digest());
    server
        .state
        .lock()
        .unwrap()
        .manifests
        .get_mut(&key)
        .unwrap()
        .1 = image.bytes.clone();
    let error = Registry::to_pull(&by_digest, options())
        .image(&Platform::here())
        .unwrap_err();
    assert!(error.what().contains("does not have the digest"), "{error}");
    let right = other.digest().to_string();
    server.script(move |request| match request.is("GET", "manifests/mon") {
        true => Act::Change(|headers, _| {
            headers.push((
                "Docker-Content-Digest".to_owned(),
                format!("sha256:{:064x}", 5),
            ))
        }),
        false => Act::Usual,
    });
    assert!(puller(&server).image(&Platform::here()).is_err(), "{right}");
    let mut config = made(4, &[10]);
    config.config = b"{}".to_vec();
    server.usual();
    server.hold("vm/web", "mon", &config);
    assert!(puller(&server).image(&Platform::here()).is_err());
}

#[test]
fn redirects_lose_the_password() {
    let (server, elsewhere) = (Scripted::start(), Scripted::start());
    let image = made(1, &[50_000]);
    server.hold("vm/web", "mon", &image);
    elsewhere.hold("vm/web", "mon", &image);
    let to = elsewhere.host.clone();
    server.script(move |request| {
        if request.header("authorization").is_empty() {
            return Act::Reply(
                401,
                vec![("WWW-Authenticate", "Basic realm=\"x\"".to_owned())],
                Vec::new(),
            );
        }
        match request.is("GET", "/blobs/") {
            true => Act::Reply(
                307,
                vec![(
                    "Location",
                    format!("http://{to}{}?signature=1", request.path),
                )],
                Vec::new(),
            ),
            false => Act::Usual,
        }
    });
    let layer = image.manifest.layers[0].digest.to_string();
    let mut turn = 0;
    elsewhere.script(move |request| {
        turn += usize::from(request.is("GET", &layer));
        match turn {
            0 => Act::Usual,
            1 => Act::CutAnswer(20_000),
            // The signature has run out: the registry gives another one.
            2 => reply(403),
            _ => Act::Usual,
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let (_folder, store) = store();
    let options = signed_in(folder.path(), &server.host);
    pull(
        &Registry::to_pull(&reference(&server.host, TAG), options),
        &store,
        &NoProgress,
    )
    .unwrap();
    let log = elsewhere.state.lock().unwrap().log.clone();
    assert!(
        log.iter()
            .any(|request| request.header("range") == "bytes=20000-"),
        "{log:?}"
    );
    is_clean(&store);
    let seen = elsewhere
        .state
        .lock()
        .unwrap()
        .log
        .iter()
        .any(|request| !request.header("authorization").is_empty());
    assert!(!seen);
}

fn signed_in(folder: &std::path::Path, host: &str) -> Options {
    let file = folder.join("auth.json");
    std::fs::write(&file, "{}").unwrap();
    let keychain = ovbd_oci::Keychain::new(Some(&file), |_| None);
    keychain.save(host, "me", "top-secret").unwrap();
    let found = keychain.find(host, "x").unwrap().unwrap();
    assert!(matches!(found.login, Login::Basic { .. }));
    Options {
        keychain: keychain.into(),
        ..options()
    }
}

#[test]
fn refused_for_good() {
    for (status, who) in [(401, "me"), (403, "me")] {
        let server = Scripted::start();
        server.script(move |request| {
            if request.header("authorization").is_empty() {
                return Act::Reply(
                    401,
                    vec![("WWW-Authenticate", "Basic realm=\"x\"".to_owned())],
                    Vec::new(),
                );
            }
            let body = br#"{"errors":[{"code":"DENIED","message":"requested access is denied"}]}"#
                .to_vec();
            Act::Reply(
                status,
                vec![("WWW-Authenticate", "Basic realm=\"x\"".to_owned())],
                body,
            )
        });
        let folder = tempfile::tempdir().unwrap();
        let image = made(1, &[10]);
        let registry = Registry::to_push(
            &reference(&server.host, TAG),
            signed_in(folder.path(), &server.host),
        );
        let error = image.push(&registry, &[], None, &NoProgress).unwrap_err();
        let text = error.to_string();
        assert_eq!((error.kind(), error.status()), (Kind::Denied, Some(status)));
        assert!(
            text.contains(&format!(
                "not allowed to push to {}/vm/web as {who}",
                server.host
            )),
            "{text}"
        );
        assert!(
            text.contains("auth.json") && !text.contains("secret"),
            "{text}"
        );
        assert!(server.state.lock().unwrap().log.len() <= 6, "no loop");
    }
}

/// The sum of what was sent, with the number of cuts: no part twice more often than that.
fn cut_uploads(part: usize, seed: u64, cuts: u64, notes: bool) -> usize {
    let server = Scripted::start();
    let image = made(seed, &[1 << 20]);
    let mut random = Random(seed);
    let cut_at: Vec<usize> = (0..cuts)
        .map(|_| random.below(part as u64) as usize)
        .collect();
    let mut next = 0;
    let mut turn = 0;
    server.script(move |request| {
        if request.is("PATCH", "") {
            turn += 1;
            if turn % 2 == 1 && next < cut_at.len() {
                next += 1;
                return Act::CutRequest(cut_at[next - 1]);
            }
        }
        Act::Usual
    });
    let (_folder, store) = store();
    let retries = Retries {
        tries: 5,
        first: Duration::from_micros(100),
    };
    let options = Options {
        part_bytes: part as u64,
        retries,
        ..options()
    };
    let registry = Registry::to_push(&reference(&server.host, TAG), options);
    image
        .push(&registry, &[], notes.then_some(&store), &NoProgress)
        .unwrap();
    let state = server.state.lock().unwrap();
    assert_eq!(
        state.blobs[&image.manifest.layers[0].digest.to_string()],
        image.layers[0]
    );
    state.received - image.config.len() - image.bytes.len()
}

#[test]
fn an_upload_goes_on_from_the_byte_where_it_was_cut() {
    for seed in 1..=50 {
        // What the registry kept is not sent again.
        assert_eq!(
            cut_uploads(64 << 10, seed, 1 + seed % 5, seed % 2 == 0),
            1 << 20
        );
    }
}

#[test]
fn a_download_goes_on_from_the_byte_where_it_was_cut() {
    let server = Scripted::start();
    let image = made(1, &[1 << 20]);
    server.hold("vm/web", "mon", &image);
    let layer = image.manifest.layers[0].digest.to_string();
    for seed in 1..=50 {
        let mut random = Random(seed);
        let mut cuts = 1 + seed % 3;
        let layer = layer.clone();
        server.forget();
        server.script(move |request| {
            if request.is("GET", &layer) && cuts > 0 {
                cuts -= 1;
                return Act::CutAnswer(random.below(400_000) as usize);
            }
            Act::Usual
        });
        let (_folder, store) = store();
        let options = Options {
            retries: Retries {
                tries: 5,
                first: Duration::from_micros(100),
            },
            ..options()
        };
        pull(
            &Registry::to_pull(&reference(&server.host, TAG), options),
            &store,
            &NoProgress,
        )
        .unwrap();
        assert_eq!(
            server.state.lock().unwrap().sent,
            (1 << 20) + image.config.len(),
            "seed {seed}"
        );
    }
}

#[test]
fn another_process_goes_on_with_both_directions() {
    let server = Scripted::start();
    let image = made(9, &[1 << 20]);
    let (_folder, store) = store();
    let failing = |server: &Scripted| {
        let mut parts = 0;
        server.script(move |request| match request.method.as_str() {
            "PATCH" => {
                parts += 1;
                if parts > 5 {
                    reply(500)
                } else {
                    Act::Usual
                }
            }
            "GET" if request.path.contains("uploads") => reply(500),
            _ => Act::Usual,
        });
    };
    failing(&server);
    image
        .push(&pusher(&server, 64 << 10), &[], Some(&store), &NoProgress)
        .unwrap_err();
    server.usual();
    image
        .push(&pusher(&server, 64 << 10), &[], Some(&store), &NoProgress)
        .unwrap();
    let received = server.state.lock().unwrap().received;
    assert!(
        received <= (1 << 20) + (64 << 10) * 5 + 10_000,
        "{received} bytes"
    );
    assert_eq!(
        server.count("POST", "uploads"),
        2,
        "one for the layer, one for the configuration"
    );
    assert_eq!(
        std::fs::read_dir(store.path().join("ingest"))
            .unwrap()
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|end| end == "json"))
            .count(),
        0
    );

    server.forget();
    let layer = image.manifest.layers[0].digest.to_string();
    let mut first = true;
    server.script(move |request| match request.is("GET", &layer) {
        true if std::mem::take(&mut first) => Act::CutAnswer(700_000),
        true => reply(404),
        false => Act::Usual,
    });
    pull(&puller(&server), &store, &NoProgress).unwrap_err();
    server.usual();
    pull(&puller(&server), &store, &NoProgress).unwrap();
    assert_eq!(
        server.state.lock().unwrap().sent,
        (1 << 20) + 2 * image.config.len()
    );
}

#[test]
fn registries_that_take_no_parts_or_large_ones() {
    // As Google's: parts are refused.
    for status in [404, 405, 411, 413, 416, 501] {
        let server = Scripted::start();
        server.script(move |request| {
            if request.is("PATCH", "") {
                reply(status)
            } else {
                Act::Usual
            }
        });
        let image = made(1, &[300_000, 200_000]);
        image
            .push(&pusher(&server, 64 << 10), &[], None, &NoProgress)
            .unwrap();
        assert!(server.count("PATCH", "") <= 2);
    }
    // As Amazon's: 201 for a part, and a least size of parts.
    let server = Scripted::start();
    server.script(|request| match request.is("POST", "uploads") {
        true => Act::Change(|headers, _| {
            headers.push(("OCI-Chunk-Min-Length".to_owned(), "100000".to_owned()))
        }),
        false => Act::Usual,
    });
    let image = made(1, &[300_000]);
    image
        .push(&pusher(&server, 64 << 10), &[], None, &NoProgress)
        .unwrap();
    assert_eq!(server.count("PATCH", ""), 3);
    let server = Scripted::start();
    let layer = image.manifest.layers[0].digest.to_string();
    let mut all = false;
    server.script(move |request| {
        if request.is("PATCH", "") && request.header("content-range").ends_with("-299999") {
            all = true;
            return reply(201);
        }
        match request.is("HEAD", &layer) && all {
            true => Act::Reply(
                200,
                vec![("Content-Length", "300000".to_owned())],
                Vec::new(),
            ),
            false => Act::Usual,
        }
    });
    image
        .push(&pusher(&server, 64 << 10), &[], None, &NoProgress)
        .unwrap();
    assert_eq!(
        server.count("PUT", "uploads"),
        1,
        "that of the configuration"
    );
    // No HEAD.
    let server = Scripted::start();
    server.script(|request| {
        if request.method == "HEAD" {
            reply(405)
        } else {
            Act::Usual
        }
    });
    image
        .push(&pusher(&server, 64 << 20), &[], None, &NoProgress)
        .unwrap();
}

#[test]
fn what_is_there_is_not_sent() {
    let server = Scripted::start();
    let image = made(1, &[70_000, 5000, 70_000]);
    let events = Events::default();
    image
        .push(&pusher(&server, 64 << 10), &[], None, &events)
        .unwrap();
    assert_eq!(
        events
            .take()
            .iter()
            .filter(|event| *event == "done")
            .count(),
        4
    );
    server.forget();
    image
        .push(&pusher(&server, 64 << 10), &[], None, &events)
        .unwrap();
    assert!(events.take().iter().all(|event| event == "present"));
    assert_eq!(server.count("POST", ""), 0);
    // Another repository of the same registry has it.
    server.forget();
    server.script(|request| match request.method.as_str() {
        "HEAD" => reply(404),
        _ => Act::Usual,
    });
    image
        .push(
            &pusher(&server, 64 << 10),
            &["vm/web".to_owned(), "vm/other".to_owned()],
            None,
            &events,
        )
        .unwrap();
    assert!(events
        .take()
        .iter()
        .all(|event| event == "mounted vm/other"));
    assert_eq!(server.state.lock().unwrap().received, image.bytes.len());
    // The same layer twice is one transfer.
    let twice = made_of(vec![image.layers[0].clone(), image.layers[0].clone()]);
    let server = Scripted::start();
    twice
        .push(&pusher(&server, 64 << 20), &[], None, &events)
        .unwrap();
    assert_eq!(server.count("POST", ""), 2);
    let (_folder, store) = store();
    pull(&puller(&server), &store, &events).unwrap();
    is_clean(&store);
}

#[test]
fn a_token_that_runs_out_in_mid_upload() {
    let server = Scripted::start();
    let image = made(1, &[300_000]);
    let host = server.host.clone();
    let mut uses: HashMap<String, u32> = HashMap::new();
    let mut given = 0;
    server.script(move |request: &Request| {
        if request.path == "/token" {
            given += 1;
            let scope = request
                .query
                .contains("scope=repository:vm/web:pull%2Cpush");
            let basic = request.header("authorization").starts_with("Basic ");
            return match scope && basic && request.query.contains("service=here") {
                true => Act::Reply(
                    200,
                    Vec::new(),
                    format!(r#"{{"access_token":"t{given}","expires_in":1000}}"#).into_bytes(),
                ),
                false => reply(400),
            };
        }
        let used = uses
            .entry(request.header("authorization").to_owned())
            .or_default();
        *used += 1;
        if !request.header("authorization").starts_with("Bearer t") || *used > 3 {
            let demand =
                format!("Bearer realm=\"http://{host}/token\",service=\"here\",scope=\"x\"");
            return Act::Reply(401, vec![("WWW-Authenticate", demand)], Vec::new());
        }
        Act::Usual
    });
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        part_bytes: 64 << 10,
        ..signed_in(folder.path(), &server.host)
    };
    // One after the other: a token that another thread has used up counts as refused.
    let registry = Registry::to_push(&reference(&server.host, TAG), options);
    image
        .push_jobs(&registry, &[], None, &NoProgress, 1)
        .unwrap();
    assert!(server.count("GET", "/token") >= 3);
    let log = server.state.lock().unwrap().log.clone();
    assert!(log.iter().all(|request| !request.query.contains("secret")));
}

#[test]
fn referrers_are_listed() {
    let server = Scripted::start();
    let registry = pusher(&server, 64 << 20);
    let source = made(1, &[10]);
    source.push(&registry, &[], None, &NoProgress).unwrap();
    let mut with_subject = made(2, &[10]).manifest;
    with_subject.subject = Some(Descriptor::of(MediaType::OciManifest.name(), &source.bytes));
    with_subject.artifact_type = Some(ARTIFACT_TYPE.to_owned());
    for _ in 0..2 {
        let bytes = with_subject.to_bytes();
        let descriptor = Descriptor::of(MediaType::OciManifest.name(), &bytes);
        registry
            .put_document(
                &descriptor.digest.to_string(),
                MediaType::OciManifest.name(),
                &bytes,
            )
            .unwrap();
        assert!(!registry.knows_subjects());
        registry.list_referrer(&with_subject, &descriptor).unwrap();
    }
    let tag = format!("sha256-{}", source.digest().hex());
    let (bytes, _) = registry.document(&tag).unwrap().unwrap();
    let index: Index = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(index.manifests.len(), 1);
    assert_eq!(
        index.manifests[0].artifact_type.as_deref(),
        Some(ARTIFACT_TYPE)
    );
}

#[test]
fn loopback_is_asked_with_tls_first() {
    let server = Scripted::start();
    let image = made(1, &[10]);
    server.hold("vm/web", "mon", &image);
    let options = Options {
        plain_http: false,
        ..options()
    };
    let registry = Registry::to_pull(&reference(&server.host, TAG), options.clone());
    assert_eq!(
        registry.image(&Platform::here()).unwrap().descriptor.digest,
        image.digest()
    );
    // Another machine is never asked without.
    let registry = Registry::to_pull(&reference("registry.invalid", TAG), options);
    assert!(registry.image(&Platform::here()).is_err());
}

#[test]
fn the_first_failure_ends_all() {
    let server = Scripted::start();
    let image = made(1, &[100_000; 6]);
    server.hold("vm/web", "mon", &image);
    let bad = image.manifest.layers[1].digest.to_string();
    server.script(move |request| {
        if request.is("GET", &bad) {
            reply(404)
        } else {
            Act::Usual
        }
    });
    let (_folder, store) = store();
    let registry = puller(&server);
    let error = pull(&registry, &store, &NoProgress).unwrap_err();
    assert_eq!(error.kind(), Kind::Missing);
    assert!(!registry.is_stopped(), "over with them");
    is_clean(&store);
    // What was fetched is not fetched again.
    server.usual();
    pull(&puller(&server), &store, &NoProgress).unwrap();
    is_clean(&store);
}

#[test]
fn two_pulls_of_one_image_fetch_it_once() {
    let server = Scripted::start();
    let image = made(1, &[300_000, 200_000, 100_000]);
    server.hold("vm/web", "mon", &image);
    let (_folder, store) = store();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| pull(&puller(&server), &store, &NoProgress).unwrap());
        }
    });
    for layer in image.manifest.layers.iter() {
        assert_eq!(server.count("GET", layer.digest.hex()), 1);
    }
    is_clean(&store);
    assert!(matches!(
        store.ingest(&image.manifest.layers[0], || ()).unwrap(),
        Ingested::Present
    ));
}

#[test]
fn a_blob_larger_than_the_disk_is_not_begun() {
    let server = Scripted::start();
    let mut image = made(1, &[1000]);
    image.manifest.layers.0[0].size = 1 << 60;
    image.bytes = image.manifest.to_bytes();
    server.hold("vm/web", "mon", &image);
    let (_folder, store) = store();
    let error = pull(&puller(&server), &store, &NoProgress).unwrap_err();
    assert!(error.what().contains("no room"), "{error}");
    assert_eq!(
        server.count("GET", image.manifest.layers[0].digest.hex()),
        0
    );
}
