// SPDX-License-Identifier: GPL-2.0

//! Who asks, and who hears of it.

use std::collections::HashMap;

use ovbd_oci::{Kind, NoProgress, Options, Platform, Registry};

use crate::{
    common::{
        is_clean, made, options, pull, reference,
        scripted::{reply, Act, Request, Scripted},
        signed_in, store,
    },
    TAG,
};

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
    let options = signed_in(
        options(),
        &folder.path().join("auth.json"),
        &server.host,
        "top-secret",
    );
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
            signed_in(
                options(),
                &folder.path().join("auth.json"),
                &server.host,
                "top-secret",
            ),
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
                    format!(r#"{{"access_token":"token-secret-{given}","expires_in":1000}}"#)
                        .into_bytes(),
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
        ..signed_in(
            options(),
            &folder.path().join("auth.json"),
            &server.host,
            "top-secret",
        )
    };
    // One after the other: a token that another thread has used up counts as refused.
    let registry = Registry::to_push(&reference(&server.host, TAG), options);
    image
        .push_jobs(&registry, &[], None, &NoProgress, 1)
        .unwrap();
    assert!(server.count("GET", "/token") >= 3);
    let log = server.state.lock().unwrap().log.clone();
    assert!(log.iter().all(|request| !request.query.contains("secret")));
    let shown = format!("{registry:?}");
    assert!(
        shown.contains("auth") && !shown.contains("secret"),
        "{shown}"
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
    // Another machine is never asked without, and one that has no name is not asked again.
    let registry = Registry::to_pull(&reference("registry.invalid", TAG), options);
    let error = registry.image(&Platform::here()).unwrap_err();
    assert!(error.what().starts_with("no such host"), "{error}");
    assert_eq!(error.kind(), Kind::Refused, "for good");
}
