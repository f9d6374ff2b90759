// SPDX-License-Identifier: GPL-2.0

//! Manifests and configurations: what an image consists of.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    digest::Digest,
    document::{
        annotations, check_values, to_json, Annotations, Bounded, Descriptor, MediaType,
        MAX_DOCUMENT_BYTES, MAX_LAYERS,
    },
    error::{Error, Result},
};

/// Media type of an OCI configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a Docker configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Media type of an OCI layer.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Media type of a Docker layer.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// The parts of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2
    pub schema_version: u64,
    /// Type of the document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// What the image is, where it is not one for containers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The configuration.
    pub config: Descriptor,
    /// The layers, bottom first.
    pub layers: Bounded<Descriptor, MAX_LAYERS>,
    /// The image that this one is another form of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Facts about the whole.
    #[serde(
        default,
        deserialize_with = "annotations",
        skip_serializing_if = "Annotations::is_empty"
    )]
    pub annotations: Annotations,
}

impl Manifest {
    /// A manifest of `config` and `layers`, of OCI's types or Docker's.
    pub fn new(media_type: MediaType, config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(media_type.name().to_owned()),
            artifact_type: None,
            config,
            layers: Bounded(layers),
            subject: None,
            annotations: Annotations::new(),
        }
    }

    /// Its bytes, always the same.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// The configuration of an image. What is not about layers is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// As Go names them: `amd64`.
    #[serde(default)]
    pub architecture: String,
    /// `linux`
    #[serde(default)]
    pub os: String,
    /// What the layers hold.
    pub rootfs: RootFs,
    /// How the layers came to be.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_as_none"
    )]
    pub history: Vec<History>,
    /// Everything else: `created`, `config` with `Env` and `Cmd`, ...
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// What the layers hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// `layers`
    #[serde(rename = "type")]
    pub kind: String,
    /// The digest of each layer, not compressed, bottom first.
    pub diff_ids: Bounded<Digest, MAX_LAYERS>,
}

/// How a layer came to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The time, as RFC 3339 has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

fn null_as_none<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<History>, D::Error> {
    Ok(Option::<Vec<History>>::deserialize(deserializer)?.unwrap_or_default())
}

impl Config {
    /// Parses a configuration; `subject` is its name in errors.
    ///
    /// # Errors
    ///
    /// What is not one.
    pub fn parse(bytes: &[u8], subject: &dyn std::fmt::Display) -> Result<Self> {
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(Error::invalid(
                subject,
                "the configuration is larger than 4 MiB",
            ));
        }
        check_values(bytes)
            .map_err(|what| Error::invalid(subject, format!("the configuration has {what}")))?;
        serde_json::from_slice(bytes).map_err(|error| {
            Error::invalid(
                subject,
                format!(
                    "the configuration is not valid: {}",
                    crate::error::shown(&error.to_string())
                ),
            )
        })
    }

    /// Its bytes, always the same.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Document;

    #[test]
    fn bytes_are_deterministic_and_parse_again() {
        let config = Config {
            architecture: "amd64".to_owned(),
            os: "linux".to_owned(),
            rootfs: RootFs {
                kind: "layers".to_owned(),
                diff_ids: Bounded(vec![Digest::of(b"a")]),
            },
            history: vec![History {
                created_by: Some("x".to_owned()),
                ..History::default()
            }],
            other: serde_json::from_str(r#"{"config":{"Env":["B=1","A=2"]},"author":"me"}"#)
                .unwrap(),
        };
        let bytes = config.to_bytes();
        let again = Config::parse(&bytes, &"x").unwrap();
        assert_eq!(again, config);
        assert_eq!(again.to_bytes(), bytes);

        let mut layer = Descriptor::of(OCI_LAYER, b"layer");
        layer.annotations.insert("z".to_owned(), "1".to_owned());
        layer.annotations.insert("a".to_owned(), "2".to_owned());
        let manifest = Manifest::new(
            MediaType::OciManifest,
            Descriptor::of(OCI_CONFIG, &bytes),
            vec![layer],
        );
        let bytes = manifest.to_bytes();
        assert_eq!(
            Document::parse(&bytes, MediaType::OciManifest, &"x").unwrap(),
            Document::Manifest(Box::new(manifest))
        );
        let text = String::from_utf8(bytes).unwrap();
        assert!(
            text.contains(r#""annotations":{"a":"2","z":"1"}"#) && !text.contains(' '),
            "{text}"
        );
    }

    #[test]
    fn configurations_of_go_programs() {
        let text = r#"{"created":"x","history":null,"rootfs":{"type":"layers","diff_ids":null}}"#;
        assert_eq!(
            Config::parse(text.as_bytes(), &"x")
                .unwrap()
                .rootfs
                .diff_ids
                .len(),
            0
        );
        assert!(Config::parse(b"{}", &"x").is_err());
    }
}
