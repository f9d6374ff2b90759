// SPDX-License-Identifier: GPL-2.0

//! One repository of a registry: its manifests, and whether it has a blob. Sending blobs is in `upload.rs`, fetching them in
//! `download.rs`.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, OnceLock,
    },
    time::Duration,
};

use ureq::http::Method;

use crate::{
    auth::{basic, denied, Auth},
    credentials::Login,
    digest::Digest,
    document::{Descriptor, Document, MediaType, Platform, MAX_DOCUMENT_BYTES},
    error::{message, Error, Kind, Result},
    http::{Answer, Call, Content, Http, Options},
    image::{digest_of, Image},
    reference::Reference,
    retry::{Backoff, Failure},
    url::{is_loopback, Url},
};

/// Depth of indexes in indexes.
const MAX_DEPTH: usize = 2;

/// A repository and how to reach it. Several threads may use it at once.
#[derive(Debug)]
pub struct Registry {
    pub(crate) http: Arc<Http>,
    auth: Auth,
    reference: Reference,
    push: bool,
    base: OnceLock<Url>,
    /// The registry does not take blobs in parts.
    pub(crate) whole_blobs_only: AtomicBool,
    subject_is_known: AtomicBool,
}

/// A request to a registry, without what all of them have.
pub(crate) struct Ask<'a> {
    pub method: Method,
    pub url: Url,
    pub headers: Vec<(&'static str, String)>,
    pub content: Content<'a>,
    /// Another repository that is read from.
    pub from: Option<&'a str>,
    pub patience: Duration,
}

impl Registry {
    /// The repository of `reference`, to pull from it.
    pub fn to_pull(reference: &Reference, options: Options) -> Self {
        Self::new(reference, options, false)
    }

    /// The repository of `reference`, to push to it.
    pub fn to_push(reference: &Reference, options: Options) -> Self {
        Self::new(reference, options, true)
    }

    fn new(reference: &Reference, options: Options, push: bool) -> Self {
        Self {
            http: Arc::new(Http::new(options)),
            auth: Auth::default(),
            reference: reference.clone(),
            push,
            base: OnceLock::new(),
            whole_blobs_only: AtomicBool::new(false),
            subject_is_known: AtomicBool::new(false),
        }
    }

    /// What names the repository.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// How to talk to it.
    pub fn options(&self) -> &Options {
        self.http.options()
    }

    /// `host/repository`, the subject of errors.
    pub(crate) fn subject(&self) -> String {
        self.reference.name()
    }

    /// The URL of the registry. Without encryption only where that is allowed, and this machine is asked with it first.
    fn base(&self) -> std::result::Result<Url, Failure> {
        if let Some(base) = self.base.get() {
            return Ok(base.clone());
        }
        let host = self.reference.api_host();
        let url = |https| Url::new(https, host, "/v2/");
        let base = if self.options().plain_http {
            url(false)
        } else if is_loopback(host) {
            let call = Call {
                method: Method::GET,
                url: url(true),
                headers: Vec::new(),
                authorization: None,
                content: Content::None,
                patience: self.options().stall,
            };
            match self.http.run(&call) {
                Ok(_) => url(true),
                // It does speak TLS: whatever is wrong, the next request will show it.
                Err(_) if self.http.has_answered() => url(true),
                Err(failure) => {
                    let error = failure.into_error();
                    // What speaks TLS with a wrong certificate is not asked without it.
                    if error.what().contains("certificate") {
                        return Err(Failure::Final(error));
                    }
                    tracing::debug!(%error, "not by https");
                    url(false)
                }
            }
        } else {
            url(true)
        };
        Ok(self.base.get_or_init(|| base).clone())
    }

    /// The URL of something in the repository.
    pub(crate) fn url(&self, rest: &str) -> std::result::Result<Url, Failure> {
        let base = self.base()?;
        Ok(Url::new(
            base.is_https(),
            base.authority(),
            &format!("/v2/{}/{rest}", self.reference.repository()),
        ))
    }

    fn scope(&self, from: Option<&str>) -> String {
        let actions = if self.push { "pull,push" } else { "pull" };
        let mut scope = format!("repository:{}:{actions}", self.reference.repository());
        if let Some(from) = from {
            scope.push_str(&format!(" repository:{from}:pull"));
        }
        scope
    }

    /// Sends a request, with what the registry wants to know about who asks. An answer is given back whatever its
    /// status, unless it is 401 or 403.
    pub(crate) fn ask(&self, ask: Ask<'_>) -> std::result::Result<Answer, Failure> {
        let scope = self.scope(ask.from);
        // Only the registry itself hears who one is.
        let base = self.base()?;
        let known = ask.url.same_origin(&base);
        let find = || {
            self.options()
                .keychain
                .find(self.reference.host(), self.reference.repository())
        };
        let authorization = if known {
            self.auth.header(&self.http, &scope, find)?
        } else {
            None
        };
        let mut call = Call {
            method: ask.method,
            url: ask.url,
            headers: ask.headers,
            authorization,
            content: ask.content,
            patience: ask.patience,
        };
        let mut answer = self.http.run(&call)?;
        if answer.status == 401
            && known
            && answer.same_origin
            && self.auth.learn(
                &answer.headers,
                &call.url,
                &scope,
                call.authorization.as_deref(),
            )
        {
            call.authorization = self.auth.header(&self.http, &scope, find)?;
            if call.authorization.is_some() {
                answer = self.http.run(&call)?;
            }
        }
        if matches!(answer.status.as_u16(), 401 | 403) {
            return Err(match self.http.refusal(&call, &mut answer) {
                Failure::Final(error) => {
                    let action = if self.push { "push to" } else { "pull from" };
                    let subject = self.subject();
                    let error = denied(
                        error,
                        &subject,
                        &format!("{action} {subject}"),
                        &self.auth.who(),
                    );
                    Failure::Final(error.during(call.method.as_str(), call.url.path()))
                }
                again => again,
            });
        }
        Ok(answer)
    }

    /// What an answer means that is not the one that was wanted.
    pub(crate) fn refusal(&self, method: &Method, url: &Url, answer: &mut Answer) -> Failure {
        let call = Call {
            method: method.clone(),
            url: url.clone(),
            headers: Vec::new(),
            authorization: None,
            content: Content::None,
            patience: Duration::ZERO,
        };
        let name = |error: Error| {
            let status = error.status().unwrap_or_default();
            Error::new(error.kind(), self.subject(), error.what())
                .with_status(status)
                .during(method.as_str(), url.path())
        };
        match self.http.refusal(&call, answer) {
            Failure::Again(error, after) => Failure::Again(name(error), after),
            Failure::Final(error) => Failure::Final(name(error)),
        }
    }

    /// An error about a request.
    pub(crate) fn error(&self, kind: Kind, what: &str, method: &Method, url: &Url) -> Error {
        Error::new(kind, self.subject(), what).during(method.as_str(), url.path())
    }

    pub(crate) fn backoff(&self) -> Backoff<'_> {
        Backoff::new(self.options().retries, &self.http.stop)
    }

    pub(crate) fn simple<'a>(&self, method: Method, url: Url) -> Ask<'a> {
        Ask {
            method,
            url,
            headers: Vec::new(),
            content: Content::None,
            from: None,
            patience: self.options().stall,
        }
    }

    /// Checks that the registry knows `user` with `password`.
    ///
    /// # Errors
    ///
    /// It does not, or cannot be asked.
    pub fn check_login(&self, user: &str, password: &str) -> Result<()> {
        let credentials = crate::Credentials {
            login: Login::Basic {
                user: user.to_owned(),
                password: password.to_owned(),
            },
            from: "what was entered".to_owned(),
        };
        self.backoff().run(
            |_, _| (),
            || {
                let base = self.base()?;
                let mut call = Call {
                    method: Method::GET,
                    url: base.clone(),
                    headers: Vec::new(),
                    authorization: None,
                    content: Content::None,
                    patience: self.options().stall,
                };
                let mut answer = self.http.run(&call)?;
                if answer.status == 401 && self.auth.learn(&answer.headers, &base, "", None) {
                    let found = credentials.clone();
                    call.authorization = self.auth.header(&self.http, "", || Ok(Some(found)))?;
                    answer = self.http.run(&call)?;
                } else if answer.status.is_success() {
                    // Whoever wants no password still gets one, to be refused if it is wrong.
                    call.authorization = Some(basic(user, password));
                    answer = self.http.run(&call)?;
                }
                if answer.status.is_success() {
                    return Ok(());
                }
                Err(self.refusal(&call.method, &call.url, &mut answer))
            },
        )
    }

    /// The bytes and type of the manifest or index that `target`, a tag or digest, names; None if there is none.
    ///
    /// # Errors
    ///
    /// Bytes that are not what the digest says, or what the registry itself says they are; everything that keeps them
    /// from coming.
    pub fn document(&self, target: &str) -> Result<Option<(Vec<u8>, Descriptor)>> {
        let types: Vec<&str> = MediaType::ALL.iter().map(|known| known.name()).collect();
        self.backoff().run(
            |_, _| (),
            || {
                let url = self.url(&format!("manifests/{target}"))?;
                let mut ask = self.simple(Method::GET, url.clone());
                ask.headers.push(("Accept", types.join(", ")));
                let mut answer = self.ask(ask)?;
                let fail = |kind, what: &str| self.error(kind, what, &Method::GET, &url);
                if answer.status == 404 {
                    return Ok(None);
                }
                if answer.status != 200 {
                    return Err(self.refusal(&Method::GET, &url, &mut answer));
                }
                let bytes = answer
                    .read(MAX_DOCUMENT_BYTES)
                    .map_err(|error| Failure::Again(fail(Kind::Temporary, &message(&error)), None))?
                    .ok_or_else(|| fail(Kind::Invalid, "the manifest is larger than 4 MiB"))?;
                let known = answer.header("content-type").and_then(MediaType::from_name);
                let media_type =
                    known
                        .or_else(|| Document::guess_type(&bytes))
                        .ok_or_else(|| {
                            fail(
                                Kind::Invalid,
                                "neither a manifest nor an index of OCI or Docker (schema 2)",
                            )
                        })?;
                let wanted: Option<Digest> = target.parse().ok();
                let told: Option<Digest> = answer
                    .header("docker-content-digest")
                    .and_then(|told| told.parse().ok());
                for digest in [&wanted, &told].into_iter().flatten() {
                    if digest_of(&bytes, digest) != *digest {
                        return Err(fail(
                            Kind::Invalid,
                            &format!("the manifest does not have the digest {digest}"),
                        )
                        .into());
                    }
                }
                let digest = wanted.unwrap_or_else(|| Digest::of(&bytes));
                let descriptor = Descriptor::new(media_type.name(), digest, bytes.len() as u64);
                Ok(Some((bytes, descriptor)))
            },
        )
    }

    /// The image that the reference names, that of `platform` where there are several.
    ///
    /// # Errors
    ///
    /// There is none, or what there is cannot be one.
    pub fn image(&self, platform: &Platform) -> Result<Image> {
        let mut target = self.reference.target();
        for _ in 0..=MAX_DEPTH {
            let (bytes, descriptor) = self.document(&target)?.ok_or_else(|| {
                Error::new(
                    Kind::Missing,
                    &self.reference,
                    "no such image in the registry",
                )
            })?;
            let media_type =
                MediaType::from_name(&descriptor.media_type).unwrap_or(MediaType::OciManifest);
            match Document::parse(&bytes, media_type, &self.reference)? {
                Document::Index(index) => {
                    target = index.select(platform, &self.reference)?.digest.to_string();
                }
                Document::Manifest(manifest) => {
                    let config = self.small_blob(&manifest.config)?;
                    return Image::new(&self.reference, descriptor, bytes, *manifest, config);
                }
            }
        }
        Err(Error::invalid(
            &self.reference,
            "an index in an index in an index",
        ))
    }

    /// Sends a manifest or index under `target`, a tag or digest.
    ///
    /// # Errors
    ///
    /// The registry does not take it.
    pub fn put_document(&self, target: &str, media_type: &str, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let mut first = true;
        self.backoff().run(
            |_, _| (),
            || {
                // It may have come through although the answer did not.
                if !first
                    && self
                        .document(target)
                        .ok()
                        .flatten()
                        .is_some_and(|(_, found)| found.digest == digest)
                {
                    return Ok(digest.clone());
                }
                first = false;
                let url = self.url(&format!("manifests/{target}"))?;
                let mut ask = self.simple(Method::PUT, url.clone());
                ask.headers.push(("Content-Type", media_type.to_owned()));
                ask.content = Content::Bytes(bytes);
                let mut answer = self.ask(ask)?;
                if answer.status != 201 && answer.status != 200 && answer.status != 202 {
                    return Err(self.refusal(&Method::PUT, &url, &mut answer));
                }
                let told: Option<Digest> = answer
                    .header("docker-content-digest")
                    .and_then(|told| told.parse().ok());
                if told
                    .as_ref()
                    .is_some_and(|told| digest_of(bytes, told) != *told)
                {
                    let what = "the registry stored something else than was sent";
                    return Err(self.error(Kind::Invalid, what, &Method::PUT, &url).into());
                }
                self.subject_is_known
                    .store(answer.header("oci-subject").is_some(), Ordering::Relaxed);
                Ok(digest.clone())
            },
        )
    }

    /// Whether the answer to the last manifest said that the registry keeps the list of referrers itself.
    pub fn knows_subjects(&self) -> bool {
        self.subject_is_known.load(Ordering::Relaxed)
    }

    /// Whether the registry has the blob.
    ///
    /// # Errors
    ///
    /// It has one of this digest and another size, or cannot be asked.
    pub fn has_blob(&self, blob: &Descriptor) -> Result<bool> {
        self.backoff().run(|_, _| (), || self.try_has_blob(blob))
    }

    /// Describes a blob of which only the digest is known.
    ///
    /// # Errors
    ///
    /// There is none, the registry does not say how large it is, or cannot be asked.
    pub fn find_blob(&self, digest: &Digest, media_type: &str) -> Result<Descriptor> {
        self.backoff().run(
            |_, _| (),
            || {
                let url = self.url(&format!("blobs/{digest}"))?;
                let mut answer = self.ask(self.simple(Method::HEAD, url.clone()))?;
                if answer.status != 200 {
                    return Err(self.refusal(&Method::HEAD, &url, &mut answer));
                }
                match content_length(&answer) {
                    Some(size) => Ok(Descriptor::new(media_type, digest.clone(), size)),
                    None => {
                        let what = format!("the registry does not say how large {digest} is");
                        Err(self.error(Kind::Invalid, &what, &Method::HEAD, &url).into())
                    }
                }
            },
        )
    }

    pub(crate) fn try_has_blob(&self, blob: &Descriptor) -> std::result::Result<bool, Failure> {
        let url = self.url(&format!("blobs/{}", blob.digest))?;
        let mut answer = self.ask(self.simple(Method::HEAD, url.clone()))?;
        match answer.status.as_u16() {
            200 => {}
            404 | 405 => return Ok(false),
            _ => return Err(self.refusal(&Method::HEAD, &url, &mut answer)),
        }
        let size = content_length(&answer);
        match size {
            Some(size) if size != blob.size => {
                let what = format!(
                    "the registry has {size} bytes as {}, which has {}",
                    blob.digest, blob.size
                );
                Err(self.error(Kind::Invalid, &what, &Method::HEAD, &url).into())
            }
            _ => Ok(true),
        }
    }
}

/// The size in an answer without a body.
fn content_length(answer: &Answer) -> Option<u64> {
    answer.header("content-length")?.parse().ok()
}
