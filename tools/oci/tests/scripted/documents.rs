// SPDX-License-Identifier: GPL-2.0

//! Manifests and indexes that are not what they should be.

use std::time::{Duration, Instant};

use ovbd_oci::{
    annotations::ARTIFACT_TYPE, Descriptor, Digest, Index, Kind, Manifest, MediaType, NoProgress,
    Platform, Registry,
};

use crate::{
    common::{
        made, options, reference,
        scripted::{Act, Scripted},
    },
    puller, pusher,
};

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
    let crowded = format!(r#"{{"schemaVersion":2,"x":[{}0]}}"#, "0,".repeat(1 << 17));
    let mut large = manifest(1);
    large.resize((4 << 20) + 1, b' ');
    for (name, media_type, bytes) in [
        ("4 MiB + 1", oci, large),
        ("256 layers", oci, manifest(256)),
        ("10,000 layers", oci, manifest(10_000)),
        ("no layers", oci, manifest(0)),
        ("index in index in index", index_type, three),
        ("1,025 entries", index_type, many),
        (
            "more values than any document has",
            oci,
            crowded.into_bytes(),
        ),
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
        let fetched = server.count("GET", "/blobs/") - server.count("GET", config.digest.hex());
        assert_eq!(fetched, 0, "{name}: before any layer is fetched");
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
