// SPDX-License-Identifier: GPL-2.0

//! One HTTP request and its answer: connections, TLS, proxies, redirects, time limits. Knows nothing of registries.

use std::{
    collections::HashMap,
    io::{self, Read},
    path::PathBuf,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex, PoisonError,
    },
    time::Duration,
};

use ureq::{
    http::{HeaderMap, Method, Request, StatusCode},
    Agent, Body, Proxy, SendBody,
};

use crate::{
    blob::BlobSource,
    credentials::Keychain,
    error::{message, shown, Error, Kind, Result},
    limiter::Limiter,
    retry::{retry_after, Failure, Retries},
    tls,
    url::{is_loopback, Url},
};

/// Longest time to make a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Most redirects of one request.
const MAX_REDIRECTS: usize = 5;
/// Most bytes of an answer that tells what is wrong.
const MAX_ERROR_BYTES: u64 = 64 << 10;
/// Bytes that are sent or received at once.
const BUFFER_BYTES: usize = 128 << 10;

/// What the standard library says of a name without an address.
const NO_NAME: &str = "failed to lookup address information";

/// How to talk to registries.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where credentials are.
    pub keychain: Arc<Keychain>,
    /// More certificates to trust.
    pub ca: Option<PathBuf>,
    /// Do without encryption also where the host is not this machine.
    pub plain_http: bool,
    /// How often to try.
    pub retries: Retries,
    /// A connection on which nothing happens for this long is broken.
    pub stall: Duration,
    /// Bytes of a part of an upload, for registries that keep the parts that they have.
    pub part_bytes: u64,
    /// The rate of all transfers together.
    pub limiter: Arc<Limiter>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            keychain: Arc::default(),
            ca: None,
            plain_http: false,
            retries: Retries::default(),
            stall: Duration::from_secs(60),
            part_bytes: 64 << 20,
            limiter: Arc::default(),
        }
    }
}

/// What is sent with a request.
pub enum Content<'a> {
    /// Nothing.
    None,
    /// A document or form.
    Bytes(&'a [u8]),
    /// A range of a blob; the function hears how far the request has come.
    Range(&'a dyn BlobSource, u64, u64, &'a (dyn Fn(u64) + Sync)),
}

/// A request.
pub struct Call<'a> {
    pub method: Method,
    pub url: Url,
    pub headers: Vec<(&'static str, String)>,
    /// Goes only where `url` itself leads.
    pub authorization: Option<String>,
    pub content: Content<'a>,
    /// How long the answer may take.
    pub patience: Duration,
}

/// The answer to a request.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Body,
    /// What answered, after all redirects.
    pub url: Url,
    /// Whether that is where the request was sent to.
    pub same_origin: bool,
}

impl Answer {
    /// A header, if there is one of this name and it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body, which must not be longer than `limit`.
    pub fn read(&mut self, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        self.body
            .as_reader()
            .take(limit + 1)
            .read_to_end(&mut bytes)?;
        Ok((bytes.len() as u64 <= limit).then_some(bytes))
    }
}

/// Makes connections and keeps them.
#[derive(Debug)]
pub struct Http {
    options: Options,
    agents: Mutex<HashMap<String, Agent>>,
    /// Whether anything has answered yet: until then a refused connection is a wrong name.
    answered: AtomicBool,
    /// Set to end all transfers.
    pub stop: AtomicBool,
}

impl Http {
    pub fn new(options: Options) -> Self {
        Self {
            options,
            agents: Mutex::default(),
            answered: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        }
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Whether there was an answer to any request yet.
    pub fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Closes all idle connections.
    pub fn forget(&self) {
        self.agents
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn agent(&self, url: &Url) -> Result<Agent> {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("{} {}", url.is_https(), url.authority());
        if let Some(agent) = agents.get(&name) {
            return Ok(agent.clone());
        }
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(proxy(url)?)
            .user_agent(concat!("ovbd/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("")
            .max_idle_connections_per_host(16)
            .input_buffer_size(BUFFER_BYTES)
            .output_buffer_size(BUFFER_BYTES)
            .timeout_connect(Some(CONNECT))
            .timeout_per_write(Some(self.options.stall));
        if url.is_https() {
            config = config.tls_config(tls::config(url.authority(), self.options.ca.as_deref())?);
        }
        let agent = config.build().new_agent();
        agents.insert(name, agent.clone());
        Ok(agent)
    }

    /// Sends a request and follows redirects.
    pub fn run(&self, call: &Call<'_>) -> std::result::Result<Answer, Failure> {
        let mut url = call.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let same_origin = url.same_origin(&call.url);
            let answer = self.send(call, &url, same_origin)?;
            // A body that was sent is not sent to somebody else.
            let follows = match answer.status.as_u16() {
                301..=303 => matches!(call.method, Method::GET | Method::HEAD),
                307 | 308 => matches!(call.content, Content::None),
                _ => false,
            };
            if !follows {
                return Ok(answer);
            }
            let fail = |what: &str| Failure::Final(self.error(call, Kind::Invalid, what));
            let location = answer
                .header("location")
                .ok_or_else(|| fail("a redirect that leads nowhere"))?;
            let next = url
                .join(location)
                .ok_or_else(|| fail("a redirect that cannot be understood"))?;
            if url.is_https() && !next.is_https() {
                return Err(fail("a redirect from https to http is not followed"));
            }
            tracing::debug!(from = %url, to = %next, "redirected");
            url = next;
        }
        Err(Failure::Final(self.error(
            call,
            Kind::Invalid,
            "too many redirects",
        )))
    }

    fn send(
        &self,
        call: &Call<'_>,
        url: &Url,
        same_origin: bool,
    ) -> std::result::Result<Answer, Failure> {
        let mut builder = Request::builder()
            .method(call.method.clone())
            .uri(url.whole());
        for (name, value) in &call.headers {
            builder = builder.header(*name, value);
        }
        if let (Some(authorization), true) = (&call.authorization, same_origin) {
            builder = builder.header("Authorization", authorization);
        }
        let wrong = |_| {
            Failure::Final(self.error(call, Kind::Invalid, "the request cannot be written as HTTP"))
        };
        let agent = self.agent(url)?;
        let result = match &call.content {
            Content::None => {
                let has_body = matches!(call.method, Method::POST | Method::PUT | Method::PATCH);
                if has_body {
                    builder = builder.header("Content-Length", "0");
                }
                let request = builder.body(SendBody::none()).map_err(wrong)?;
                self.run_agent(&agent, request, call.patience)
            }
            Content::Bytes(bytes) => {
                let mut reader = *bytes;
                builder = builder.header("Content-Length", bytes.len().to_string());
                let request = builder
                    .body(SendBody::from_reader(&mut reader))
                    .map_err(wrong)?;
                self.run_agent(&agent, request, call.patience)
            }
            Content::Range(source, from, to, sent) => {
                let mut reader = Paced {
                    inner: source.reader(*from, *to),
                    limiter: &self.options.limiter,
                    stop: &self.stop,
                    at: *from,
                    moved: *sent,
                };
                builder = builder
                    .header("Content-Length", (to - from).to_string())
                    .header("Content-Type", "application/octet-stream")
                    .header("Expect", "100-continue");
                let request = builder
                    .body(SendBody::from_reader(&mut reader))
                    .map_err(wrong)?;
                self.run_agent(&agent, request, call.patience)
            }
        };
        let response = result.map_err(|error| self.failure(call, &error))?;
        self.answered.store(true, Ordering::Relaxed);
        let (parts, body) = response.into_parts();
        tracing::debug!(method = %call.method, %url, status = parts.status.as_u16(), "answered");
        Ok(Answer {
            status: parts.status,
            headers: parts.headers,
            body,
            url: url.clone(),
            same_origin,
        })
    }

    fn run_agent(
        &self,
        agent: &Agent,
        request: Request<SendBody<'_>>,
        patience: Duration,
    ) -> std::result::Result<ureq::http::Response<Body>, ureq::Error> {
        let request = agent
            .configure_request(request)
            .timeout_per_read(Some(self.options.stall.max(patience)))
            .timeout_recv_response(Some(patience))
            .build();
        agent.run(request)
    }

    /// An error about a request.
    pub fn error(&self, call: &Call<'_>, kind: Kind, what: &str) -> Error {
        Error::new(kind, call.url.authority(), what).during(call.method.as_str(), call.url.path())
    }

    /// What a connection that failed means.
    fn failure(&self, call: &Call<'_>, error: &ureq::Error) -> Failure {
        let stall = self.options.stall.as_secs();
        let first = !self.has_answered();
        let (what, again) = match error {
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => (
                format!("no connection within {} s", CONNECT.as_secs()),
                true,
            ),
            ureq::Error::Timeout(ureq::Timeout::RecvResponse) => (
                format!("no answer within {} s", call.patience.as_secs()),
                true,
            ),
            ureq::Error::Timeout(_) => {
                (format!("nothing was sent or received for {stall} s"), true)
            }
            ureq::Error::HostNotFound => ("no such host".to_owned(), !first),
            ureq::Error::ConnectionFailed => ("cannot connect".to_owned(), !first),
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                ("connection refused".to_owned(), !first)
            }
            // The standard library has no kind for it, nor has it one for a server of names that does not answer.
            ureq::Error::Io(error) if message(error).starts_with(NO_NAME) => {
                (message(error).replacen(NO_NAME, "no such host", 1), !first)
            }
            ureq::Error::Io(error) if is_tls(error) => (shown(&message(error)), false),
            ureq::Error::Io(error) => (format!("connection broken: {}", message(error)), true),
            ureq::Error::Rustls(error) => (format!("TLS: {error}"), false),
            ureq::Error::Tls(what) => (format!("TLS: {what}"), false),
            ureq::Error::ConnectProxyFailed(what) => {
                (format!("the proxy refused: {}", shown(what)), false)
            }
            other => (
                format!("not an answer by HTTP: {}", shown(&other.to_string())),
                true,
            ),
        };
        let kind = if again {
            Kind::Temporary
        } else {
            Kind::Refused
        };
        let error = self.error(call, kind, &what);
        if again {
            Failure::Again(error, None)
        } else {
            Failure::Final(error)
        }
    }

    /// What an answer means that is not the one that was wanted.
    pub fn refusal(&self, call: &Call<'_>, answer: &mut Answer) -> Failure {
        let status = answer.status.as_u16();
        let body = answer
            .read(MAX_ERROR_BYTES)
            .ok()
            .flatten()
            .unwrap_or_default();
        let text = first_error(&body).unwrap_or_else(|| {
            answer
                .status
                .canonical_reason()
                .unwrap_or("an unknown status")
                .to_owned()
        });
        let again = matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
            || (status == 403 && !answer.same_origin);
        let kind = match status {
            401 | 403 => Kind::Denied,
            404 => Kind::Missing,
            _ if again => Kind::Temporary,
            _ => Kind::Refused,
        };
        let error = self.error(call, kind, &text).with_status(status);
        if again {
            Failure::Again(error, answer.header("retry-after").and_then(retry_after))
        } else {
            Failure::Final(error)
        }
    }
}

/// rustls reports what is wrong with a certificate or with the peer as an error of the connection.
fn is_tls(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(|inner| inner.is::<rustls::Error>())
}

/// Code and message of the first error in a registry's answer.
fn first_error(body: &[u8]) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    let error = answer.get("errors")?.get(0)?;
    let part = |name: &str| {
        error
            .get(name)
            .and_then(serde_json::Value::as_str)
            .filter(|text| !text.is_empty())
    };
    let (code, message) = (part("code"), part("message"));
    match (code, message) {
        (Some(code), Some(message)) => Some(shown(&format!("{message} ({code})"))),
        (one, other) => Some(shown(one.or(other)?)),
    }
}

/// The proxy of the environment for a URL.
fn proxy(url: &Url) -> Result<Option<Proxy>> {
    let variable = |name: &str| {
        [name.to_owned(), name.to_uppercase()]
            .iter()
            .find_map(|name| std::env::var(name).ok())
            .filter(|value| !value.is_empty())
    };
    if is_loopback(url.authority())
        || variable("no_proxy").is_some_and(|list| spared(&list, url.host()))
    {
        return Ok(None);
    }
    let name = if url.is_https() {
        "https_proxy"
    } else {
        "http_proxy"
    };
    let Some(text) = variable(name).or_else(|| variable("all_proxy")) else {
        return Ok(None);
    };
    // The address may hold a password: it is not shown.
    let proxy = Proxy::new(&text)
        .map_err(|_| Error::invalid(name, "the address of the proxy cannot be understood"))?;
    Ok(Some(proxy))
}

/// Whether `host` or a domain that it is in stands in a list of hosts that need no proxy.
fn spared(list: &str, host: &str) -> bool {
    list.split([',', ' '])
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .any(|entry| {
            let entry = entry
                .trim_start_matches("*.")
                .trim_start_matches('.')
                .to_ascii_lowercase();
            let host = host.to_ascii_lowercase();
            entry == "*"
                || host == entry
                || host
                    .strip_suffix(&entry)
                    .is_some_and(|rest| rest.ends_with('.'))
        })
}

/// Reads no faster than allowed, and tells how far it is.
struct Paced<'a, R> {
    inner: R,
    limiter: &'a Limiter,
    stop: &'a AtomicBool,
    at: u64,
    moved: &'a (dyn Fn(u64) + Sync),
}

impl<R: Read> Read for Paced<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("given up, as another transfer failed"));
        }
        let count = self.inner.read(buffer)?;
        self.limiter.pass(count);
        self.at += count as u64;
        (self.moved)(self.at);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_without_proxy() {
        for (list, host, right) in [
            ("a.x,b.x", "b.x", true),
            (".example", "reg.example", true),
            ("example", "reg.EXAMPLE", true),
            ("*.example", "a.b.example", true),
            ("example", "notexample", false),
            ("*", "anything", true),
            ("", "x", false),
            (" , ", "x", false),
        ] {
            assert_eq!(spared(list, host), right, "{list} {host}");
        }
    }

    #[test]
    fn errors_of_registries() {
        let text = br#"{"errors":[{"code":"DENIED","message":"no\u001b[31m"},{"code":"X"}]}"#;
        assert_eq!(first_error(text).unwrap(), "no\\u{1b}[31m (DENIED)");
        assert_eq!(
            first_error(br#"{"errors":[{"code":"DENIED"}]}"#).unwrap(),
            "DENIED"
        );
        assert_eq!(first_error(b"<html>"), None);
        assert_eq!(first_error(br#"{"errors":[]}"#), None);
    }
}
