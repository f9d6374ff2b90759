// SPDX-License-Identifier: GPL-2.0

//! Which certificates are trusted, and which one is shown: the system's, and what skopeo's and docker's folders hold for a
//! host.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use rustls::{
    crypto::ring,
    pki_types::{pem::PemObject, PrivateKeyDer},
    RootCertStore,
};
use ureq::tls::{parse_pem, Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig};

use crate::error::{Error, Kind, Result};

/// Folders with a folder for each host.
const FOLDERS: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// The configuration for `authority` (a host and maybe a port): the system's certificates, those of `ca`, and what
/// `folders` or, without any, the usual ones have for it.
///
/// # Errors
///
/// Files that cannot be read or hold no certificate.
pub fn config(authority: &str, ca: Option<&Path>) -> Result<TlsConfig> {
    let mut roots = system_roots().to_vec();
    if let Some(ca) = ca {
        roots.extend(certificates(ca)?);
    }
    let mut client = None;
    for folder in FOLDERS.map(|folder| Path::new(folder).join(authority)) {
        let Ok(files) = fs::read_dir(&folder) else {
            continue;
        };
        let mut files: Vec<PathBuf> = files.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            match file.extension().and_then(|end| end.to_str()) {
                Some("crt") => roots.extend(certificates(&file)?),
                Some("cert") if client.is_none() => client = Some(client_certificate(&file)?),
                _ => {}
            }
        }
    }
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
        .build())
}

/// What the system trusts, read once.
fn system_roots() -> &'static [Certificate<'static>] {
    static ROOTS: OnceLock<Vec<Certificate<'static>>> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::debug!(%error, "a certificate of the system is left out");
        }
        found
            .certs
            .iter()
            .map(|found| Certificate::from_der(found).to_owned())
            .collect()
    })
}

fn items(path: &Path) -> Result<Vec<PemItem<'static>>> {
    let text = fs::read(path).map_err(|error| Error::io(path, "read", error))?;
    parse_pem(&text)
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| Error::invalid(path.display(), "not a PEM file"))
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let found: Vec<_> = items(path)?
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        return Err(Error::invalid(path.display(), "holds no certificate"));
    }
    Ok(found)
}

/// The certificate in `path` and the key beside it, which must fit.
fn client_certificate(path: &Path) -> Result<ClientCert> {
    let chain = certificates(path)?;
    let key_path = path.with_extension("key");
    let key = items(&key_path)?.into_iter().find_map(|item| match item {
        PemItem::PrivateKey(key) => Some(key),
        _ => None,
    });
    let no_key = || Error::invalid(key_path.display(), "holds no private key");
    let key: PrivateKey<'static> = key.ok_or_else(no_key)?;
    // Tried here, because the client below takes it for granted that they fit.
    let der = PrivateKeyDer::from_pem_file(&key_path).map_err(|_| no_key())?;
    let ders = chain
        .iter()
        .map(|part| part.der().to_vec().into())
        .collect();
    rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_root_certificates(RootCertStore::empty())
                .with_client_auth_cert(ders, der)
        })
        .map_err(|error| {
            Error::new(
                Kind::Invalid,
                path.display(),
                format!("does not fit its key: {error}"),
            )
        })?;
    Ok(ClientCert::new_with_certs(&chain, key))
}
