// SPDX-License-Identifier: GPL-2.0

//! Names of images, as skopeo and the other tools of containers read them: `[host[:port]/]repository[:tag][@digest]`.

use std::{fmt, str::FromStr};

use crate::{
    digest::Digest,
    error::{Error, Kind},
};

/// Where names without a host live.
const HUB: &str = "docker.io";
/// The machine that answers for [`HUB`].
const HUB_API: &str = "registry-1.docker.io";
/// Longest repository name.
const MAX_REPOSITORY: usize = 255;
/// Longest tag.
const MAX_TAG: usize = 128;

/// The name of an image in a registry.
///
/// # Invariants
///
/// Host, repository and tag hold only the characters that their grammar allows, so that each may stand in a path of a
/// URL or on a terminal as it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Host, with the port if it is not the usual one.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The machine that answers for the host.
    pub fn api_host(&self) -> &str {
        if self.host == HUB {
            HUB_API
        } else {
            &self.host
        }
    }

    /// Name of the repository, without the host.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag: `latest` where neither tag nor digest is given.
    pub fn tag(&self) -> Option<&str> {
        match (&self.tag, &self.digest) {
            (Some(tag), _) => Some(tag),
            (None, None) => Some("latest"),
            (None, Some(_)) => None,
        }
    }

    /// The digest, if one is given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What a registry is asked for: the digest, else the tag.
    pub fn target(&self) -> String {
        match &self.digest {
            Some(digest) => digest.to_string(),
            None => self.tag().unwrap_or_default().to_owned(),
        }
    }

    /// `host/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// The same repository at a digest.
    pub fn at(&self, digest: &Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest.clone()),
            ..self.clone()
        }
    }

    /// The same repository at a tag, which must be one.
    ///
    /// # Errors
    ///
    /// What no tag can be.
    pub fn with_tag(&self, tag: &str) -> Result<Self, Error> {
        if !is_tag(tag) {
            return Err(wrong(tag, "not a tag"));
        }
        Ok(Self {
            tag: Some(tag.to_owned()),
            digest: None,
            ..self.clone()
        })
    }
}

fn wrong(text: &str, what: &str) -> Error {
    Error::new(Kind::Refused, text, what)
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|what: &str| wrong(text, what))?;
                (rest, Some(digest))
            }
        };
        let (host, path) = split_host(rest);
        let (path, tag) = match path.rsplit_once(':') {
            None => (path, None),
            Some((path, tag)) => (path, Some(tag)),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            let what = "the tag is not up to 128 letters, digits, '_', '.' and '-', the first of them none of the last two";
            return Err(wrong(text, what));
        }
        let repository = match host {
            HUB if !path.contains('/') => format!("library/{path}"),
            _ => path.to_owned(),
        };
        if !is_host(host) {
            return Err(wrong(
                text,
                "what stands before the first '/' is not a host name",
            ));
        }
        if repository.len() > MAX_REPOSITORY || !repository.split('/').all(is_component) {
            let what = "the repository is not words of lower-case letters and digits with '.', '_', '__' or '-' \
                        between them, separated by '/'";
            return Err(wrong(text, what));
        }
        if path.len() == 64
            && path
                .bytes()
                .all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
        {
            return Err(wrong(
                text,
                "64 hexadecimal digits are no name; a digest stands after NAME@sha256:",
            ));
        }
        Ok(Self {
            host: host.to_owned(),
            repository,
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

/// The first part is a host if it cannot be a word of a repository or is `localhost`.
fn split_host(text: &str) -> (&str, &str) {
    match text.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|c| c.is_ascii_uppercase()) =>
        {
            (
                if first == "index.docker.io" {
                    HUB
                } else {
                    first
                },
                rest,
            )
        }
        _ => (HUB, text),
    }
}

fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match rest {
                "" => return true,
                _ => match rest.strip_prefix(':') {
                    Some(port) => ("v6", port),
                    None => return false,
                },
            }
        }
        None => match text.split_once(':') {
            Some((name, port)) => (name, port),
            None => (text, "1"),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253
        && name.split('.').all(label)
        && port.bytes().all(|c| c.is_ascii_digit())
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}

/// Lower-case letters and digits, with one '.', one or two '_' or any number of '-' between them.
fn is_component(text: &str) -> bool {
    let word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    word(*first)
        && word(*last)
        && bytes.split(|c| word(*c)).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|c| *c == b'-')
        })
}

fn is_tag(text: &str) -> bool {
    text.len() <= MAX_TAG
        && text
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'))
        && text
            .bytes()
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric() || c == b'_')
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = self.tag() {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(text: &str) -> Reference {
        text.parse().unwrap()
    }

    #[test]
    fn names_that_containers_have() {
        for (text, whole) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3", "docker.io/library/alpine:3"),
            ("docker.io/alpine", "docker.io/library/alpine:latest"),
            ("index.docker.io/user/x", "docker.io/user/x:latest"),
            ("user/x:T_a.g-1", "docker.io/user/x:T_a.g-1"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
            ("reg.example:5000/vm/web:mon", "reg.example:5000/vm/web:mon"),
            ("REG/x", "REG/x:latest"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("[fe80::1]/x", "[fe80::1]/x:latest"),
            ("h.x/a__b/c-----d/e.f:_t", "h.x/a__b/c-----d/e.f:_t"),
        ] {
            assert_eq!(parse(text).to_string(), whole, "{text}");
            assert_eq!(parse(whole).to_string(), whole);
        }
        let digest = parse(&format!("h.x/r@sha256:{HEX}"));
        assert_eq!(
            (digest.tag(), digest.target()),
            (None, format!("sha256:{HEX}"))
        );
        let both = parse(&format!("h.x/r:t@sha256:{HEX}"));
        assert_eq!(both.to_string(), format!("h.x/r:t@sha256:{HEX}"));
        assert_eq!(both.target(), format!("sha256:{HEX}"));
        assert_eq!(parse("alpine").api_host(), "registry-1.docker.io");
    }

    #[test]
    fn names_that_are_none() {
        for bad in [
            "",
            ":",
            "@",
            "/",
            "x:",
            "x/",
            "/x",
            "Alpine",
            "h.x/A",
            "h.x/a..b",
            "h.x/a___b",
            "h.x/-a",
            "h.x/a_",
            "h.x/../../etc",
            "h.x/a/../b",
            "h.x/a//b",
            "x:-t",
            "x:.t",
            "x:t t",
            "x:t\n",
            "x\n",
            "h.x:0/a",
            "h.x:99999/a",
            "h.x:/a",
            "-h.x/a",
            "h..x/a",
            "[::1/x",
            "[1]/x",
            "[::1]x/y",
            "x@sha256:12",
            "user:pw@h.x/r",
            "https://h.x/r",
            HEX,
            "h.x/r?x=y",
            "h.x/r#f",
            "h.x/r%2f",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
        assert!(format!("x:{}", "t".repeat(128))
            .parse::<Reference>()
            .is_ok());
        assert!(format!("x:{}", "t".repeat(129))
            .parse::<Reference>()
            .is_err());
        assert!(format!("h.x/{}", "a".repeat(256))
            .parse::<Reference>()
            .is_err());
    }

    proptest! {
        #[test]
        fn what_parses_prints_as_itself(text in "[a-zA-Z0-9.:/@_\\-\\[\\]]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let whole = reference.to_string();
                prop_assert_eq!(whole.parse::<Reference>().unwrap().to_string(), whole);
                prop_assert!(!reference.repository().contains(".."));
            }
        }
    }
}
