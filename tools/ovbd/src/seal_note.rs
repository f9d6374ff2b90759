// SPDX-License-Identifier: GPL-2.0

//! What an image says of its seal, in annotations of its manifest, and when that is believed.

use std::path::PathBuf;

use anyhow::Result;
use base64::prelude::{Engine as _, BASE64_STANDARD};
use ovbd_devices::verity::{self, hex, Root, MAX_SIGNATURE};
use ovbd_oci::{
    annotations::{VERITY_OFFSET, VERITY_ROOT, VERITY_SIGNATURE},
    Error, Kind, Manifest, Reference,
};

use crate::{
    policy::{Policy, Rule, PATH},
    signing::is_signed_by,
};

/// Root hash, place and signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealNote {
    /// The root hash, and the bytes of the image.
    pub root: Root,
    /// PKCS#7 in DER.
    pub signature: Option<Vec<u8>>,
}

impl SealNote {
    /// Reads the annotations of the manifest of `image`.
    ///
    /// # Errors
    ///
    /// Annotations that are wrong.
    pub fn read(manifest: &Manifest, image: &str) -> Result<Option<Self>> {
        let annotation = |name: &str| manifest.annotations.get(name);
        let fail = |what: &str| Error::invalid(image, what);
        let (root, offset) = match (annotation(VERITY_ROOT), annotation(VERITY_OFFSET)) {
            (None, _) => return Ok(None),
            (Some(_), None) => {
                return Err(fail("a root hash without the bytes of the image").into())
            }
            (Some(root), Some(offset)) => (root, offset),
        };
        let root = format!("{root}:{offset}").parse().map_err(fail)?;
        let signature = match annotation(VERITY_SIGNATURE) {
            None => None,
            Some(text) => {
                let signature = BASE64_STANDARD.decode(text.as_bytes());
                let signature = signature
                    .ok()
                    .filter(|bytes| bytes.len() as u64 <= MAX_SIGNATURE);
                Some(signature.ok_or_else(|| fail("its signature is none"))?)
            }
        };
        Ok(Some(Self { root, signature }))
    }

    /// Writes the annotations, in place of others.
    pub fn write(&self, manifest: &mut Manifest) {
        for name in [VERITY_ROOT, VERITY_OFFSET, VERITY_SIGNATURE] {
            manifest.annotations.remove(name);
        }
        let mut note =
            |name: &str, value: String| manifest.annotations.insert(name.to_owned(), value);
        note(VERITY_ROOT, hex(&self.root.digest));
        if let Some(bytes) = self.root.data_bytes {
            note(VERITY_OFFSET, bytes.to_string());
        }
        if let Some(signature) = &self.signature {
            note(VERITY_SIGNATURE, BASE64_STANDARD.encode(signature));
        }
    }
}

/// What the policy demands of images of a repository.
///
/// # Errors
///
/// They are not to be taken; a policy that cannot be read.
pub fn rule(reference: &Reference) -> Result<Rule> {
    match Policy::read(PATH.as_ref())?.rule(reference) {
        Rule::Reject => {
            let what = format!("{PATH} rejects images of this repository");
            Err(Error::new(Kind::Refused, reference, what).into())
        }
        rule => Ok(rule.clone()),
    }
}

/// An image that is about to be used.
pub struct NamedImage<'a> {
    /// As the user named it.
    pub name: &'a str,
    /// What its repository is, if it is of one.
    pub reference: Option<Reference>,
    /// Whether that name has the digest of it.
    pub has_digest: bool,
    /// Its manifest.
    pub manifest: &'a Manifest,
}

impl NamedImage<'_> {
    /// What the policy demands of it.
    ///
    /// # Errors
    ///
    /// It is not to be taken; a policy that cannot be read.
    pub fn rule(&self) -> Result<Rule> {
        let Some(reference) = &self.reference else {
            return Ok(Rule::Accept);
        };
        rule(reference)
    }

    /// Refuses an image that the policy does not take.
    ///
    /// # Errors
    ///
    /// Those of [`NamedImage::rule`] and [`NamedImage::signed_by`].
    pub fn check(&self) -> Result<()> {
        match self.rule()? {
            Rule::SignedBy(certificates) => self.signed_by(&certificates).map(drop),
            _ => Ok(()),
        }
    }

    /// Its seal, whose root hash is one of those who may sign.
    ///
    /// # Errors
    ///
    /// It has none, or it is not signed by one of them.
    pub fn signed_by(&self, certificates: &[PathBuf]) -> Result<SealNote> {
        let refuse = |what: &str| Err(Error::new(Kind::Refused, self.name, what).into());
        let Some(note) = SealNote::read(self.manifest, self.name)? else {
            return refuse("must be signed, and has no root hash");
        };
        let Some(signature) = &note.signature else {
            return refuse("must be signed, and has no signature");
        };
        let root = hex(&note.root.digest);
        for certificate in certificates {
            if is_signed_by(&root, signature, certificate)? {
                return Ok(note);
            }
        }
        refuse("must be signed, and none of the certificates fits to its signature")
    }

    /// Its seal, which the user trusts for it was named by its digest.
    ///
    /// # Errors
    ///
    /// It has none, or was named otherwise.
    pub fn by_digest(&self) -> Result<SealNote> {
        let refuse = |what: &str| Err(Error::new(Kind::Refused, self.name, what).into());
        let Some(note) = SealNote::read(self.manifest, self.name)? else {
            return refuse("says no root hash: it was pushed without --seal");
        };
        match self.has_digest {
            true => Ok(note),
            false => refuse(
                "its root hash is in the image alone, and who sends another image sends another: name the \
                 image by its digest, or the certificate of who signed it, with --certificate or in the policy",
            ),
        }
    }

    /// How dm-verity is to check it.
    pub fn options(note: SealNote) -> verity::Options {
        verity::Options {
            root: note.root,
            // A signature that is not asked for could be one of keys that this kernel does not have.
            signature: note.signature.filter(|_| verity::signatures_are_required()),
        }
    }
}
