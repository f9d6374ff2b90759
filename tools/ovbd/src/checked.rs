// SPDX-License-Identifier: GPL-2.0

//! What a stack is checked against by dm-verity: `--verity` and `--signature`.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::verity::{self, Root, MAX_SIGNATURE};
use ovbd_layers::{error::Error, verity::Digest};

use crate::{policy::Rule, seal_note::NamedImage};

/// Most bytes of a file with a root hash.
const MAX_ROOT: u64 = 256;

/// The options.
#[derive(Clone, Debug, Default, Args)]
pub struct VerityOption {
    /// Have dm-verity check every block that is read against this root hash, or that in this file; the seal is the
    /// topmost layer. HASH:BYTES also says how large the sealed image is. With "image" it is the root hash that the image
    /// itself comes with, if it is signed with a key of --certificate or of the policy, or the image is named by its digest
    #[arg(long, value_name = "HASH[:BYTES]|FILE|image", value_hint = ValueHint::FilePath)]
    pub verity: Option<String>,
    /// Have the kernel check this signature of the root hash, with the keys that it trusts: PKCS#7 in DER
    #[arg(long, value_name = "FILE", requires = "verity", value_hint = ValueHint::FilePath)]
    pub signature: Option<PathBuf>,
    /// With "--verity image": the certificate, in PEM, of who must have signed the root hash
    #[arg(long, value_name = "FILE", requires = "verity", value_hint = ValueHint::FilePath)]
    pub certificate: Option<PathBuf>,
}

/// The root hash is that of the image.
const IMAGE: &str = "image";

impl VerityOption {
    /// What dm-verity is to check of a stack of `images` and of other layers, if it is to. The policy is obeyed.
    ///
    /// # Errors
    ///
    /// Neither a root hash nor a file with one, an image that is not to be taken or not with other layers, and those of
    /// reading.
    pub fn of_stack(
        &self,
        images: &[NamedImage<'_>],
        is_one_image: bool,
    ) -> Result<Option<verity::Options>> {
        let mut certificates: Vec<PathBuf> = self.certificate.iter().cloned().collect();
        let mut demanded = None;
        for image in images {
            if let Rule::SignedBy(paths) = image.rule()? {
                demanded = Some(image);
                if self.certificate.is_none() {
                    certificates = paths;
                }
            }
        }
        let of_image = match self.verity.as_deref() {
            Some(IMAGE) => true,
            Some(text) if self.certificate.is_some() => {
                let what = "--certificate is for \"--verity image\"";
                return Err(Error::new(Path::new(text), what).into());
            }
            Some(_) => false,
            None => demanded.is_some(),
        };
        if !of_image {
            return self.given();
        }
        let image = match (images, demanded) {
            ([image], _) if is_one_image => image,
            (_, Some(image)) => {
                let what = "must be sealed and signed, and a seal is of that image alone: --verity gives the root \
                            hash of a stack of it and other layers";
                return Err(Error::new(Path::new(image.name), what).into());
            }
            _ => {
                let what = "--verity image is for one image, and nothing else, as the stack";
                return Err(Error::new(Path::new(IMAGE), what).into());
            }
        };
        let note = match certificates.is_empty() {
            true => image.by_digest()?,
            false => image.signed_by(&certificates)?,
        };
        let mut options = NamedImage::options(note);
        if let Some(signature) = self.signature()? {
            options.signature = Some(signature);
        }
        Ok(Some(options))
    }

    /// The root hash of the command line, if there is one.
    ///
    /// # Errors
    ///
    /// Neither a root hash nor a file with one, and those of reading.
    pub fn given(&self) -> Result<Option<verity::Options>> {
        let Some(text) = &self.verity else {
            return Ok(None);
        };
        let (root, signature) = (root(text)?, self.signature()?);
        Ok(Some(verity::Options { root, signature }))
    }

    fn signature(&self) -> Result<Option<Vec<u8>>> {
        let path = self.signature.as_deref();
        path.map(|path| read(path, MAX_SIGNATURE, "a signature"))
            .transpose()
    }
}

/// A root hash, or that in the file of this name.
///
/// # Errors
///
/// Neither, and those of reading.
pub fn root(text: &str) -> Result<Root> {
    let path = Path::new(text);
    match text.parse() {
        Ok(root) => return Ok(root),
        Err(what) if !path.exists() => {
            let what = format!("no such file, and {what}");
            return Err(Error::new(path, what).into());
        }
        Err(_) => {}
    }
    let bytes = read(path, MAX_ROOT, "a root hash")?;
    let text = String::from_utf8_lossy(&bytes);
    let root = text.trim().parse();
    Ok(root.map_err(|what: &str| Error::new(path, what))?)
}

/// As [`root`], where only a SHA-256 will do.
///
/// # Errors
///
/// Another hash, and as there.
pub fn digest(text: &str) -> Result<Digest> {
    let root = root(text)?;
    let digest = root.digest.as_slice().try_into();
    Ok(digest.map_err(|_| Error::new(Path::new(text), "is no SHA-256"))?)
}

fn read(path: &Path, most: u64, kind: &str) -> Result<Vec<u8>> {
    let fail = |e| Error::io(path, "read", e);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(fail)?;
    file.take(most + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.is_empty() || bytes.len() as u64 > most {
        let what = format!("{} bytes are not {kind}", bytes.len());
        return Err(Error::new(path, what).into());
    }
    Ok(bytes)
}
