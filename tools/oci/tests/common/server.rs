// SPDX-License-Identifier: GPL-2.0

//! Debian's docker-registry on the loopback, with a folder of its own.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub use crate::programs::has;

/// A running docker-registry; it ends when it is dropped.
pub struct DockerRegistry {
    pub host: String,
    folder: tempfile::TempDir,
    child: Child,
}

/// Runs a program that must succeed, and gives back what it prints.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A port on which nobody listens.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

impl DockerRegistry {
    /// Without TLS and passwords; None where the program is not installed.
    pub fn start() -> Option<Self> {
        Self::with(|_, _| (String::new(), String::new()))
    }

    /// With what `more` gives for its folder and port: lines for the section `http`, and sections.
    pub fn with(more: impl FnOnce(&Path, u16) -> (String, String)) -> Option<Self> {
        if !has("docker-registry") {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let (http, sections) = more(folder.path(), port);
        let config = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n  secret: none\n{http}{sections}",
            folder.path().join("data").display(),
        );
        fs::write(folder.path().join("config.yml"), config).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(folder.path().join("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server = Self {
            host: format!("127.0.0.1:{port}"),
            folder,
            child,
        };
        let end = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(&server.host).is_err() {
            let ended = server.child.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < end,
                "docker-registry: {}",
                server.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(server)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// An authority, and a certificate and key for 127.0.0.1 and localhost signed by it.
pub struct Certificates {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

pub fn certificates(folder: &Path) -> Certificates {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (ca, ca_key, key, request, certificate) = (
        path("ca.crt"),
        path("ca.key"),
        path("server.key"),
        path("server.csr"),
        path("server.crt"),
    );
    let new_key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
    ];
    let mut arguments = vec!["req", "-x509", "-days", "2"];
    arguments.extend(new_key);
    arguments.extend(["/CN=test authority", "-keyout", &ca_key, "-out", &ca]);
    run("openssl", &arguments);
    let mut arguments = vec!["req"];
    arguments.extend(new_key);
    arguments.extend(["/CN=test", "-keyout", &key, "-out", &request]);
    run("openssl", &arguments);
    let extensions = path("extensions");
    fs::write(
        &extensions,
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-days",
            "2",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-extfile",
            &extensions,
            "-out",
            &certificate,
        ],
    );
    Certificates {
        ca: ca.into(),
        certificate: certificate.into(),
        key: key.into(),
    }
}
