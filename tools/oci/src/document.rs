// SPDX-License-Identifier: GPL-2.0

//! What all JSON documents of an image share: media types, descriptors, lists of limited length.

use std::{collections::BTreeMap, fmt, marker::PhantomData, ops::Deref};

use serde::{de, Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    digest::Digest,
    error::{Error, Result},
    index::Index,
    manifest::Manifest,
};

/// Most bytes of a manifest, index or configuration, what registries accept.
pub const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Most layers of an image, what the kernel's stack and the original can map.
pub const MAX_LAYERS: usize = 255;
/// Most values of a document: in memory each takes some 100 bytes, in the document it may be two.
const MAX_VALUES: usize = 1 << 17;
/// Most annotations of one descriptor or document.
const MAX_ANNOTATIONS: usize = 256;

/// Media types of manifests and indexes, of OCI and of Docker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaType {
    /// `application/vnd.oci.image.manifest.v1+json`
    OciManifest,
    /// `application/vnd.oci.image.index.v1+json`
    OciIndex,
    /// `application/vnd.docker.distribution.manifest.v2+json`
    DockerManifest,
    /// `application/vnd.docker.distribution.manifest.list.v2+json`
    DockerIndex,
}

impl MediaType {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::OciManifest,
        Self::OciIndex,
        Self::DockerManifest,
        Self::DockerIndex,
    ];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::OciManifest => "application/vnd.oci.image.manifest.v1+json",
            Self::OciIndex => "application/vnd.oci.image.index.v1+json",
            Self::DockerManifest => "application/vnd.docker.distribution.manifest.v2+json",
            Self::DockerIndex => "application/vnd.docker.distribution.manifest.list.v2+json",
        }
    }

    /// The one that is written `name`, maybe with parameters.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.split(';').next().unwrap_or_default().trim();
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// Whether it lists manifests, not layers.
    pub fn is_index(self) -> bool {
        matches!(self, Self::OciIndex | Self::DockerIndex)
    }
}

/// A list of at most `N` elements: a longer one is refused when the element too many is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounded<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for Bounded<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const N: usize> Deref for Bounded<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Serialize, const N: usize> Serialize for Bounded<T, N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct List<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> de::Visitor<'de> for List<T, N> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N}")
            }

            fn visit_seq<A: de::SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<Vec<T>, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = list.next_element()? {
                    if elements.len() == N {
                        return Err(de::Error::custom(format_args!("a list of more than {N}")));
                    }
                    elements.push(element);
                }
                Ok(elements)
            }

            // Go programs write an empty list as null.
            fn visit_unit<E: de::Error>(self) -> std::result::Result<Vec<T>, E> {
                Ok(Vec::new())
            }
        }
        deserializer
            .deserialize_any(List::<T, N>(PhantomData))
            .map(Self)
    }
}

/// Annotations in the order in which they are written.
pub(crate) type Annotations = BTreeMap<String, String>;

/// Reads annotations, null as none of them, and not too many.
pub(crate) fn annotations<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Annotations, D::Error> {
    let map = Option::<Annotations>::deserialize(deserializer)?.unwrap_or_default();
    if map.len() > MAX_ANNOTATIONS {
        return Err(de::Error::custom(format_args!(
            "more than {MAX_ANNOTATIONS} annotations"
        )));
    }
    Ok(map)
}

/// Machines that an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// As Go names them: `amd64`.
    pub architecture: String,
    /// `linux`
    pub os: String,
    /// Of the architecture: `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// This machine.
    pub fn here() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "riscv64gc" => "riscv64",
            other => other,
        };
        Self {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            variant: None,
        }
    }

    /// Whether an image for `self` is what was asked for by `wanted`.
    pub fn fits(&self, wanted: &Self) -> bool {
        self.architecture == wanted.architecture
            && self.os == wanted.os
            && (wanted.variant.is_none() || wanted.variant == self.variant)
    }
}

impl std::str::FromStr for Platform {
    type Err = &'static str;

    /// `OS/ARCH[/VARIANT]`
    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let mut parts = text.split('/').map(str::to_owned);
        let (Some(os), Some(architecture), variant, None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("a platform is OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT");
        };
        if os.is_empty() || architecture.is_empty() || variant.as_deref() == Some("") {
            return Err("a part of the platform is empty");
        }
        Ok(Self {
            architecture,
            os,
            variant,
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant
            .as_ref()
            .map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// What a document says of a blob or another document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Type of what is described.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    #[serde(deserialize_with = "size")]
    pub size: u64,
    /// Facts about it.
    #[serde(
        default,
        deserialize_with = "annotations",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: Annotations,
    /// Machines that it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// What an artifact is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

/// Sizes are positive and fit into a signed number, as offsets of files do.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<u64, D::Error> {
    let size = u64::deserialize(deserializer)?;
    if size == 0 || i64::try_from(size).is_err() {
        return Err(de::Error::custom("a size of 0 or beyond 2^63 - 1"));
    }
    Ok(size)
}

impl Descriptor {
    /// Describes `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// Describes `size` bytes with `digest`.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: Annotations::new(),
            platform: None,
            artifact_type: None,
        }
    }
}

/// A manifest or an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Box<Manifest>),
    /// Images for several machines.
    Index(Box<Index>),
}

impl Document {
    /// Parses the `bytes` of a document that was announced as a `media_type`; `subject` is its name in errors.
    ///
    /// # Errors
    ///
    /// A document that is not as its type demands, or could be taken for another type.
    pub fn parse(bytes: &[u8], media_type: MediaType, subject: &dyn fmt::Display) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Head {
            schema_version: Option<u64>,
            media_type: Option<String>,
            layers: Option<de::IgnoredAny>,
            manifests: Option<de::IgnoredAny>,
        }
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(Error::invalid(subject, "the manifest is larger than 4 MiB"));
        }
        check_values(bytes).map_err(|what| Error::invalid(subject, what))?;
        let what = if media_type.is_index() {
            "index"
        } else {
            "manifest"
        };
        let fail = |error: serde_json::Error| {
            Error::invalid(
                subject,
                format!(
                    "the {what} is not valid: {}",
                    crate::error::shown(&error.to_string())
                ),
            )
        };
        let head: Head = serde_json::from_slice(bytes).map_err(fail)?;
        if head.schema_version != Some(2) {
            return Err(Error::invalid(
                subject,
                format!("the {what} is not of schema version 2"),
            ));
        }
        let inner = head.media_type.as_deref().map(MediaType::from_name);
        if inner.is_some_and(|inner| inner != Some(media_type)) {
            return Err(Error::invalid(
                subject,
                format!("the {what} has another media type than it was announced with"),
            ));
        }
        if head.layers.is_some() && head.manifests.is_some() {
            return Err(Error::invalid(subject, "a manifest and an index at once"));
        }
        Ok(if media_type.is_index() {
            Self::Index(Box::new(serde_json::from_slice(bytes).map_err(fail)?))
        } else {
            Self::Manifest(Box::new(serde_json::from_slice(bytes).map_err(fail)?))
        })
    }

    /// The media type that the document itself names, else what its content shows.
    pub fn guess_type(bytes: &[u8]) -> Option<MediaType> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Head {
            media_type: Option<String>,
            manifests: Option<de::IgnoredAny>,
        }
        check_values(bytes).ok()?;
        let head: Head = serde_json::from_slice(bytes).ok()?;
        match head.media_type {
            Some(name) => MediaType::from_name(&name),
            None if head.manifests.is_some() => Some(MediaType::OciIndex),
            None => Some(MediaType::OciManifest),
        }
    }
}

/// Refuses a text of JSON with more values than any document needs, before it is parsed. Commas in strings count too.
pub(crate) fn check_values(text: &[u8]) -> std::result::Result<(), &'static str> {
    match text.iter().filter(|byte| **byte == b',').count() < MAX_VALUES {
        true => Ok(()),
        false => Err("more than 131,072 values"),
    }
}

/// The bytes of a document: keys in the order of its type, without spaces.
pub(crate) fn to_json(document: &impl Serialize) -> Vec<u8> {
    // Own types with text keys: nothing in them fails.
    serde_json::to_vec(document).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, media_type: MediaType) -> Result<Document> {
        Document::parse(text.as_bytes(), media_type, &"x")
    }

    fn digest(n: usize) -> String {
        format!("sha256:{n:064x}")
    }

    fn manifest(layers: usize) -> String {
        let layers: Vec<String> = (0..layers)
            .map(|n| format!(r#"{{"mediaType":"l","digest":"{}","size":1}}"#, digest(n)))
            .collect();
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{}","size":2}},"layers":[{}]}}"#,
            digest(7),
            layers.join(",")
        )
    }

    #[test]
    fn limits() {
        assert!(parse(&manifest(255), MediaType::OciManifest).is_ok());
        for layers in [256, 10_000] {
            let error = parse(&manifest(layers), MediaType::OciManifest).unwrap_err();
            assert!(error.what().contains("more than 255"), "{error}");
        }
        let long = format!("{}{}", manifest(1), " ".repeat(MAX_DOCUMENT_BYTES as usize));
        assert!(parse(&long, MediaType::OciManifest).is_err());
        let deep = format!(r#"{{"schemaVersion":2,"x":{}"#, "[".repeat(100_000));
        assert!(parse(&deep, MediaType::OciManifest).is_err());
    }

    #[test]
    fn a_document_is_of_one_type() {
        let both = manifest(1).replace("{\"schema", r#"{"manifests":[],"schema"#);
        assert!(parse(&both, MediaType::OciManifest).is_err());
        assert!(parse(&both, MediaType::OciIndex).is_err());
        let named = manifest(1).replace(
            "{\"schema",
            &format!(r#"{{"mediaType":"{}","schema"#, MediaType::OciIndex.name()),
        );
        assert!(parse(&named, MediaType::OciManifest).is_err());
        assert!(parse(&manifest(1).replace(":2,", ":1,"), MediaType::OciManifest).is_err());
        assert!(parse(
            r#"{"schemaVersion":2,"manifests":null}"#,
            MediaType::DockerIndex
        )
        .is_ok());
    }

    #[test]
    fn sizes_and_digests() {
        for (from, to) in [
            ("\"size\":1", "\"size\":0"),
            ("\"size\":1", "\"size\":-1"),
            ("\"size\":1", "\"size\":9223372036854775808"),
            ("\"size\":1", "\"size\":1.5"),
            ("sha256:0", "sha256:../0"),
            ("sha256:0", "md5:0"),
        ] {
            let text = manifest(1).replacen(from, to, 1);
            assert_ne!(text, manifest(1));
            assert!(parse(&text, MediaType::OciManifest).is_err(), "{to}");
        }
    }

    #[test]
    fn platforms() {
        let arm: Platform = "linux/arm64/v8".parse().unwrap();
        assert!(arm.fits(&"linux/arm64".parse().unwrap()));
        assert!(!arm.fits(&"linux/arm64/v9".parse().unwrap()));
        assert_eq!(arm.to_string(), "linux/arm64/v8");
        for bad in ["linux", "linux/", "/amd64", "a/b/c/d", "a/b/"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
