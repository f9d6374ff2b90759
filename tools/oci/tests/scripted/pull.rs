// SPDX-License-Identifier: GPL-2.0

//! Blobs that come wrong, late, in pieces or not at all.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use ovbd_oci::{Ingested, Kind, NoProgress, Options, Registry, Retries};

use crate::{
    common::{
        is_clean, made, options, pull, reference,
        scripted::{reply, Act, Scripted},
        store, Events, Random,
    },
    puller, TAG,
};

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
