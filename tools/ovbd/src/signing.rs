// SPDX-License-Identifier: GPL-2.0

//! Signatures of root hashes, made and checked by openssl: PKCS#7 in DER, without certificates, of the hexadecimal digits,
//! as the kernel takes them for dm-verity and systemd keeps them beside an image.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::{programs::run_with_input, verity::MAX_SIGNATURE};
use ovbd_layers::error::Error;

const OPENSSL: &str = "openssl";

/// With what to sign.
#[derive(Clone, Debug, Default, Args)]
pub struct SignOption {
    /// Sign the root hash with this key: a file in PEM, or a URI "pkcs11:..." for OpenSSL's provider of that name
    #[arg(long, value_name = "KEY", requires = "certificate", value_hint = ValueHint::FilePath)]
    pub sign_key: Option<String>,
    /// The certificate of that key, in PEM
    #[arg(long, value_name = "FILE", requires = "sign_key", value_hint = ValueHint::FilePath)]
    pub certificate: Option<PathBuf>,
}

impl SignOption {
    /// The signature of a root hash in hexadecimal digits, if one is wanted.
    ///
    /// # Errors
    ///
    /// openssl is not installed or cannot sign, and a signature that its own certificate does not fit to.
    pub fn sign(&self, root: &str) -> Result<Option<Vec<u8>>> {
        let (Some(key), Some(certificate)) = (&self.sign_key, &self.certificate) else {
            return Ok(None);
        };
        let mut words = words("smime -sign -noattr -binary -nocerts -outform der -signer");
        words.extend([certificate.as_os_str(), "-inkey".as_ref(), key.as_ref()]);
        if key.starts_with("pkcs11:") {
            words.extend(self::words("-provider pkcs11 -provider default"));
        }
        let signature = run_with_input(OPENSSL, words, root.as_bytes())?;
        if !is_signed_by(root, &signature, certificate)? {
            return Err(Error::new(certificate, "is not the certificate of the key").into());
        }
        Ok(Some(signature))
    }
}

/// Whether a signature of a root hash in hexadecimal digits was made with the key of a certificate. Whether the
/// certificate has expired, and who issued it, does not matter: it is the key that is trusted.
///
/// # Errors
///
/// openssl is not installed, a certificate that cannot be read, and a signature that is none.
pub fn is_signed_by(root: &str, signature: &[u8], certificate: &Path) -> Result<bool> {
    if signature.len() as u64 > MAX_SIGNATURE {
        return Ok(false);
    }
    // Else a certificate that is none would look as a wrong signature does.
    let mut words = words("x509 -noout -in");
    words.push(certificate.as_os_str());
    run_with_input(OPENSSL, words, b"")?;
    let mut content = tempfile::NamedTempFile::new()?;
    content.write_all(root.as_bytes())?;
    // No other certificate than that one, not even one in the signature.
    let mut words = self::words("smime -verify -binary -inform der -nointern -noverify -certfile");
    words.extend([certificate.as_os_str(), "-content".as_ref()]);
    words.push(content.path().as_os_str());
    let checked = run_with_input(OPENSSL, words, signature);
    if let Err(error) = &checked {
        tracing::debug!(%error, "not signed by {}", certificate.display());
    }
    // With a signature of something else openssl fails; what it has checked it prints.
    Ok(checked.is_ok_and(|checked| checked == root.as_bytes()))
}

fn words(text: &str) -> Vec<&OsStr> {
    text.split(' ').map(OsStr::new).collect()
}
