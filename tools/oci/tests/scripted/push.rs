// SPDX-License-Identifier: GPL-2.0

//! Uploads that are cut, refused, taken in parts or not needed.

use std::time::Duration;

use ovbd_oci::{Kind, NoProgress, Options, Registry, Retries};

use crate::{
    common::{
        is_clean, made, made_of, options, pull, reference,
        scripted::{reply, Act, Scripted},
        store, Events, Random,
    },
    puller, pusher, TAG,
};

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

/// Pushes a layer in parts or whole to a server that answers requests of this kind so, the first `times` of them.
fn push_refused(
    method: &'static str,
    status: u16,
    times: usize,
    part_bytes: u64,
) -> (Scripted, Result<(), ovbd_oci::Error>) {
    let server = Scripted::start();
    let mut count = 0;
    server.script(move |request| {
        if request.is(method, "/blobs/uploads/") && count < times {
            count += 1;
            return reply(status);
        }
        Act::Usual
    });
    let image = made(1, &[200_000]);
    // One after the other, so that it is clear what was asked how often.
    let result = image.push_jobs(&pusher(&server, part_bytes), &[], None, &NoProgress, 1);
    (server, result)
}

#[test]
fn an_upload_that_is_refused_for_a_while_and_for_ever() {
    for method in ["POST", "PATCH", "PUT"] {
        let part_bytes = if method == "PATCH" {
            64 << 10
        } else {
            64 << 20
        };
        for status in [408, 429, 500, 502, 503, 504] {
            let (_, result) = push_refused(method, status, 2, part_bytes);
            result.unwrap_or_else(|error| panic!("{method} {status}: {error}"));
            let (server, result) = push_refused(method, status, usize::MAX, part_bytes);
            let error = result.unwrap_err();
            assert_eq!(
                (error.kind(), error.status()),
                (Kind::Temporary, Some(status)),
                "{method}"
            );
            assert_eq!(
                server.count(method, "/blobs/uploads/"),
                4,
                "the budget of tries"
            );
        }
    }
    for (method, status) in [("POST", 400), ("POST", 413), ("PUT", 400), ("PUT", 413)] {
        let (server, result) = push_refused(method, status, usize::MAX, 64 << 20);
        let error = result.unwrap_err();
        assert_eq!(error.status(), Some(status), "{method}");
        assert!(error.to_string().contains(method), "{error}");
        assert_eq!(
            server.count(method, "/blobs/uploads/"),
            1,
            "not tried again"
        );
        assert!(server.state.lock().unwrap().manifests.is_empty());
    }
}

#[test]
fn two_pushes_of_one_image_send_it_once() {
    let server = Scripted::start();
    let image = made(5, &[300_000, 200_000]);
    let (_folder, store) = store();
    let events = Events::default();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let registry = pusher(&server, 64 << 10);
                image.push(&registry, &[], Some(&store), &events).unwrap();
            });
        }
    });
    let blobs = image.layers.len() + 1;
    assert_eq!(server.count("POST", "uploads"), blobs);
    let sent = server.state.lock().unwrap().received;
    let documents = 3 * image.bytes.len();
    assert_eq!(sent, 500_000 + image.config.len() + documents);
    let done = events.take();
    assert_eq!(done.iter().filter(|event| *event == "done").count(), blobs);
    let left = std::fs::read_dir(store.path().join("ingest")).unwrap();
    assert_eq!(left.count(), 0, "no note is left");
}
