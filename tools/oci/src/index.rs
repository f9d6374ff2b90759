// SPDX-License-Identifier: GPL-2.0

//! Image indexes: one name for images of several machines.

use serde::{Deserialize, Serialize};

use crate::{
    document::{annotations, Annotations, Bounded, Descriptor, MediaType, Platform},
    error::{Error, Result},
};

/// Most entries of an index.
pub const MAX_ENTRIES: usize = 1024;

/// A list of manifests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2
    pub schema_version: u64,
    /// Type of the document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests.
    #[serde(default)]
    pub manifests: Bounded<Descriptor, MAX_ENTRIES>,
    /// Facts about the whole.
    #[serde(
        default,
        deserialize_with = "annotations",
        skip_serializing_if = "Annotations::is_empty"
    )]
    pub annotations: Annotations,
}

impl Index {
    /// An OCI index of `manifests`.
    pub fn new(manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(MediaType::OciIndex.name().to_owned()),
            manifests: Bounded(manifests),
            annotations: Annotations::new(),
        }
    }

    /// The manifest for `wanted`; `subject` is the index's name in errors.
    ///
    /// # Errors
    ///
    /// No such manifest: says which there are.
    pub fn select(
        &self,
        wanted: &Platform,
        subject: &dyn std::fmt::Display,
    ) -> Result<&Descriptor> {
        let known = |entry: &&Descriptor| MediaType::from_name(&entry.media_type).is_some();
        if let [only] = &self.manifests[..] {
            if only.platform.is_none() && known(&only) {
                return Ok(only);
            }
        }
        let fits = |entry: &&Descriptor| {
            entry
                .platform
                .as_ref()
                .is_some_and(|platform| platform.fits(wanted))
        };
        self.manifests
            .iter()
            .filter(known)
            .find(fits)
            .ok_or_else(|| {
                let there: Vec<String> = self
                    .manifests
                    .iter()
                    .filter_map(|entry| entry.platform.as_ref())
                    .take(20)
                    .map(|platform| crate::error::shown(&platform.to_string()))
                    .collect();
                Error::new(
                    crate::Kind::Missing,
                    subject,
                    format!(
                        "no image for {wanted} in the index, which has {}",
                        if there.is_empty() {
                            "none with a platform".to_owned()
                        } else {
                            there.join(", ")
                        }
                    ),
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Document;

    #[test]
    fn too_many_entries() {
        let entry = format!(
            r#"{{"mediaType":"m","digest":"sha256:{:064x}","size":1}}"#,
            1
        );
        for (count, right) in [(1024, true), (1025, false)] {
            let text = format!(
                r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
                vec![entry.clone(); count].join(",")
            );
            assert_eq!(
                Document::parse(text.as_bytes(), MediaType::OciIndex, &"x").is_ok(),
                right
            );
        }
    }

    #[test]
    fn the_platform_decides() {
        let entry = |number: u8, platform: Option<&str>| Descriptor {
            platform: platform.map(|text| text.parse().unwrap()),
            ..Descriptor::of(MediaType::OciManifest.name(), &[number])
        };
        let index = Index::new(vec![
            entry(1, Some("linux/arm64/v8")),
            entry(2, Some("linux/amd64")),
            entry(3, Some("unknown/unknown")),
        ]);
        let pick = |text: &str| {
            index
                .select(&text.parse().unwrap(), &"x")
                .map(|found| found.digest.clone())
        };
        assert_eq!(pick("linux/amd64").unwrap(), entry(2, None).digest);
        assert_eq!(pick("linux/arm64").unwrap(), entry(1, None).digest);
        let error = pick("linux/s390x").unwrap_err();
        assert!(
            error.what().contains("linux/arm64/v8, linux/amd64"),
            "{error}"
        );
        let single = Index::new(vec![entry(9, None)]);
        assert!(single.select(&Platform::here(), &"x").is_ok());
    }
}
