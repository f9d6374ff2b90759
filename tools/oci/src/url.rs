// SPDX-License-Identifier: GPL-2.0

//! URLs of HTTP requests, and where the `Location` of an answer leads.

use std::fmt;

use ureq::http::Uri;

/// A URL with the scheme `http` or `https`.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    https: bool,
    authority: String,
    path: String,
    query: Option<String>,
}

impl Url {
    /// `path` on `authority`, which is a host and maybe a port.
    pub fn new(https: bool, authority: &str, path: &str) -> Self {
        Self {
            https,
            authority: authority.to_owned(),
            path: path.to_owned(),
            query: None,
        }
    }

    /// An absolute URL without user, password and fragment.
    pub fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        let https = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?.as_str();
        if authority.contains('@') || uri.host()?.is_empty() {
            return None;
        }
        Some(Self {
            https,
            authority: authority.to_owned(),
            path: uri.path().to_owned(),
            query: uri.query().map(str::to_owned),
        })
    }

    /// Where `location`, absolute or relative, leads from here.
    pub fn join(&self, location: &str) -> Option<Self> {
        let scheme = if self.https { "https" } else { "http" };
        if location.starts_with("//") {
            Self::parse(&format!("{scheme}:{location}"))
        } else if location.starts_with('/') {
            Self::parse(&format!("{scheme}://{}{location}", self.authority))
        } else if location.starts_with('?') {
            Self::parse(&format!(
                "{scheme}://{}{}{location}",
                self.authority, self.path
            ))
        } else if location.split(['/', '?']).next()?.contains(':') {
            Self::parse(location)
        } else {
            let folder = self.path.rfind('/').map_or("/", |end| &self.path[..=end]);
            Self::parse(&format!("{scheme}://{}{folder}{location}", self.authority))
        }
    }

    /// The same with one more parameter.
    pub fn with(&self, name: &str, value: &str) -> Self {
        let parameter = format!("{name}={}", encode(value));
        let query = match self.query.as_deref() {
            None | Some("") => parameter,
            Some(query) => format!("{query}&{parameter}"),
        };
        Self {
            query: Some(query),
            ..self.clone()
        }
    }

    /// Whether it is encrypted.
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// Host and port.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Host without port and brackets.
    pub fn host(&self) -> &str {
        host(&self.authority)
    }

    /// The path, which may be shown; a query may hold secrets.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether both are the same scheme, host and port: what may be sent to one may be sent to the other.
    pub fn same_origin(&self, other: &Self) -> bool {
        let port = |url: &Self| {
            let port = url
                .authority
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse::<u16>().ok());
            port.unwrap_or(if url.https { 443 } else { 80 })
        };
        self.https == other.https
            && self.host().eq_ignore_ascii_case(other.host())
            && port(self) == port(other)
    }

    /// For the request itself.
    pub fn whole(&self) -> String {
        let query = self
            .query
            .as_ref()
            .map_or(String::new(), |query| format!("?{query}"));
        format!("{self}{query}")
    }
}

/// Without the query, as it may be shown.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.path)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Host of `authority`, without port and brackets.
pub(crate) fn host(authority: &str) -> &str {
    match authority
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((address, _)) => address,
        None => authority.split(':').next().unwrap_or_default(),
    }
}

/// Whether `authority` is this machine, where nobody listens on the wire.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = host(authority);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// `text` as a value in a query or form.
pub(crate) fn encode(text: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-._~/:".contains(&c);
    text.bytes().fold(String::new(), |mut encoded, c| {
        if plain(c) {
            encoded.push(char::from(c));
        } else {
            encoded.push_str(&format!("%{c:02X}"));
        }
        encoded
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        let here = Url::parse("https://r.example:5000/v2/a/blobs/uploads/?x=1").unwrap();
        for (location, there) in [
            ("/v2/b?_state=s", "https://r.example:5000/v2/b?_state=s"),
            (
                "c-d?e=f:g",
                "https://r.example:5000/v2/a/blobs/uploads/c-d?e=f:g",
            ),
            ("?z=1", "https://r.example:5000/v2/a/blobs/uploads/?z=1"),
            ("//o.example/p", "https://o.example/p"),
            ("http://o.example/p", "http://o.example/p"),
        ] {
            assert_eq!(here.join(location).unwrap().whole(), there);
        }
        for bad in [
            "ftp://x/y",
            "https://u:p@x/y",
            "https://",
            "a b",
            "https:///x",
        ] {
            assert_eq!(here.join(bad), None, "{bad}");
        }
    }

    #[test]
    fn origins() {
        let origin = |a: &str, b: &str| Url::parse(a).unwrap().same_origin(&Url::parse(b).unwrap());
        assert!(origin("https://a/x", "https://A:443/y"));
        assert!(!origin("https://a/x", "https://a:444/x"));
        assert!(!origin("https://a/x", "http://a/x"));
        assert!(!origin("https://a/x", "https://a.b/x"));
        assert!(origin("http://[::1]/", "http://[::1]:80/"));
    }

    #[test]
    fn parameters_and_what_is_shown() {
        let url = Url::parse("https://a/x?secret=1")
            .unwrap()
            .with("digest", "sha256:ab c&d");
        assert_eq!(url.whole(), "https://a/x?secret=1&digest=sha256:ab%20c%26d");
        assert_eq!(url.to_string(), "https://a/x");
    }

    #[test]
    fn loopback() {
        for yes in [
            "localhost",
            "localhost:5",
            "127.0.0.1:5000",
            "127.8.8.8",
            "[::1]:80",
        ] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in [
            "localhost.example",
            "10.0.0.1",
            "[fe80::1]:80",
            "127.0.0.1.example",
            "",
        ] {
            assert!(!is_loopback(no), "{no}");
        }
    }
}
