// SPDX-License-Identifier: GPL-2.0

//! Credentials for registries, from the files and helpers that container tools use.

use std::{
    fs, io,
    io::{Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use base64::{prelude::BASE64_STANDARD, Engine};
use serde::Deserialize;
use serde_json::{json, Value};

use crate::{
    error::{Error, Kind, Result},
    ingest::lock_exclusive,
};

/// How long a helper may take.
const HELPER_LIMIT: Duration = Duration::from_secs(30);
/// Most bytes of a file or of a helper's answer.
const MAX_BYTES: u64 = 1 << 20;
/// Key of the hub's credentials in old files.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// How to show who one is. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// Name and password.
    Basic {
        /// Name of the user.
        user: String,
        /// The secret.
        password: String,
    },
    /// A token that buys other tokens.
    Identity {
        /// The secret.
        token: String,
    },
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.user())
    }
}

impl Login {
    /// Who one is, for messages.
    pub fn user(&self) -> String {
        match self {
            Self::Basic { user, .. } => user.clone(),
            Self::Identity { .. } => "the holder of an identity token".to_owned(),
        }
    }
}

/// A login and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The login.
    pub login: Login,
    /// File or helper, for messages.
    pub from: String,
}

/// The places where credentials are looked for.
#[derive(Clone, Debug, Default)]
pub struct Keychain {
    files: Vec<PathBuf>,
    /// The first must exist.
    must_exist: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct File {
    auths: serde_json::Map<String, Value>,
    #[serde(rename = "credHelpers")]
    helpers: serde_json::Map<String, Value>,
    #[serde(rename = "credsStore")]
    store: String,
}

impl Keychain {
    /// No credentials.
    pub fn empty() -> Self {
        Self::default()
    }

    /// `file`, or without one the places where skopeo and docker have theirs, by `variable` of the environment.
    pub fn new(file: Option<&Path>, variable: impl Fn(&str) -> Option<PathBuf>) -> Self {
        if let Some(file) = file {
            return Self {
                files: vec![file.to_owned()],
                must_exist: true,
            };
        }
        if let Some(file) = variable("REGISTRY_AUTH_FILE") {
            return Self {
                files: vec![file],
                must_exist: false,
            };
        }
        let home = variable("HOME");
        let below_home = |rest: &str| home.as_ref().map(|home| home.join(rest));
        let runtime = variable("XDG_RUNTIME_DIR").unwrap_or_else(|| {
            PathBuf::from(format!(
                "/run/containers/{}",
                rustix::process::getuid().as_raw()
            ))
        });
        let runtime = if runtime.starts_with("/run/containers") {
            runtime.join("auth.json")
        } else {
            runtime.join("containers/auth.json")
        };
        let config = variable("XDG_CONFIG_HOME").or_else(|| below_home(".config"));
        let files = [
            Some(runtime),
            config.map(|config| config.join("containers/auth.json")),
            variable("DOCKER_CONFIG").map(|folder| folder.join("config.json")),
            below_home(".docker/config.json"),
        ];
        Self {
            files: files.into_iter().flatten().collect(),
            must_exist: false,
        }
    }

    /// As [`Keychain::new`] by the environment of this process.
    pub fn from_environment(file: Option<&Path>) -> Self {
        Self::new(file, |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        })
    }

    /// Credentials for `repository` on `host`, from the first place that has them.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or understood, a helper that fails.
    pub fn find(&self, host: &str, repository: &str) -> Result<Option<Credentials>> {
        for (number, path) in self.files.iter().enumerate() {
            let Some(text) = read(path, self.must_exist && number == 0)? else {
                continue;
            };
            let file: File = serde_json::from_slice(&text).map_err(|error| {
                // The message of serde_json quotes values: they may be secrets.
                Error::invalid(
                    path.display(),
                    format!("not a file of credentials (line {})", error.line()),
                )
            })?;
            if let Some(found) = file.find(path, host, repository)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The file that [`Keychain::save`] and [`Keychain::remove`] change.
    pub fn file(&self) -> Option<&Path> {
        self.files.first().map(PathBuf::as_path)
    }

    /// Saves `user` and `password` for `host`; other entries stay.
    ///
    /// # Errors
    ///
    /// The system's, and a file that cannot be understood.
    pub fn save(&self, host: &str, user: &str, password: &str) -> Result<&Path> {
        let auth = BASE64_STANDARD.encode(format!("{user}:{password}"));
        self.change(|auths| {
            auths.insert(key(host).to_owned(), json!({ "auth": auth }));
            true
        })
    }

    /// Removes what was saved for `host`; false where there was nothing.
    ///
    /// # Errors
    ///
    /// As [`Keychain::save`].
    pub fn remove(&self, host: &str) -> Result<bool> {
        let mut removed = false;
        self.change(|auths| {
            removed = auths.remove(key(host)).is_some();
            removed
        })?;
        Ok(removed)
    }

    fn change(
        &self,
        change: impl FnOnce(&mut serde_json::Map<String, Value>) -> bool,
    ) -> Result<&Path> {
        let path = self.file().ok_or_else(|| {
            Error::new(
                Kind::Refused,
                "credentials",
                "no place for them: set HOME or name a file by --creds-file",
            )
        })?;
        // Two at a time would lose what one of them saves. What others do, who take no lock, cannot be helped.
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        let folder = folder.unwrap_or(Path::new("."));
        let _lock = fs::create_dir_all(folder)
            .and_then(|()| fs::File::open(folder))
            .and_then(|folder| lock_exclusive(&folder).map(|()| folder))
            .map_err(|error| Error::io(folder, "lock", error))?;
        let mut whole = match read(path, false)? {
            Some(text) => serde_json::from_slice::<Value>(&text).ok(),
            None => Some(json!({})),
        };
        let auths = whole
            .as_mut()
            .and_then(Value::as_object_mut)
            .map(|whole| whole.entry("auths").or_insert_with(|| json!({})))
            .and_then(Value::as_object_mut)
            .ok_or_else(|| Error::invalid(path.display(), "not a file of credentials"))?;
        if change(auths) {
            let text = serde_json::to_vec_pretty(&whole).unwrap_or_default();
            replace(path, &text).map_err(|error| Error::io(path, "write", error))?;
        }
        Ok(path)
    }
}

/// The content of a file of credentials, None if it may be missing and is.
fn read(path: &Path, must_exist: bool) -> Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text)) {
        Ok(_) if text.iter().all(u8::is_ascii_whitespace) => Ok(None),
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => Ok(None),
        Err(error) => Err(Error::io(path, "read", error)),
    }
}

/// Puts `text` in the place of a file, or of the one that it is a link to, readable for its owner alone.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".auth-")
        .permissions(fs::Permissions::from_mode(0o600))
        .make_in(folder, |path| {
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
        })?;
    file.write_all(text)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Key of a host in `auths`.
fn key(host: &str) -> &str {
    if host == "docker.io" {
        HUB_KEY
    } else {
        host
    }
}

impl File {
    fn find(&self, path: &Path, host: &str, repository: &str) -> Result<Option<Credentials>> {
        let here = |login| {
            Ok(Some(Credentials {
                login,
                from: path.display().to_string(),
            }))
        };
        let hub = host == "docker.io";
        let names: &[&str] = if hub {
            &[HUB_KEY, "index.docker.io"]
        } else {
            &[]
        };
        for name in [host].iter().chain(names) {
            if let Some(helper) = self.helpers.get(*name).and_then(Value::as_str) {
                if let Some(found) = ask_helper(helper, name)? {
                    return Ok(Some(found));
                }
            }
        }
        // The most specific one first.
        let mut wanted = format!("{host}/{repository}");
        loop {
            if let Some(login) = self.auths.get(&wanted).and_then(login) {
                return here(login);
            }
            match wanted.rfind('/') {
                Some(end) => wanted.truncate(end),
                None => break,
            }
        }
        let same_host = |key: &str| {
            let rest = key
                .strip_prefix("https://")
                .or_else(|| key.strip_prefix("http://"));
            let of = rest.and_then(|rest| rest.split('/').next());
            of == Some(host) || (hub && (of == Some("index.docker.io") || key == "index.docker.io"))
        };
        let legacy = self
            .auths
            .iter()
            .filter(|(key, _)| same_host(key))
            .find_map(|(_, value)| login(value));
        if let Some(login) = legacy {
            return here(login);
        }
        if self.store.is_empty() {
            return Ok(None);
        }
        ask_helper(&self.store, key(host))
    }
}

/// The login of an entry, None if it is empty.
fn login(entry: &Value) -> Option<Login> {
    let text = |name: &str| {
        entry
            .get(name)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    };
    if let Some(token) = text("identitytoken") {
        return Some(Login::Identity {
            token: token.to_owned(),
        });
    }
    let (user, password) = match text("auth") {
        Some(auth) => {
            let decoded = String::from_utf8(BASE64_STANDARD.decode(auth.trim()).ok()?).ok()?;
            let (user, password) = decoded.split_once(':')?;
            (user.to_owned(), password.trim_end_matches('\0').to_owned())
        }
        None => (text("username")?.to_owned(), text("password")?.to_owned()),
    };
    Some(basic(user, password))
}

fn basic(user: String, password: String) -> Login {
    if user == "<token>" {
        Login::Identity { token: password }
    } else {
        Login::Basic { user, password }
    }
}

/// What `docker-credential-NAME get` knows of `host`.
fn ask_helper(name: &str, host: &str) -> Result<Option<Credentials>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let program = format!("docker-credential-{name}");
    if name.is_empty()
        || !name
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || b"-._".contains(&c))
    {
        return Err(Error::invalid(
            "credentials",
            "the name of a helper is not letters, digits, '-', '.' and '_'",
        ));
    }
    let fail = |what: String| Error::new(Kind::System, &program, what);
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| fail(format!("cannot start: {}", crate::error::message(&error))))?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that does not read shows by its answer what it thinks of the question.
        input.write_all(host.as_bytes()).ok();
    }
    let (send, receive) = mpsc::channel();
    if let Some(output) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            output.take(MAX_BYTES).read_to_end(&mut text).ok();
            send.send(text).ok();
        });
    }
    let end = Instant::now() + HELPER_LIMIT;
    let text = receive.recv_timeout(HELPER_LIMIT);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if text.is_ok() && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5))
            }
            _ => {
                child.kill().ok();
                child.wait().ok();
                break None;
            }
        }
    };
    let (Ok(text), Some(status)) = (text, status) else {
        return Err(fail(format!(
            "no answer within {} s",
            HELPER_LIMIT.as_secs()
        )));
    };
    if !status.success() {
        let unknown = String::from_utf8_lossy(&text)
            .to_lowercase()
            .contains("not found");
        return if unknown {
            Ok(None)
        } else {
            Err(fail(format!("failed for {host}")))
        };
    }
    let answer: Answer = serde_json::from_slice(&text)
        .map_err(|_| fail("its answer cannot be understood".to_owned()))?;
    Ok(Some(Credentials {
        login: basic(answer.username, answer.secret),
        from: program,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keychain(folder: &tempfile::TempDir, text: &str) -> Keychain {
        let path = folder.path().join("auth.json");
        fs::write(&path, text).unwrap();
        Keychain::new(Some(&path), |_| None)
    }

    fn find(keychain: &Keychain, host: &str, repository: &str) -> String {
        match keychain
            .find(host, repository)
            .unwrap()
            .map(|found| found.login)
        {
            None => "none".to_owned(),
            Some(Login::Basic { user, password }) => format!("{user}:{password}"),
            Some(Login::Identity { token }) => format!("token {token}"),
        }
    }

    #[test]
    fn every_form_of_key_and_entry() {
        let folder = tempfile::tempdir().unwrap();
        let auth = |text: &str| BASE64_STANDARD.encode(text);
        let keychain = keychain(
            &folder,
            &json!({ "auths": {
                "a.x/ns/repo": { "auth": auth("deep:1") },
                "a.x/ns": { "auth": auth("ns:2") },
                "a.x": { "auth": auth("host:3:4") },
                "https://b.x/v1/": { "username": "u", "password": "p" },
                "c.x": { "identitytoken": "t", "auth": auth("u:p") },
                "d.x": { "auth": auth("<token>:secret") },
                "e.x": {},
                "https://index.docker.io/v1/": { "auth": auth("hub:5") },
                "f.x:5000": { "auth": auth("port:6") },
            }})
            .to_string(),
        );
        for (host, repository, right) in [
            ("a.x", "ns/repo", "deep:1"),
            ("a.x", "ns/repo2", "ns:2"),
            ("a.x", "other", "host:3:4"),
            ("b.x", "r", "u:p"),
            ("c.x", "r", "token t"),
            ("d.x", "r", "token secret"),
            ("e.x", "r", "none"),
            ("docker.io", "library/r", "hub:5"),
            ("f.x:5000", "r", "port:6"),
            ("f.x", "r", "none"),
        ] {
            assert_eq!(
                find(&keychain, host, repository),
                right,
                "{host}/{repository}"
            );
        }
    }

    #[test]
    fn order_of_files() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, user: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(
                &path,
                json!({"auths": {"h.x": {"username": user, "password": "p"}}}).to_string(),
            )
            .unwrap();
        };
        let keychain = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            Keychain::new(None, |name| {
                names
                    .iter()
                    .any(|known| known == name)
                    .then(|| folder.path().join(name))
            })
        };
        write("REGISTRY_AUTH_FILE", "a");
        write("XDG_RUNTIME_DIR/containers/auth.json", "b");
        write("HOME/.config/containers/auth.json", "c");
        write("DOCKER_CONFIG/config.json", "d");
        write("HOME/.docker/config.json", "e");
        let all = [
            "REGISTRY_AUTH_FILE",
            "XDG_RUNTIME_DIR",
            "HOME",
            "DOCKER_CONFIG",
        ];
        assert_eq!(find(&keychain(&all), "h.x", "r"), "a:p");
        assert_eq!(find(&keychain(&all[1..]), "h.x", "r"), "b:p");
        fs::remove_dir_all(folder.path().join("XDG_RUNTIME_DIR")).unwrap();
        assert_eq!(find(&keychain(&all[1..]), "h.x", "r"), "c:p");
        fs::remove_dir_all(folder.path().join("HOME/.config")).unwrap();
        assert_eq!(find(&keychain(&all[1..]), "h.x", "r"), "d:p");
        assert_eq!(find(&keychain(&all[2..3]), "h.x", "r"), "e:p");
    }

    #[test]
    fn saved_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let keychain = keychain(&folder, r#"{"auths":{"b.x":{"auth":"eDp5"}},"other":1}"#);
        let path = keychain.save("a.x", "me", "secret").unwrap();
        assert_eq!(
            fs::metadata(path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(find(&keychain, "a.x", "r"), "me:secret");
        assert_eq!(find(&keychain, "b.x", "r"), "x:y");
        assert!(fs::read_to_string(path).unwrap().contains("\"other\": 1"));
        assert!(keychain.remove("a.x").unwrap());
        assert!(!keychain.remove("a.x").unwrap());
        assert_eq!(find(&keychain, "a.x", "r"), "none");
    }

    #[test]
    fn errors_do_not_show_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let broken = keychain(&folder, r#"{"auths":"my secret"}"#);
        let error = broken.find("h.x", "r").unwrap_err().to_string();
        assert!(
            error.contains("auth.json") && !error.contains("secret"),
            "{error}"
        );
        let missing = Keychain::new(Some(&folder.path().join("no")), |_| None);
        assert!(missing.find("h.x", "r").is_err());
        let bad = keychain(&folder, r#"{"credHelpers":{"h.x":"../../bin/sh"}}"#);
        assert!(bad.find("h.x", "r").is_err());
        let login = Login::Basic {
            user: "u".to_owned(),
            password: "secret".to_owned(),
        };
        assert!(!format!("{login:?}").contains("secret"));
    }
}
