// SPDX-License-Identifier: GPL-2.0

//! A registry in memory, on one thread, that keeps every byte of an upload that was cut, as version 3 of the usual one does.
//! Its script may answer a request in its place, or cut it.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use ovbd_oci::Digest;

use super::Made;

/// A request, without its body.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Without the query.
    pub path: String,
    pub query: String,
    pub headers: HashMap<String, String>,
    pub length: usize,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn is(&self, method: &str, part: &str) -> bool {
        self.method == method && self.path.contains(part)
    }
}

/// What the script does with a request.
pub enum Act {
    /// What a registry does.
    Usual,
    /// This answer, after the body was read.
    Reply(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// The body is read and kept up to this byte, then the connection ends.
    CutRequest(usize),
    /// The answer ends after this many bytes of its body.
    CutAnswer(usize),
    /// The usual answer with other headers and bytes.
    Change(fn(&mut Vec<(String, String)>, &mut Vec<u8>)),
    /// Nothing is answered for a time.
    Stall(Duration),
}

/// An answer without anything special.
pub fn reply(status: u16) -> Act {
    Act::Reply(status, Vec::new(), Vec::new())
}

type Script = Box<dyn FnMut(&Request) -> Act + Send>;

#[derive(Default)]
pub struct State {
    pub blobs: HashMap<String, Vec<u8>>,
    pub manifests: HashMap<String, (String, Vec<u8>)>,
    pub uploads: HashMap<usize, Vec<u8>>,
    pub log: Vec<Request>,
    /// Bytes of bodies that came in, and of blobs that went out.
    pub received: usize,
    pub sent: usize,
    script: Option<Script>,
    ended: bool,
}

/// A running registry; it ends when it is dropped.
pub struct Scripted {
    pub host: String,
    pub state: Arc<Mutex<State>>,
}

impl Scripted {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state: Arc<Mutex<State>> = Arc::default();
        let inside = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if inside.lock().unwrap().ended {
                    return;
                }
                stream
                    .set_read_timeout(Some(Duration::from_secs(10)))
                    .unwrap();
                serve(&stream, &inside);
            }
        });
        Self { host, state }
    }

    /// What happens from now on.
    pub fn script(&self, script: impl FnMut(&Request) -> Act + Send + 'static) {
        self.state.lock().unwrap().script = Some(Box::new(script));
    }

    pub fn usual(&self) {
        self.state.lock().unwrap().script = None;
    }

    /// Puts an image under `repository:tag` without a request.
    pub fn hold(&self, repository: &str, tag: &str, made: &Made) {
        let mut state = self.state.lock().unwrap();
        for (layer, bytes) in made.manifest.layers.iter().zip(&made.layers) {
            state.blobs.insert(layer.digest.to_string(), bytes.clone());
        }
        state
            .blobs
            .insert(made.manifest.config.digest.to_string(), made.config.clone());
        let document = (
            made.manifest.media_type.clone().unwrap(),
            made.bytes.clone(),
        );
        state
            .manifests
            .insert(format!("{repository}/{}", made.digest()), document.clone());
        state
            .manifests
            .insert(format!("{repository}/{tag}"), document);
    }

    pub fn hold_bytes(&self, repository: &str, target: &str, media_type: &str, bytes: &[u8]) {
        let document = (media_type.to_owned(), bytes.to_vec());
        let mut state = self.state.lock().unwrap();
        state.manifests.insert(
            format!("{repository}/{}", Digest::of(bytes)),
            document.clone(),
        );
        state
            .manifests
            .insert(format!("{repository}/{target}"), document);
    }

    /// How many requests there were of this kind.
    pub fn count(&self, method: &str, part: &str) -> usize {
        self.state
            .lock()
            .unwrap()
            .log
            .iter()
            .filter(|request| request.is(method, part))
            .count()
    }

    pub fn forget(&self) {
        let mut state = self.state.lock().unwrap();
        state.log.clear();
        (state.received, state.sent) = (0, 0);
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.state.lock().unwrap().ended = true;
        TcpStream::connect(&self.host).ok();
    }
}

/// One request for each connection.
fn serve(stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    // What is no HTTP (TLS, say) ends here.
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned())
            }
            None => break,
        };
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let length = headers
        .get("content-length")
        .and_then(|length| length.parse().ok())
        .unwrap_or(0);
    let request = Request {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        headers,
        length,
    };
    let mut state = state.lock().unwrap();
    state.log.push(request.clone());
    let mut script = state.script.take();
    let act = script
        .as_mut()
        .map_or(Act::Usual, |script| script(&request));
    if state.script.is_none() {
        state.script = script;
    }
    let mut stream = stream;
    let refuses = matches!(act, Act::Reply(status, ..) if status >= 400);
    if !refuses && request.header("expect") == "100-continue" {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let take = match act {
        Act::CutRequest(bytes) => bytes.min(length),
        Act::Reply(..) if refuses && request.header("expect") == "100-continue" => 0,
        _ => length,
    };
    let mut body = vec![0; take];
    reader.read_exact(&mut body).ok()?;
    state.received += take;
    match act {
        Act::CutRequest(_) => {
            if request.method == "PATCH" {
                add_to_upload(&mut state, &request, &body);
            }
            stream.shutdown(Shutdown::Both).ok()
        }
        Act::Stall(time) => {
            drop(state);
            std::thread::sleep(time);
            stream.shutdown(Shutdown::Both).ok()
        }
        Act::Reply(status, headers, body) => {
            let headers = headers
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect();
            answer(stream, &request, status, headers, &body, None)
        }
        _ => {
            let (status, mut headers, mut bytes) = usual(&mut state, &request, body);
            if let Act::Change(change) = act {
                change(&mut headers, &mut bytes);
            }
            let end = if let Act::CutAnswer(end) = act {
                Some(end)
            } else {
                None
            };
            if request.method == "GET" && request.path.contains("/blobs/sha256") {
                state.sent += end.unwrap_or(bytes.len()).min(bytes.len());
            }
            drop(state);
            answer(stream, &request, status, headers, &bytes, end)
        }
    }
}

fn answer(
    mut stream: &TcpStream,
    request: &Request,
    status: u16,
    headers: Vec<(String, String)>,
    body: &[u8],
    end: Option<usize>,
) -> Option<()> {
    let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n");
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        && status != 204
    {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(b"\r\n").ok()?;
    if request.method != "HEAD" {
        stream
            .write_all(&body[..end.unwrap_or(body.len()).min(body.len())])
            .ok()?;
    }
    stream.shutdown(Shutdown::Write).ok()?;
    // Until the other side is done too: an early end could take the answer with it.
    stream
        .set_read_timeout(Some(Duration::from_millis(200)))
        .ok()?;
    let mut rest = [0; 4096];
    while stream.read(&mut rest).is_ok_and(|count| count > 0) {}
    Some(())
}

fn upload_id(request: &Request) -> Option<usize> {
    request.path.rsplit('/').next()?.parse().ok()
}

/// Adds a body to an upload; where it starts must be where the upload is.
fn add_to_upload(state: &mut State, request: &Request, body: &[u8]) -> Option<usize> {
    let start = request
        .header("content-range")
        .split('-')
        .next()
        .and_then(|start| start.parse::<usize>().ok());
    let upload = state.uploads.get_mut(&upload_id(request)?)?;
    if start.is_some_and(|start| start != upload.len()) {
        return None;
    }
    upload.extend_from_slice(body);
    Some(upload.len())
}

type Answer = (u16, Vec<(String, String)>, Vec<u8>);

fn usual(state: &mut State, request: &Request, body: Vec<u8>) -> Answer {
    let header = |name: &str, value: String| (name.to_owned(), value);
    let error = |status: u16, code: &str| {
        let text = format!(r#"{{"errors":[{{"code":"{code}","message":"as scripted"}}]}}"#);
        (
            status,
            vec![header("Content-Type", "application/json".to_owned())],
            text.into_bytes(),
        )
    };
    let query = |name: &str| {
        let pairs = request
            .query
            .split('&')
            .filter_map(|pair| pair.split_once('='));
        pairs
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value.replace("%3A", ":"))
            .next()
    };
    let path = request.path.trim_start_matches("/v2/");
    if let Some((repository, target)) = path.split_once("/manifests/") {
        let name = format!("{repository}/{target}");
        if request.method == "PUT" {
            let digest = Digest::of(&body).to_string();
            let document = (request.header("content-type").to_owned(), body);
            state
                .manifests
                .insert(format!("{repository}/{digest}"), document.clone());
            state.manifests.insert(name, document);
            return (
                201,
                vec![header("Docker-Content-Digest", digest)],
                Vec::new(),
            );
        }
        return match state.manifests.get(&name) {
            Some((media_type, bytes)) => (
                200,
                vec![header("Content-Type", media_type.clone())],
                bytes.clone(),
            ),
            None => error(404, "MANIFEST_UNKNOWN"),
        };
    }
    if let Some((repository, rest)) = path.split_once("/blobs/uploads/") {
        let location = |id: usize| format!("/v2/{repository}/blobs/uploads/{id}");
        let range = |have: usize| header("Range", format!("0-{}", have.saturating_sub(1)));
        if rest.is_empty() {
            if let Some(digest) = query("mount").filter(|digest| state.blobs.contains_key(digest)) {
                return (
                    201,
                    vec![header("Docker-Content-Digest", digest)],
                    Vec::new(),
                );
            }
            let id = state.uploads.keys().max().map_or(1, |last| last + 1);
            state.uploads.insert(id, Vec::new());
            return (
                202,
                vec![header("Location", location(id)), range(0)],
                Vec::new(),
            );
        }
        let Some(id) = upload_id(request).filter(|id| state.uploads.contains_key(id)) else {
            return error(404, "BLOB_UPLOAD_UNKNOWN");
        };
        return match request.method.as_str() {
            "GET" => (
                204,
                vec![
                    header("Location", location(id)),
                    range(state.uploads[&id].len()),
                ],
                Vec::new(),
            ),
            "PATCH" => match add_to_upload(state, request, &body) {
                Some(have) => (
                    202,
                    vec![header("Location", location(id)), range(have)],
                    Vec::new(),
                ),
                None => error(416, "RANGE_INVALID"),
            },
            "PUT" => {
                let mut bytes = state.uploads.remove(&id).unwrap();
                bytes.extend_from_slice(&body);
                let digest = Digest::of(&bytes).to_string();
                if query("digest").as_ref() != Some(&digest) {
                    return error(400, "DIGEST_INVALID");
                }
                state.blobs.insert(digest, bytes);
                (201, Vec::new(), Vec::new())
            }
            _ => error(405, "UNSUPPORTED"),
        };
    }
    if let Some((_, digest)) = path.split_once("/blobs/") {
        let Some(bytes) = state.blobs.get(digest) else {
            return error(404, "BLOB_UNKNOWN");
        };
        let Some(range) = request.header("range").strip_prefix("bytes=") else {
            return (200, Vec::new(), bytes.clone());
        };
        let (first, last) = range.split_once('-').unwrap();
        let first: usize = first.parse().unwrap();
        let last = last.parse().unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
        if first > last {
            return (
                416,
                vec![header("Content-Range", format!("bytes */{}", bytes.len()))],
                Vec::new(),
            );
        }
        let content = header(
            "Content-Range",
            format!("bytes {first}-{last}/{}", bytes.len()),
        );
        return (206, vec![content], bytes[first..=last].to_vec());
    }
    (200, Vec::new(), b"{}".to_vec())
}
