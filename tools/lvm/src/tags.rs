// SPDX-License-Identifier: GPL-2.0

//! What the tags of a volume say about its image. LVM allows letters, digits and `_+.-/=!:&#` in them, which is enough
//! for digests and for names of images without a digest.

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
/// There while the volume is being made; it holds nothing of use. Its value is a [`crate::partial::Mark`].
pub const PARTIAL: &str = "ovbd.partial";

/// The tags of a volume that are ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    /// Names and values, as LVM has them.
    list: Vec<(String, String)>,
}

impl Tags {
    /// Takes ours out of a list as LVM prints it.
    pub fn parse(list: &str) -> Self {
        let ours = list.split(',').filter(|tag| tag.starts_with("ovbd."));
        let parts = ours.map(|tag| tag.split_once('=').unwrap_or((tag, "")));
        let owned = parts.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            list: owned.collect(),
        }
    }

    /// The value of a tag. Of two with one name neither is believed.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut values = self.list.iter().filter(|(found, _)| found == name);
        let (_, value) = values.next()?;
        values.next().is_none().then_some(value)
    }

    /// Whether the volume is still being made.
    pub fn is_partial(&self) -> bool {
        self.list.iter().any(|(name, _)| name == PARTIAL)
    }

    /// Whether the volume is an image, complete.
    pub fn is_image(&self) -> bool {
        self.get(MANIFEST).is_some() && !self.is_partial()
    }

    /// All of them, as LVM has them.
    pub fn all(&self) -> impl Iterator<Item = String> + '_ {
        self.list.iter().map(|(name, value)| match value.as_str() {
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
        // All of them can be taken away.
        assert_eq!(tags.all().count(), 3);
        let twice = Tags::parse("ovbd.partial=a,ovbd.partial=b,ovbd.manifest=sha256:c");
        assert!(twice.is_partial() && !twice.is_image());
    }

    #[test]
    fn characters() {
        assert!(is_allowed("reg.example:5000/vm/web_1"));
        assert!(!is_allowed("a@sha256:b"));
        assert!(!is_allowed("a b"));
    }
}
