// SPDX-License-Identifier: GPL-2.0

//! Artifacts that refer to an image: lists of its chunks, traces of what is read of it first.

use ureq::http::Method;

use crate::{
    document::{Descriptor, Document, MediaType, MAX_DOCUMENT_BYTES},
    error::{message, Error, Kind, Result},
    index::{Index, MAX_ENTRIES},
    manifest::Manifest,
    progress::NoProgress,
    registry::Registry,
    retry::Failure,
};

/// Media type of a configuration that says nothing, and its bytes.
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const EMPTY: &[u8] = b"{}";

/// The tag of the list of what refers to `subject`, in registries that do not keep such lists themselves.
fn list_tag(subject: &Descriptor) -> String {
    let digest = &subject.digest;
    format!("{}-{}", digest.algorithm().name(), digest.hex())
}

impl Registry {
    /// Lists `manifest`, which is in the registry and has a subject, under that subject's tag, as is done for
    /// registries that do not keep such lists themselves.
    ///
    /// # Errors
    ///
    /// As [`Registry::document`] and [`Registry::put_document`].
    pub fn list_referrer(&self, manifest: &Manifest, descriptor: &Descriptor) -> Result<()> {
        let Some(subject) = &manifest.subject else {
            return Ok(());
        };
        let tag = list_tag(subject);
        let mut index = match self.document(&tag)? {
            None => Index::new(Vec::new()),
            Some((bytes, found)) => {
                let media_type =
                    MediaType::from_name(&found.media_type).unwrap_or(MediaType::OciIndex);
                match Document::parse(&bytes, media_type, self.reference())? {
                    Document::Index(index) => *index,
                    Document::Manifest(_) => {
                        let what = format!(
                            "the tag {tag} is not an index: the list of referrers is left as it is"
                        );
                        return Err(Error::new(Kind::Refused, self.reference(), what));
                    }
                }
            }
        };
        if index
            .manifests
            .iter()
            .any(|entry| entry.digest == descriptor.digest)
        {
            return Ok(());
        }
        if index.manifests.len() >= MAX_ENTRIES {
            let what = format!(
                "the list of referrers {tag} has {MAX_ENTRIES} entries, and no room for another"
            );
            return Err(Error::new(Kind::Refused, self.reference(), what));
        }
        let mut entry = descriptor.clone();
        entry.artifact_type = manifest.artifact_type.clone();
        entry.annotations = manifest.annotations.clone();
        index.manifests.0.push(entry);
        self.put_document(
            &tag,
            MediaType::OciIndex.name(),
            &crate::document::to_json(&index),
        )?;
        Ok(())
    }

    /// Sends an artifact of `parts`, which are in the registry, that refers to the image `subject`.
    ///
    /// # Errors
    ///
    /// As [`Registry::put_document`] and [`Registry::list_referrer`].
    pub fn attach(
        &self,
        artifact_type: &str,
        subject: &Descriptor,
        parts: Vec<Descriptor>,
    ) -> Result<Descriptor> {
        let config = Descriptor::of(EMPTY_TYPE, EMPTY);
        self.send_blob(&config, &EMPTY.to_vec(), &[], None, &NoProgress)?;
        let mut manifest = Manifest::new(MediaType::OciManifest, config, parts);
        manifest.artifact_type = Some(artifact_type.to_owned());
        let mut subject = subject.clone();
        subject.annotations.clear();
        manifest.subject = Some(subject);
        let bytes = manifest.to_bytes();
        let descriptor = Descriptor::of(MediaType::OciManifest.name(), &bytes);
        let target = descriptor.digest.to_string();
        self.put_document(&target, &descriptor.media_type, &bytes)?;
        if !self.knows_subjects() {
            self.list_referrer(&manifest, &descriptor)?;
        }
        Ok(descriptor)
    }

    /// The artifacts of this type that refer to `subject`, in the order in which the registry has them.
    ///
    /// # Errors
    ///
    /// What keeps them from coming. That the registry has no such lists is none.
    pub fn referrers(&self, subject: &Descriptor, artifact_type: &str) -> Result<Vec<Manifest>> {
        let index = match self.list_of_referrers(subject)? {
            Some(index) => index,
            None => match self.document(&list_tag(subject))? {
                None => return Ok(Vec::new()),
                Some((bytes, found)) => self.index(&bytes, &found.media_type)?,
            },
        };
        let mut found = Vec::new();
        for entry in index.manifests.iter() {
            if entry.artifact_type.as_deref() != Some(artifact_type) {
                continue;
            }
            // It may have been removed since.
            let Some((bytes, descriptor)) = self.document(&entry.digest.to_string())? else {
                continue;
            };
            let known = MediaType::from_name(&descriptor.media_type);
            let media_type = known.unwrap_or(MediaType::OciManifest);
            match Document::parse(&bytes, media_type, self.reference())? {
                // The list may say what it likes.
                Document::Manifest(manifest)
                    if manifest.artifact_type.as_deref() == Some(artifact_type)
                        && (manifest.subject.as_ref())
                            .is_some_and(|found| found.digest == subject.digest) =>
                {
                    found.push(*manifest);
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// What the registry itself says refers to `subject`; nothing where it does not keep such lists.
    fn list_of_referrers(&self, subject: &Descriptor) -> Result<Option<Index>> {
        self.backoff().run(
            |_, _| (),
            || {
                let url = self.url(&format!("referrers/{}", subject.digest))?;
                let mut answer = self.ask(self.simple(Method::GET, url.clone()))?;
                let fail = |kind, what: &str| self.error(kind, what, &Method::GET, &url);
                match answer.status.as_u16() {
                    200 => {}
                    404 | 405 => return Ok(None),
                    _ => return Err(self.refusal(&Method::GET, &url, &mut answer)),
                }
                // Some answer every address by a page.
                let media_type = answer.header("content-type").map(str::to_owned);
                if media_type.as_deref().and_then(MediaType::from_name) != Some(MediaType::OciIndex)
                {
                    return Ok(None);
                }
                let bytes = answer
                    .read(MAX_DOCUMENT_BYTES)
                    .map_err(|error| Failure::Again(fail(Kind::Temporary, &message(&error)), None))?
                    .ok_or_else(|| fail(Kind::Invalid, "the list is larger than 4 MiB"))?;
                Ok(Some(self.index(&bytes, MediaType::OciIndex.name())?))
            },
        )
    }

    fn index(&self, bytes: &[u8], media_type: &str) -> Result<Index> {
        let known = MediaType::from_name(media_type).unwrap_or(MediaType::OciIndex);
        match Document::parse(bytes, known, self.reference())? {
            Document::Index(index) => Ok(*index),
            Document::Manifest(_) => Err(Error::invalid(
                self.reference(),
                "the list of referrers is no list",
            )),
        }
    }
}
