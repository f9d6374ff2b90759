// SPDX-License-Identifier: GPL-2.0

//! Passwords, and who hears of them.

use std::{fs, process::Command};

use ovbd_oci::Registry;

use crate::{
    registry::{
        options, reference,
        scripted::{Act, Scripted},
    },
    Place,
};

#[test]
fn passwords_are_saved_and_never_shown() {
    use std::io::Write;
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    server.script(|request| {
        let right = request.header("authorization") == "Basic bWU6dG9wLXNlY3JldA==";
        match right {
            true => Act::Usual,
            false => Act::Reply(
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

#[test]
fn a_helper_is_told_the_host_and_nothing_else() {
    use std::os::unix::fs::PermissionsExt;
    let server = Scripted::start();
    let (here, host) = (Place::new(), &server.host);
    server.script(|request| {
        match request.header("authorization") == "Basic bWU6dG9wLXNlY3JldA==" {
            true => Act::Usual,
            false => Act::Reply(
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
