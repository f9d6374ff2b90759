// SPDX-License-Identifier: GPL-2.0

//! Debian's docker-registry, plain and with TLS, passwords and tokens, with bad connections, and with skopeo and oras as the
//! other clients.

mod common;
#[path = "../../layers/tests/common/programs.rs"]
mod programs;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{atomic::Ordering::SeqCst, Arc},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
    Engine,
};
use common::{
    is_clean, made, options,
    proxy::Proxy,
    pull, reference,
    server::{certificates, free_port, has, run, DockerRegistry},
    signed_in, store, Events, Made, Random,
};
use ovbd_oci::{Kind, Limiter, NoProgress, Options, Registry, Retries, Store};
use rustls::pki_types::{pem::PemObject, CertificateDer, PrivateKeyDer};

const PART: u64 = 256 << 10;

fn to_push(host: &str, options: Options) -> Registry {
    Registry::to_push(&reference(host, "vm/web:mon"), options)
}

fn to_pull(host: &str, options: Options) -> Registry {
    Registry::to_pull(&reference(host, "vm/web:mon"), options)
}

/// Pulls into a new store and compares with what was pushed.
fn comes_back(host: &str, options: Options, made: &Made) {
    let (_folder, store) = store();
    let image = pull(&to_pull(host, options), &store, &NoProgress).unwrap();
    assert_eq!(image.descriptor.digest, made.digest());
    assert_eq!(image.manifest_bytes, made.bytes);
    is_clean(&store);
}

#[test]
fn there_and_back() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    let proxy = Proxy::start(&server.host);
    let parts = Options {
        part_bytes: PART,
        ..options()
    };
    // Whole, in parts that fit, and in parts that do not.
    let image = made(
        1,
        &[
            1000,
            4 * PART as usize,
            3 * PART as usize + 17,
            PART as usize,
        ],
    );
    let events = Events::default();
    image
        .push(&to_push(&server.host, parts.clone()), &[], None, &events)
        .unwrap();
    assert_eq!(
        events
            .take()
            .iter()
            .filter(|event| *event == "done")
            .count(),
        5
    );
    comes_back(&server.host, options(), &image);
    // Nothing but questions the second time.
    image
        .push(&to_push(&proxy.host, parts), &[], None, &events)
        .unwrap();
    assert!(events.take().iter().all(|event| event == "present"));
    assert!(proxy.faults.up.bytes.load(SeqCst) < 10_000);
    // Another repository takes the blobs from the first.
    let other = Registry::to_push(&reference(&server.host, "other:x"), options());
    image
        .push(&other, &["vm/web".to_owned()], None, &events)
        .unwrap();
    assert!(events.take().iter().all(|event| event == "mounted vm/web"));
}

/// How often connections are cut and clients are killed.
fn times() -> u64 {
    std::env::var("OVBD_TRANSFERS").map_or(50, |times| times.parse().unwrap())
}

#[test]
fn a_cut_connection_costs_one_layer_at_most() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    let mut random = Random(7);
    let (size, mut most) = (600_000, (0, 0));
    for round in 0..times() {
        let image = made(100 + round, &[size, size]);
        let proxy = Proxy::start(&server.host);
        let (up, down) = (&proxy.faults.up, &proxy.faults.down);
        let options = Options {
            part_bytes: PART,
            retries: Retries {
                tries: 5,
                first: Duration::from_millis(1),
            },
            ..options()
        };
        up.cut.store(1 + random.below(2 * size as u64), SeqCst);
        image
            .push(
                &to_push(&proxy.host, options.clone()),
                &[],
                None,
                &NoProgress,
            )
            .unwrap();
        let sent = up.bytes.load(SeqCst);
        most.0 = most.0.max(sent.saturating_sub(2 * size as u64));
        assert!(
            sent <= 3 * size as u64 + 40_000,
            "round {round}: {sent} bytes sent"
        );
        down.cut.store(
            down.bytes.load(SeqCst) + 1 + random.below(2 * size as u64),
            SeqCst,
        );
        let before = down.bytes.load(SeqCst);
        comes_back(&proxy.host, options, &image);
        let came = down.bytes.load(SeqCst) - before;
        most.1 = most.1.max(came.saturating_sub(2 * size as u64));
        // What is on its way when the connection ends is lost.
        assert!(
            came <= 2 * size as u64 + 300_000,
            "round {round}: {came} bytes came"
        );
    }
    println!(
        "{} cuts each way, layers of {size} bytes: at most {} bytes were sent and {} fetched twice",
        times(),
        most.0,
        most.1
    );
}

#[test]
fn stalled_and_slow_connections() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    let image = made(5, &[900_000]);
    let proxy = Proxy::start(&server.host);
    let options = Options {
        part_bytes: PART,
        stall: Duration::from_secs(2),
        retries: Retries {
            tries: 30,
            first: Duration::from_millis(2),
        },
        ..options()
    };
    proxy.faults.up.stall.store(500_000, SeqCst);
    let events = Events::default();
    image
        .push(&to_push(&proxy.host, options.clone()), &[], None, &events)
        .unwrap();
    assert!(
        events
            .take()
            .iter()
            .any(|event| event.starts_with("waiting")),
        "it was noticed"
    );
    proxy
        .faults
        .down
        .stall
        .store(proxy.faults.down.bytes.load(SeqCst) + 300_000, SeqCst);
    comes_back(&proxy.host, options.clone(), &image);
    // Slow is not stalled.
    proxy.faults.down.rate.store(600_000, SeqCst);
    comes_back(&proxy.host, options, &image);
}

#[test]
fn tls_and_passwords() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let files = certificates(folder.path());
    // "me" with "secret" (bcrypt).
    let users = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
    fs::write(folder.path().join("htpasswd"), users).unwrap();
    let server = DockerRegistry::with(|_, _| {
        let tls = format!(
            "  tls:\n    certificate: {}\n    key: {}\n",
            files.certificate.display(),
            files.key.display()
        );
        let auth = format!(
            "auth:\n  htpasswd:\n    realm: here\n    path: {}/htpasswd\n",
            folder.path().display()
        );
        (tls, auth)
    });
    let Some(server) = server else { return };
    let image = made(1, &[300_000]);
    let encrypted = Options {
        plain_http: false,
        ca: Some(files.ca.clone()),
        part_bytes: PART,
        ..options()
    };
    let signed_in = |password: &str| {
        let file = folder.path().join(format!("auth-{password}.json"));
        signed_in(encrypted.clone(), &file, &server.host, password)
    };
    to_push(&server.host, encrypted.clone())
        .check_login("me", "secret")
        .unwrap();
    assert_eq!(
        to_push(&server.host, encrypted.clone())
            .check_login("me", "wrong")
            .unwrap_err()
            .kind(),
        Kind::Denied
    );
    image
        .push(
            &to_push(&server.host, signed_in("secret")),
            &[],
            None,
            &NoProgress,
        )
        .unwrap();
    comes_back(&server.host, signed_in("secret"), &image);
    for (options, who) in [
        (signed_in("wrong"), "as me (credentials from"),
        (encrypted.clone(), "without credentials"),
    ] {
        let error = image
            .push(&to_push(&server.host, options), &[], None, &NoProgress)
            .unwrap_err();
        assert!(
            error.kind() == Kind::Denied && error.to_string().contains(who),
            "{error}"
        );
    }
    // A certificate that nobody vouches for is no reason to do without one.
    let untrusted = Options {
        ca: None,
        ..signed_in("secret")
    };
    let error = to_pull(&server.host, untrusted)
        .document("mon")
        .unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    // Nor is HTTPS spoken to in the clear.
    let plain = Options {
        plain_http: true,
        ..signed_in("secret")
    };
    assert!(to_pull(&server.host, plain).document("mon").is_err());
}

/// Answers every request by TLS with a redirect to `to`.
fn redirect_by_tls(listener: TcpListener, certificate: &Path, key: &Path, to: String) {
    let chain = CertificateDer::pem_file_iter(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            chain.map(Result::unwrap).collect(),
            PrivateKeyDer::from_pem_file(key).unwrap(),
        )
        .unwrap();
    let config = Arc::new(config);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut session = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut tls = rustls::Stream::new(&mut session, &mut stream);
            let mut line = String::new();
            // What does not like the certificate ends here.
            if BufReader::new(&mut tls).read_line(&mut line).is_err() {
                continue;
            }
            let path = line.split_whitespace().nth(1).unwrap_or("/");
            let answer = format!(
                "HTTP/1.1 307 X\r\nLocation: {to}{path}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            tls.write_all(answer.as_bytes()).ok();
            tls.flush().ok();
        }
    });
}

#[test]
fn no_redirect_leads_out_of_encryption() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let files = certificates(folder.path());
    let plain = common::scripted::Scripted::start();
    let image = made(1, &[10]);
    plain.hold("vm/web", "mon", &image);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let to = format!("http://{}", plain.host);
    redirect_by_tls(listener, &files.certificate, &files.key, to);
    let options = Options {
        plain_http: false,
        ca: Some(files.ca),
        ..options()
    };
    let error = to_pull(&host, options).document("mon").unwrap_err();
    assert!(error.what().contains("from https to http"), "{error}");
    let asked = plain.state.lock().unwrap().log.len();
    assert_eq!(asked, 0, "nothing was asked there");
}

/// Gives tokens of two seconds for what is asked for, to whoever is "me" with "secret".
fn token_server(listener: TcpListener, key: &Path, certificate: &Path) {
    let pem = fs::read_to_string(certificate).unwrap();
    let der: String = pem
        .lines()
        .filter(|line| !line.starts_with("-----"))
        .collect();
    let key = key.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            answer_token(stream, &key, &der);
        }
    });
}

fn answer_token(mut stream: TcpStream, key: &Path, certificate: &str) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let target = line.split_whitespace().nth(1)?.to_owned();
    let mut right = false;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        right |= line
            .trim_end()
            .ends_with(&BASE64_STANDARD.encode("me:secret"));
        if line.trim().is_empty() {
            break;
        }
    }
    if !right {
        return stream
            .write_all(b"HTTP/1.1 401 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .ok();
    }
    let scopes = target
        .split(['?', '&'])
        .filter_map(|pair| pair.strip_prefix("scope="));
    let access: Vec<serde_json::Value> = scopes
        .map(|scope| {
            let scope = scope.replace("%2C", ",");
            let mut parts = scope.split(':');
            let (kind, name, actions) = (parts.next(), parts.next(), parts.next().unwrap_or_default());
            serde_json::json!({"type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>()})
        })
        .collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
    let head = serde_json::json!({"typ": "JWT", "alg": "ES256", "x5c": [certificate]});
    let claims = serde_json::json!({"iss": "issuer", "sub": "me", "aud": "here", "exp": now + 2, "nbf": now - 10, "iat": now, "jti": "x", "access": access});
    let encode = |value: &serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", encode(&head), encode(&claims));
    let pem = fs::read_to_string(key).ok()?;
    let der = BASE64_STANDARD
        .decode(
            pem.lines()
                .filter(|line| !line.starts_with("-----"))
                .collect::<String>(),
        )
        .ok()?;
    let random = ring::rand::SystemRandom::new();
    let algorithm = &ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING;
    let pair = ring::signature::EcdsaKeyPair::from_pkcs8(algorithm, &der, &random).ok()?;
    let signature = pair.sign(&random, signed.as_bytes()).ok()?;
    let token = format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature));
    let body = serde_json::json!({"token": token, "expires_in": 2}).to_string();
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body.as_bytes()).ok()
}

#[test]
fn tokens_of_two_seconds() {
    if !has("openssl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let files = certificates(folder.path());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    token_server(listener, &files.key, &files.certificate);
    let server = DockerRegistry::with(|_, _| {
        let auth = format!(
            "auth:\n  token:\n    realm: {realm}\n    service: here\n    issuer: issuer\n    rootcertbundle: {}\n",
            files.ca.display()
        );
        (String::new(), auth)
    });
    let Some(server) = server else { return };
    let file = folder.path().join("auth.json");
    let image = made(3, &[900_000, 100_000]);
    let options = Options {
        part_bytes: 100_000,
        // Five seconds, more than the life of two tokens.
        limiter: Limiter::new(Some(200_000)).into(),
        ..signed_in(options(), &file, &server.host, "secret")
    };
    image
        .push(
            &to_push(&server.host, options.clone()),
            &[],
            None,
            &NoProgress,
        )
        .unwrap();
    comes_back(
        &server.host,
        Options {
            limiter: Limiter::new(None).into(),
            ..options.clone()
        },
        &image,
    );
    let other = Registry::to_push(&reference(&server.host, "other:x"), options.clone());
    let events = Events::default();
    image
        .push(&other, &["vm/web".to_owned()], None, &events)
        .unwrap();
    assert!(events.take().iter().all(|event| event == "mounted vm/web"));
    let options = signed_in(options, &file, &server.host, "wrong");
    let error = image
        .push(&to_push(&server.host, options), &[], None, &NoProgress)
        .unwrap_err();
    assert!(
        error.kind() == Kind::Denied && error.to_string().contains("as me"),
        "{error}"
    );
}

#[test]
fn skopeo_and_oras_understand_us() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    let image = made(1, &[300_000, 20_000]);
    image
        .push(&to_push(&server.host, options()), &[], None, &NoProgress)
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| format!("{}/{name}", folder.path().display());
    let (folder_a, store_a) = store();
    pull(&to_pull(&server.host, options()), &store_a, &NoProgress).unwrap();
    let name = reference(&server.host, "vm/web:mon").to_string();
    if has("skopeo") {
        // Out of the registry, and back into it, as it is.
        let there = format!("docker://{}/vm/web:mon", server.host);
        let copy = format!("oci:{}:copied", place("skopeo"));
        run(
            "skopeo",
            &[
                "--insecure-policy",
                "copy",
                "--preserve-digests",
                "--src-tls-verify=false",
                &there,
                &copy,
            ],
        );
        let copied = Store::open(Path::new(&place("skopeo"))).unwrap();
        assert_eq!(
            copied.find(Some("copied")).unwrap().descriptor.digest,
            image.digest()
        );
        assert!(copied.check(|_| ()).unwrap().is_empty());
        let back = format!("docker://{}/vm/back:x", server.host);
        run(
            "skopeo",
            &[
                "--insecure-policy",
                "copy",
                "--preserve-digests",
                "--dest-tls-verify=false",
                &copy,
                &back,
            ],
        );
        let found = Registry::to_pull(&reference(&server.host, "vm/back:x"), options())
            .document("x")
            .unwrap();
        assert_eq!(found.unwrap().0, image.bytes);
        // Out of our store.
        let ours = format!("oci:{}:{name}", folder_a.path().display());
        run(
            "skopeo",
            &[
                "--insecure-policy",
                "copy",
                "--preserve-digests",
                "--dest-tls-verify=false",
                &ours,
                &back,
            ],
        );
    }
    if has("oras") {
        let there = format!("{}/vm/web:mon", server.host);
        let copy = format!("{}:copied", place("oras"));
        run(
            "oras",
            &["cp", "--from-plain-http", "--to-oci-layout", &there, &copy],
        );
        let copied = Store::open(Path::new(&place("oras"))).unwrap();
        assert_eq!(
            copied.find(Some("copied")).unwrap().descriptor.digest,
            image.digest()
        );
        let back = format!("{}/vm/oras:x", server.host);
        run(
            "oras",
            &["cp", "--from-oci-layout", "--to-plain-http", &copy, &back],
        );
        let found = Registry::to_pull(&reference(&server.host, "vm/oras:x"), options())
            .document("x")
            .unwrap();
        assert_eq!(found.unwrap().0, image.bytes);
    }
}

/// Called anew by the test below, in a process that it kills.
#[test]
fn child() {
    let Ok(arguments) = std::env::var("OVBD_OCI_CHILD") else {
        return;
    };
    let (host, folder) = arguments.split_once(' ').unwrap();
    let options = Options {
        limiter: Limiter::new(Some(20_000_000)).into(),
        part_bytes: PART,
        ..options()
    };
    let folder = Path::new(folder);
    if folder.join("push").exists() {
        let notes = Store::create(&folder.join("store")).unwrap();
        kill_image()
            .push(&to_push(host, options), &[], Some(&notes), &NoProgress)
            .unwrap();
    } else {
        let store = Store::create(&folder.join("store")).unwrap();
        pull(&to_pull(host, options), &store, &NoProgress).unwrap();
    }
}

fn kill_image() -> Made {
    made(11, &[700_000, 900_000, 500_000])
}

/// Starts the child again and again, kills it at random moments, and lets it end at last.
fn killed_often(host: &str, folder: &Path, times: u64) {
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env("OVBD_OCI_CHILD", format!("{host} {}", folder.display()))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut random = Random(3);
    for _ in 0..times {
        let mut child = start();
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        if let Ok(store) = Store::open(&folder.join("store")) {
            is_clean(&store);
        }
    }
    assert!(start().wait().unwrap().success());
}

#[test]
fn killed_at_any_moment() {
    let Some(server) = DockerRegistry::start() else {
        return;
    };
    let times = times();
    let pushing = tempfile::tempdir().unwrap();
    fs::write(pushing.path().join("push"), "").unwrap();
    killed_often(&server.host, pushing.path(), times);
    let pulling = tempfile::tempdir().unwrap();
    killed_often(&server.host, pulling.path(), times);
    let store = Store::open(&pulling.path().join("store")).unwrap();
    is_clean(&store);
    let found = store
        .find(Some(&reference(&server.host, "vm/web:mon").to_string()))
        .unwrap();
    assert_eq!(found.descriptor.digest, kill_image().digest());
    assert!(free_port() > 0);
}
