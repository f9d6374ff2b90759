// SPDX-License-Identifier: GPL-2.0

//! Sending blobs: asked for first, taken from another repository where that is possible, else sent whole or in parts, and
//! gone on with after a break from the byte that the registry has.

use std::{sync::atomic::Ordering, time::Duration};

use ureq::http::Method;

use crate::{
    blob::BlobSource,
    document::Descriptor,
    error::{Error, Kind, Result},
    http::{Answer, Content},
    note::Note,
    progress::{Event, Progress},
    registry::{Ask, Registry},
    retry::Failure,
    store::Store,
    url::Url,
};

/// Uploads of one blob that are begun anew because the registry has lost them.
const MAX_SESSIONS: u32 = 3;
/// Bytes a second that a registry hashes at least when it closes an upload.
const CLOSING_RATE: u64 = 20 << 20;
/// A rest smaller than this is not worth a request of its own.
const PROGRESS_BYTES: u64 = 64 << 10;

/// An upload that the registry has begun.
struct Session {
    location: Url,
    /// Bytes that the registry has.
    have: u64,
    part_bytes: u64,
}

/// Why an upload stopped.
enum Stopped {
    Failed(Failure),
    /// The registry does not know this upload any more.
    Lost(Error),
    /// The registry does not take parts.
    NoParts,
}

impl<E: Into<Failure>> From<E> for Stopped {
    fn from(failure: E) -> Self {
        Self::Failed(failure.into())
    }
}

impl Registry {
    /// Sends a blob, unless the registry has it. `from` names repositories of the same registry that may have it. Where the
    /// upload got to is remembered in `notes`; who sends the same blob at the same time by the same notes waits for it.
    ///
    /// # Errors
    ///
    /// Everything that keeps it from being taken.
    pub fn send_blob(
        &self,
        blob: &Descriptor,
        source: &dyn BlobSource,
        from: &[String],
        notes: Option<&Store>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let digest = &blob.digest;
        let waiting =
            |time: Duration, why: &str| progress.event(digest, Event::Waiting { time, why });
        if self.backoff().run(waiting, || self.try_has_blob(blob))? {
            progress.event(digest, Event::Present);
            return Ok(());
        }
        // Without a store that can be written to, nobody goes on with it.
        let elsewhere = || progress.event(digest, Event::Elsewhere);
        let note =
            notes.and_then(|store| Note::take(store, self.reference(), blob, elsewhere).ok());
        // Whoever had the note until now may have sent it.
        if note.is_some() && self.backoff().run(waiting, || self.try_has_blob(blob))? {
            note.into_iter().for_each(Note::remove);
            progress.event(digest, Event::Present);
            return Ok(());
        }
        let left = note.as_ref().and_then(Note::location);
        let mut session = match left {
            Some(left) => self.backoff().run(waiting, || self.ask_session(&left))?,
            None => None,
        };
        for from in from
            .iter()
            .filter(|from| *from != self.reference().repository())
        {
            if session.is_some() {
                break;
            }
            match self.backoff().run(waiting, || self.mount(blob, from))? {
                None => {
                    progress.event(digest, Event::Mounted { from });
                    return Ok(());
                }
                begun => session = begun,
            }
        }
        progress.event(digest, Event::Started { size: blob.size });
        self.send(blob, source, session, note.as_ref(), progress)?;
        note.into_iter().for_each(Note::remove);
        progress.event(digest, Event::Done);
        Ok(())
    }

    fn send(
        &self,
        blob: &Descriptor,
        source: &dyn BlobSource,
        mut session: Option<Session>,
        note: Option<&Note>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let digest = &blob.digest;
        let mut sessions = 0;
        let mut backoff = self.backoff();
        let mut best = 0;
        loop {
            let whole = blob.size <= self.options().part_bytes
                || self.whole_blobs_only.load(Ordering::Relaxed);
            let stopped = match self.try_send(blob, source, &mut session, whole, note, progress) {
                Ok(()) => return Ok(()),
                Err(stopped) => stopped,
            };
            let have = session.as_ref().map_or(0, |session| session.have);
            if have >= best + PROGRESS_BYTES {
                best = have;
                backoff.progress();
            }
            match stopped {
                Stopped::NoParts => {
                    tracing::debug!(%digest, "the registry takes no parts");
                    self.whole_blobs_only.store(true, Ordering::Relaxed);
                    session = None;
                }
                Stopped::Lost(error) => {
                    sessions += 1;
                    if sessions > MAX_SESSIONS {
                        return Err(error);
                    }
                    session = None;
                }
                Stopped::Failed(failure) => {
                    backoff.wait(failure, |time, why| {
                        progress.event(digest, Event::Waiting { time, why })
                    })?;
                    // The answer that was lost may have been the one that all is well.
                    if self.backoff().run(|_, _| (), || self.try_has_blob(blob))? {
                        return Ok(());
                    }
                    if let Some(begun) = session.take() {
                        session = match self
                            .backoff()
                            .run(|_, _| (), || self.ask_session(&begun.location))?
                        {
                            Some(found) => Some(Session {
                                part_bytes: begun.part_bytes,
                                ..found
                            }),
                            None => {
                                sessions += 1;
                                None
                            }
                        };
                    }
                }
            }
            progress.event(
                digest,
                Event::At(session.as_ref().map_or(0, |session| session.have)),
            );
        }
    }

    /// Sends what is missing, and closes the upload.
    fn try_send(
        &self,
        blob: &Descriptor,
        source: &dyn BlobSource,
        session: &mut Option<Session>,
        whole: bool,
        note: Option<&Note>,
        progress: &dyn Progress,
    ) -> std::result::Result<(), Stopped> {
        if session
            .as_ref()
            .is_some_and(|session| session.have > blob.size)
        {
            *session = None;
        }
        if session.is_none() {
            *session = Some(self.begin(&[])?);
        }
        let Some(begun) = session else {
            return Ok(());
        };
        let moved = |at: u64| progress.event(&blob.digest, Event::At(at));
        let patience = self.options().stall + Duration::from_secs(blob.size / CLOSING_RATE);
        if whole && begun.have == 0 {
            // Whoever is interrupted here has nothing to go on with.
            let begun = session.take();
            let Some(begun) = begun else {
                return Ok(());
            };
            let url = begun.location.with("digest", &blob.digest.to_string());
            let content = Content::Range(source, 0, blob.size, &moved);
            return self.close(blob, url, content, patience);
        }
        while begun.have < blob.size {
            let end = begun.have.saturating_add(begun.part_bytes).min(blob.size);
            if let Some(note) = note {
                note.write(&begun.location);
            }
            let ask = Ask {
                method: Method::PATCH,
                url: begun.location.clone(),
                headers: vec![("Content-Range", format!("{}-{}", begun.have, end - 1))],
                content: Content::Range(source, begun.have, end, &moved),
                from: None,
                patience,
            };
            let mut answer = self.ask(ask)?;
            match answer.status.as_u16() {
                202 | 204 => {
                    let have = uploaded(&answer).unwrap_or(end);
                    if have <= begun.have || have > end {
                        let what = "the registry did not take a part of the blob";
                        return Err(self
                            .error(Kind::Refused, what, &Method::PATCH, &begun.location)
                            .into());
                    }
                    begun.location = self.next(&begun.location, &answer)?;
                    begun.have = have;
                }
                // Some say so when they have all of it.
                201 if end == blob.size => {
                    if self.try_has_blob(blob)? {
                        return Ok(());
                    }
                    begun.have = end;
                }
                404 | 405 | 411 | 413 | 416 | 501 if begun.have == 0 => {
                    return Err(Stopped::NoParts)
                }
                404 | 410 | 416 => {
                    let url = begun.location.clone();
                    let error = self.refusal(&Method::PATCH, &url, &mut answer).into_error();
                    // Another offset than we think is no loss.
                    return Err(match self.ask_session(&url)? {
                        Some(found) if found.have > begun.have => {
                            (begun.location, begun.have) = (found.location, found.have);
                            Stopped::Failed(Failure::Again(error, Some(Duration::ZERO)))
                        }
                        _ => Stopped::Lost(error),
                    });
                }
                _ => {
                    return Err(self
                        .refusal(&Method::PATCH, &begun.location.clone(), &mut answer)
                        .into())
                }
            }
        }
        let url = begun.location.with("digest", &blob.digest.to_string());
        self.close(blob, url, Content::None, patience)
    }

    /// Ends an upload, with the last bytes or without.
    fn close(
        &self,
        blob: &Descriptor,
        url: Url,
        content: Content<'_>,
        patience: Duration,
    ) -> std::result::Result<(), Stopped> {
        let ask = Ask {
            method: Method::PUT,
            url: url.clone(),
            headers: Vec::new(),
            content,
            from: None,
            patience,
        };
        let mut answer = self.ask(ask)?;
        match answer.status.as_u16() {
            200 | 201 | 204 => Ok(()),
            // Taken, and not there yet.
            202 if self.try_has_blob(blob)? => Ok(()),
            404 | 410 | 416 => Err(Stopped::Lost(
                self.refusal(&Method::PUT, &url, &mut answer).into_error(),
            )),
            _ => Err(self.refusal(&Method::PUT, &url, &mut answer).into()),
        }
    }

    /// Begins an upload.
    fn begin(&self, query: &[(&str, &str)]) -> std::result::Result<Session, Failure> {
        let mut url = self.url("blobs/uploads/")?;
        for (name, value) in query {
            url = url.with(name, value);
        }
        let from = query
            .iter()
            .find(|(name, _)| *name == "from")
            .map(|(_, value)| *value);
        let mut ask = self.simple(Method::POST, url.clone());
        ask.from = from;
        let mut answer = self.ask(ask)?;
        match answer.status.as_u16() {
            202 => self.session(&url, &answer, 0),
            _ => Err(self.refusal(&Method::POST, &url, &mut answer)),
        }
    }

    fn session(
        &self,
        asked: &Url,
        answer: &Answer,
        have: u64,
    ) -> std::result::Result<Session, Failure> {
        let least = answer
            .header("oci-chunk-min-length")
            .and_then(|least| least.parse().ok())
            .unwrap_or(0);
        Ok(Session {
            location: self.next(asked, answer)?,
            have,
            part_bytes: self.options().part_bytes.max(least),
        })
    }

    /// Where the next request of an upload goes.
    fn next(&self, asked: &Url, answer: &Answer) -> std::result::Result<Url, Failure> {
        let fail =
            |what: &str| Failure::Final(self.error(Kind::Invalid, what, &Method::POST, asked));
        let location = answer
            .header("location")
            .ok_or_else(|| fail("an upload without a location"))?;
        let next = answer
            .url
            .join(location)
            .ok_or_else(|| fail("an upload with a location that is none"))?;
        if asked.is_https() && !next.is_https() {
            return Err(fail("an upload that would leave https for http"));
        }
        Ok(next)
    }

    /// Asks for the blob from another repository: None if it is there now, else an upload that is begun.
    fn mount(
        &self,
        blob: &Descriptor,
        from: &str,
    ) -> std::result::Result<Option<Session>, Failure> {
        let digest = blob.digest.to_string();
        let mut url = self.url("blobs/uploads/")?;
        url = url.with("mount", &digest).with("from", from);
        let mut ask = self.simple(Method::POST, url.clone());
        ask.from = Some(from);
        let answer = self.ask(ask);
        match answer {
            Ok(answer) if answer.status == 201 => Ok(None),
            Ok(answer) if answer.status == 202 => self.session(&url, &answer, 0).map(Some),
            Ok(mut answer) => match self.refusal(&Method::POST, &url, &mut answer) {
                Failure::Again(error, after) => Err(Failure::Again(error, after)),
                Failure::Final(_) => self.begin(&[]).map(Some),
            },
            // Who may not read the other repository may still send.
            Err(Failure::Final(error)) if error.kind() == Kind::Denied => self.begin(&[]).map(Some),
            Err(failure) => Err(failure),
        }
    }

    /// How far an upload has come; None if the registry does not know it any more.
    fn ask_session(&self, location: &Url) -> std::result::Result<Option<Session>, Failure> {
        let mut answer = self.ask(self.simple(Method::GET, location.clone()))?;
        match answer.status.as_u16() {
            // Without an answer to how much it has, nothing can be added.
            204 | 202 | 200 => match uploaded(&answer) {
                Some(have) => {
                    let location = if answer.header("location").is_some() {
                        self.next(location, &answer)?
                    } else {
                        location.clone()
                    };
                    Ok(Some(Session {
                        location,
                        have,
                        part_bytes: self.options().part_bytes,
                    }))
                }
                None => Ok(None),
            },
            400..=499 if !matches!(answer.status.as_u16(), 408 | 429) => Ok(None),
            _ => Err(self.refusal(&Method::GET, location, &mut answer)),
        }
    }
}

/// Bytes that a registry has of an upload, by the header `Range`, whose end is the last byte. `0-0` is what most say when
/// they have none.
fn uploaded(answer: &Answer) -> Option<u64> {
    let range = answer.header("range")?;
    let range = range.trim();
    let (first, last) = range
        .strip_prefix("bytes=")
        .unwrap_or(range)
        .split_once('-')?;
    match (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?) {
        (0, 0) => Some(0),
        (0, last) => last.checked_add(1),
        _ => None,
    }
}
