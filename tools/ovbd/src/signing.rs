// SPDX-License-Identifier: GPL-2.0

//! Signatures of root hashes, made and checked by openssl: PKCS#7 in DER, without certificates, of the hexadecimal digits,
//! as the kernel takes them for dm-verity and systemd keeps them beside an image.

use std::{
    io::Write as _,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::verity::MAX_SIGNATURE;
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
        let mut command = smime();
        command.args(["-sign", "-noattr", "-binary", "-nocerts", "-outform", "der"]);
        command.arg("-signer").arg(certificate);
        command.arg("-inkey").arg(key);
        if key.starts_with("pkcs11:") {
            command.args(["-provider", "pkcs11", "-provider", "default"]);
        }
        let signature = output(command, root.as_bytes())?;
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
    let mut command = Command::new(OPENSSL);
    command.args(["x509", "-noout", "-in"]).arg(certificate);
    output(command, b"")?;
    let mut content = tempfile::NamedTempFile::new()?;
    content.write_all(root.as_bytes())?;
    let mut command = smime();
    // No other certificate than that one, not even one in the signature.
    command.args([
        "-verify",
        "-binary",
        "-inform",
        "der",
        "-nointern",
        "-noverify",
    ]);
    command.arg("-certfile").arg(certificate);
    command.arg("-content").arg(content.path());
    let checked = output(command, signature);
    if let Err(error) = &checked {
        tracing::debug!(%error, "not signed by {}", certificate.display());
    }
    // With a signature of something else openssl fails; what it has checked it prints.
    Ok(checked.is_ok_and(|checked| checked == root.as_bytes()))
}

fn smime() -> Command {
    let mut command = Command::new(OPENSSL);
    command.arg("smime");
    command
}

/// What a program prints for `input`.
fn output(mut command: Command, input: &[u8]) -> Result<Vec<u8>, Error> {
    let path = Path::new(OPENSSL);
    let fail = |e| Error::io(path, "run", e);
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(fail)?;
    if let Some(mut pipe) = child.stdin.take() {
        // Less than a pipe holds. One that reads nothing says why.
        let _ = pipe.write_all(input);
    }
    let output = child.wait_with_output().map_err(fail)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().map(str::trim).filter(|line| !line.is_empty());
    // A provider that crashes says nothing.
    let how = output.status.to_string();
    let said: Vec<&str> = said.chain([how.as_str()]).collect();
    Err(Error::new(path, said.join("; ")))
}
