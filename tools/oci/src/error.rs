// SPDX-License-Identifier: GPL-2.0

//! The error of everything that names an image: which, what is wrong, and which request showed it.

use std::{fmt, io, path::Path};

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of thing went wrong, for those who decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was named is not there.
    Missing,
    /// The registry does not allow it.
    Denied,
    /// What came from outside is not as it must be.
    Invalid,
    /// It may work another time: the network, or a registry that is busy.
    Temporary,
    /// The system refused.
    System,
    /// It is refused as asked for.
    Refused,
    /// Somebody else failed first.
    Cancelled,
}

/// Something is wrong with an image, a blob or a registry. Prints as `<subject>: <what> (<request>)`.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    subject: String,
    what: String,
    request: Option<String>,
    status: Option<u16>,
    kind: Kind,
}

impl Error {
    /// `what` is wrong with `subject`.
    pub fn new(kind: Kind, subject: impl fmt::Display, what: impl Into<String>) -> Self {
        Self {
            subject: subject.to_string(),
            what: what.into(),
            request: None,
            status: None,
            kind,
        }
    }

    /// What came from outside is not as it must be.
    pub fn invalid(subject: impl fmt::Display, what: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, subject, what)
    }

    /// The system refused to `action` ("read", "write", ...) the file at `path`.
    pub fn io(path: &Path, action: &str, source: io::Error) -> Self {
        let what = format!("cannot {action}: {}", message(&source));
        Self::new(Kind::System, path.display(), what)
    }

    /// The same error with the request that showed it: `GET /v2/...`, never with a query.
    pub fn during(self, method: &str, path: &str) -> Self {
        Self {
            request: Some(format!("{method} {path}")),
            ..self
        }
    }

    /// The same error with the status of the answer.
    pub fn with_status(self, status: u16) -> Self {
        Self {
            status: Some(status),
            ..self
        }
    }

    /// What is wrong, without what with.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// What sort of thing went wrong.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Status of the answer, where it was an answer.
    pub fn status(&self) -> Option<u16> {
        self.status
    }
}

/// The system's text without the "(os error N)" that the standard library adds.
pub(crate) fn message(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Text from outside as it may be shown: control characters escaped, and not longer than some lines.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(300)
        .flat_map(|c| {
            let plain = !c.is_control() && c != '\u{202e}';
            plain
                .then_some(c)
                .into_iter()
                .chain((!plain).then(|| c.escape_default()).into_iter().flatten())
        })
        .collect();
    if text.chars().nth(300).is_some() {
        shown.push_str("...");
    }
    shown
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", shown(&self.subject), self.what)?;
        match (&self.request, self.status) {
            (Some(request), Some(status)) => write!(f, " ({request}: status {status})"),
            (Some(request), None) => write!(f, " ({request})"),
            (None, Some(status)) => write!(f, " (status {status})"),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_from_outside_are_escaped_and_short() {
        assert_eq!(shown("plain é"), "plain é");
        assert_eq!(shown("a\x1b[31m\n"), "a\\u{1b}[31m\\n");
        assert!(shown(&"x".repeat(9999)).len() < 310);
        let error = Error::invalid("h/r", "wrong")
            .during("GET", "/v2/")
            .with_status(404);
        assert_eq!(error.to_string(), "h/r: wrong (GET /v2/: status 404)");
    }
}
