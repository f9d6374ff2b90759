// SPDX-License-Identifier: GPL-2.0

//! Fetching blobs: into a store, from the byte on that is missing, hashed on the way.

use std::{io::Read, sync::atomic::Ordering};

use ureq::http::Method;

use crate::{
    chunk_list::ChunkList,
    digest::Digest,
    document::{Descriptor, MAX_DOCUMENT_BYTES},
    error::{message, Error, Kind, Result},
    http::Answer,
    image::digest_of,
    ingest::{Ingest, Ingested},
    progress::{Event, Progress},
    registry::Registry,
    retry::{check, Failure},
    store::Store,
    url::Url,
};

/// Bytes after which it counts as progress, so that a broken connection may be tried as often as at the start.
const PROGRESS_BYTES: u64 = 64 << 10;

/// What a header `Content-Range` says: first byte, last byte, and the size of the whole if it is known.
fn content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, size) = value
        .trim()
        .strip_prefix("bytes")?
        .trim_start()
        .split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let size = match size.trim() {
        "*" => None,
        size => Some(size.parse().ok()?),
    };
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first <= last).then_some((first, last, size))
}

impl Registry {
    /// Fetches a blob into `store`, unless it is there.
    ///
    /// # Errors
    ///
    /// Bytes that are not those of the descriptor, everything that keeps them from coming, the system's. What came so
    /// far stays for the next time if it may be right.
    pub fn fetch_blob(
        &self,
        blob: &Descriptor,
        store: &Store,
        progress: &dyn Progress,
    ) -> Result<()> {
        match store.ingest(blob, || progress.event(&blob.digest, Event::Elsewhere))? {
            Ingested::Present => progress.event(&blob.digest, Event::Present),
            Ingested::Part(mut part) => {
                progress.event(&blob.digest, Event::Started { size: blob.size });
                progress.event(&blob.digest, Event::At(part.have()));
                self.fill(&mut part, progress)?;
                part.commit()?;
                progress.event(&blob.digest, Event::Done);
            }
        }
        Ok(())
    }

    /// Fetches what is missing of a blob, so that it can be committed.
    ///
    /// # Errors
    ///
    /// As [`Registry::fetch_blob`].
    pub fn fill(&self, part: &mut Ingest, progress: &dyn Progress) -> Result<()> {
        let digest = part.blob().digest.clone();
        let mut wrong_once = false;
        loop {
            let mut backoff = self.backoff();
            while part.have() < part.blob().size {
                let before = part.have();
                let result = self.fetch_rest(part, progress);
                if part.have() >= before + PROGRESS_BYTES {
                    backoff.progress();
                }
                if let Err(failure) = result {
                    backoff.wait(failure, |time, why| {
                        progress.event(&digest, Event::Waiting { time, why })
                    })?;
                }
            }
            let found = part.digest();
            if found == digest {
                return Ok(());
            }
            // Another connection may go by way of another cache.
            part.restart()?;
            self.http.forget();
            if wrong_once {
                let url = self
                    .url(&format!("blobs/{digest}"))
                    .map_err(Failure::into_error)?;
                let what = format!(
                    "the {} bytes sent as {digest} have the digest {found}",
                    part.blob().size
                );
                return Err(self.error(Kind::Invalid, &what, &Method::GET, &url));
            }
            wrong_once = true;
            progress.event(&digest, Event::At(0));
        }
    }

    /// One request for the rest of a blob.
    fn fetch_rest(
        &self,
        part: &mut Ingest,
        progress: &dyn Progress,
    ) -> std::result::Result<(), Failure> {
        let (digest, size) = (part.blob().digest.clone(), part.blob().size);
        let url = self.url(&format!("blobs/{digest}"))?;
        let mut ask = self.simple(Method::GET, url.clone());
        if part.have() > 0 {
            ask.headers
                .push(("Range", format!("bytes={}-", part.have())));
        }
        let mut answer = self.ask(ask)?;
        let fail = |kind, what: String| self.error(kind, &what, &Method::GET, &url);
        match answer.status.as_u16() {
            206 if part.have() > 0 => {
                let range = answer.header("content-range").and_then(content_range);
                let fits = range.is_some_and(|(first, last, whole)| {
                    first == part.have() && last < size && whole.unwrap_or(size) == size
                });
                if !fits {
                    let what = format!(
                        "asked for byte {} of {size} of {digest} on, got another range",
                        part.have()
                    );
                    return Err(fail(Kind::Invalid, what).into());
                }
            }
            200 => {
                part.restart()?;
            }
            416 if part.have() > 0 => {
                part.restart()?;
                return Err(Failure::Again(
                    fail(Kind::Temporary, "no rest of the blob there".to_owned()),
                    None,
                ));
            }
            _ => return Err(self.refusal(&Method::GET, &url, &mut answer)),
        }
        let told = answer
            .header("content-length")
            .and_then(|told| told.parse::<u64>().ok());
        if answer.status == 200 && told.is_some_and(|told| told != size) {
            let what = format!(
                "{digest} has {} bytes, and the manifest says {size}",
                told.unwrap_or_default()
            );
            return Err(fail(Kind::Invalid, what).into());
        }
        let mut reader = answer.body.into_reader();
        loop {
            check(&self.http.stop)?;
            let count = match reader.read(part.space()?) {
                Ok(0) if part.have() == size => return Ok(()),
                Ok(0) => {
                    let what = format!(
                        "the connection ended at byte {} of {size} of {digest}",
                        part.have()
                    );
                    return Err(Failure::Again(fail(Kind::Temporary, what), None));
                }
                Ok(count) => count,
                Err(error) => {
                    let what = format!(
                        "{} at byte {} of {size} of {digest}",
                        broken(&error),
                        part.have()
                    );
                    return Err(Failure::Again(fail(Kind::Temporary, what), None));
                }
            };
            self.options().limiter.pass(count);
            if part.have() + count as u64 > size {
                // What came is not this blob, whatever its start looks like.
                part.restart()?;
                let what = format!("more than the {size} bytes of {digest} that the manifest says");
                return Err(fail(Kind::Invalid, what).into());
            }
            part.advance(count)?;
            progress.event(&digest, Event::At(part.have()));
        }
    }

    /// The bytes of a small blob, such as a configuration.
    ///
    /// # Errors
    ///
    /// As [`Registry::fetch_blob`], and a blob of more than 4 MiB.
    pub fn small_blob(&self, blob: &Descriptor) -> Result<Vec<u8>> {
        if blob.size > MAX_DOCUMENT_BYTES {
            return Err(Error::invalid(
                self.reference(),
                "a configuration of more than 4 MiB",
            ));
        }
        self.blob_in_memory(blob)
    }

    /// The list of the chunks of `blob` that has the digest `digest`; nothing where the registry does not have it, or it
    /// would be larger than is read.
    ///
    /// # Errors
    ///
    /// As [`Registry::fetch_blob`], and a list that is none or of another blob.
    pub fn chunk_list(&self, blob: &Descriptor, digest: &Digest) -> Result<Option<ChunkList>> {
        let Some(list) = ChunkList::descriptor(blob, digest.clone()) else {
            return Ok(None);
        };
        match self.blob_in_memory(&list) {
            Ok(bytes) => ChunkList::parse(bytes, blob).map(Some),
            Err(error) if error.kind() == Kind::Missing => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn blob_in_memory(&self, blob: &Descriptor) -> Result<Vec<u8>> {
        self.backoff().run(
            |_, _| (),
            || {
                let (url, mut answer) = self.get(&blob.digest, None)?;
                let bytes = self.read(&url, &mut answer, blob.size)?;
                if bytes.len() as u64 != blob.size || digest_of(&bytes, &blob.digest) != blob.digest
                {
                    let what =
                        format!("what was sent as {} does not have this digest", blob.digest);
                    return Err(self.error(Kind::Invalid, &what, &Method::GET, &url).into());
                }
                Ok(bytes)
            },
        )
    }

    /// The first `count` bytes of a blob, or all of a smaller one. They are not verified.
    ///
    /// # Errors
    ///
    /// Everything that keeps them from coming.
    pub fn first_bytes(&self, blob: &Descriptor, count: u64) -> Result<Vec<u8>> {
        let count = count.min(blob.size);
        self.range(blob, 0, count)
    }

    /// `count` bytes of a blob from byte `from` on. They are not verified.
    ///
    /// # Errors
    ///
    /// Everything that keeps them from coming; a registry that cannot send a part.
    pub fn range(&self, blob: &Descriptor, from: u64, count: u64) -> Result<Vec<u8>> {
        let to = from
            .checked_add(count)
            .filter(|to| *to <= blob.size && count > 0);
        let to =
            to.ok_or_else(|| Error::invalid(&blob.digest, "a range beyond the end of the blob"))?;
        self.backoff().run(
            |_, _| (),
            || {
                let (url, answer) = self.get(&blob.digest, Some((from, to - 1)))?;
                // Who sends all of it is not listened to for longer than needed.
                let mut bytes = Vec::new();
                let whole = answer.status == 200;
                if whole && from > 0 {
                    return Err(self
                        .error(
                            Kind::Refused,
                            "the registry does not send parts of blobs",
                            &Method::GET,
                            &url,
                        )
                        .into());
                }
                answer
                    .body
                    .into_reader()
                    .take(count)
                    .read_to_end(&mut bytes)
                    .map_err(|error| {
                        Failure::Again(
                            self.error(Kind::Temporary, &broken(&error), &Method::GET, &url),
                            None,
                        )
                    })?;
                self.options().limiter.pass(bytes.len());
                if (bytes.len() as u64) < count {
                    return Err(Failure::Again(
                        self.error(Kind::Temporary, "the connection ended", &Method::GET, &url),
                        None,
                    ));
                }
                Ok(bytes)
            },
        )
    }

    fn get(
        &self,
        digest: &Digest,
        range: Option<(u64, u64)>,
    ) -> std::result::Result<(Url, Answer), Failure> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let mut ask = self.simple(Method::GET, url.clone());
        if let Some((first, last)) = range {
            ask.headers.push(("Range", format!("bytes={first}-{last}")));
        }
        let mut answer = self.ask(ask)?;
        let right = match (answer.status.as_u16(), range) {
            (200, _) => true,
            (206, Some((first, _))) => answer
                .header("content-range")
                .and_then(content_range)
                .is_some_and(|found| found.0 == first),
            _ => return Err(self.refusal(&Method::GET, &url, &mut answer)),
        };
        if !right {
            return Err(self
                .error(
                    Kind::Invalid,
                    "another range than was asked for",
                    &Method::GET,
                    &url,
                )
                .into());
        }
        Ok((url, answer))
    }

    fn read(
        &self,
        url: &Url,
        answer: &mut Answer,
        limit: u64,
    ) -> std::result::Result<Vec<u8>, Failure> {
        let fail = |kind, what: &str| self.error(kind, what, &Method::GET, url);
        match answer.read(limit) {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(fail(Kind::Invalid, "more bytes than the manifest says").into()),
            Err(error) => Err(Failure::Again(fail(Kind::Temporary, &broken(&error)), None)),
        }
    }

    /// Whether one of several transfers failed, so that the others are to end.
    pub fn is_stopped(&self) -> bool {
        self.http.stop.load(Ordering::Relaxed)
    }
}

fn broken(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => "nothing came".to_owned(),
        _ => format!("connection broken ({})", message(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, 9, None)));
        for bad in [
            "bytes */10",
            "bytes 9-5/10",
            "5-9/10",
            "bytes 5-9",
            "bytes -5-9/10",
            "bytes 5-99999999999999999999/*",
            "",
        ] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
