// SPDX-License-Identifier: GPL-2.0

//! What the tags of a volume say about its image. LVM allows letters, digits and `_+.-/=!:&#` in them, which is enough
//! for digests and for names of images without a digest.

use std::collections::BTreeMap;

/// Digest of the manifest.
pub const MANIFEST: &str = "ovbd.manifest";
/// Registry and repository, or image layout.
pub const REPO: &str = "ovbd.repo";
/// Tag in that repository.
pub const TAG: &str = "ovbd.tag";
/// Identity of the content: the OCI chain ID of the layers.
pub const CHAIN: &str = "ovbd.chain";
/// UUID of the topmost layer, which the next one names as its parent.
pub const UUID: &str = "ovbd.uuid";
/// Digest of the layer whose file the volume holds.
pub const LAYER: &str = "ovbd.layer";
/// There while the volume is being made; it holds nothing of use.
pub const PARTIAL: &str = "ovbd.partial";

/// The tags of a volume that are ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    values: BTreeMap<String, String>,
}

impl Tags {
    /// Takes ours out of a list as LVM prints it. Of two with one name neither is believed.
    pub fn parse(list: &str) -> Self {
        let mut values = BTreeMap::new();
        let mut twice = Vec::new();
        for tag in list.split(',').filter(|tag| tag.starts_with("ovbd.")) {
            let (name, value) = tag.split_once('=').unwrap_or((tag, ""));
            if values.insert(name.to_owned(), value.to_owned()).is_some() {
                twice.push(name.to_owned());
            }
        }
        for name in twice {
            values.remove(&name);
        }
        Self { values }
    }

    /// The value of a tag.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Whether the volume is still being made.
    pub fn is_partial(&self) -> bool {
        self.values.contains_key(PARTIAL)
    }

    /// Whether the volume is an image, complete.
    pub fn is_image(&self) -> bool {
        self.values.contains_key(MANIFEST) && !self.is_partial()
    }

    /// All of them, as LVM has them.
    pub fn all(&self) -> impl Iterator<Item = String> + '_ {
        self.values
            .iter()
            .map(|(name, value)| match value.as_str() {
                "" => name.clone(),
                value => format!("{name}={value}"),
            })
    }
}

/// Whether LVM takes `text` as part of a tag.
pub fn is_allowed(text: &str) -> bool {
    text.chars()
        .all(|c| c.is_ascii_alphanumeric() || "_+.-/=!:&#".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_among_others() {
        let tags = Tags::parse("backup,ovbd.manifest=sha256:ab,ovbd.repo=h:5000/vm/a.b-c,x=y");
        assert_eq!(tags.get(MANIFEST), Some("sha256:ab"));
        assert_eq!(tags.get(REPO), Some("h:5000/vm/a.b-c"));
        assert_eq!(tags.get("x"), None);
        assert!(tags.is_image() && !tags.is_partial());
        assert!(!Tags::parse("ovbd.manifest=sha256:ab,ovbd.partial").is_image());
        assert_eq!(Tags::parse(""), Tags::default());
    }

    #[test]
    fn of_two_neither_is_believed() {
        let tags = Tags::parse("ovbd.chain=a,ovbd.chain=b,ovbd.tag=t");
        assert_eq!(tags.get(CHAIN), None);
        assert_eq!(tags.get(TAG), Some("t"));
    }

    #[test]
    fn characters() {
        assert!(is_allowed("reg.example:5000/vm/web_1"));
        assert!(!is_allowed("a@sha256:b"));
        assert!(!is_allowed("a b"));
    }
}
