// SPDX-License-Identifier: GPL-2.0

//! The error of everything that touches a file: which file, what is wrong, and at which byte.

use std::{
    fmt::{self, Write},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Something is wrong with a file. Prints as `<path>: <what> at byte <offset>`.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    path: PathBuf,
    what: String,
    at: Option<Place>,
    #[source]
    source: Option<io::Error>,
}

/// A byte of a file, or of what a compressed file decompresses to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Byte of the file.
    File(u64),
    /// Byte of the uncompressed content.
    Content(u64),
}

impl Error {
    /// `what` is wrong with the file at `path`.
    pub fn new(path: &Path, what: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            what: what.into(),
            at: None,
            source: None,
        }
    }

    /// The system refused to `action` ("read", "write", ...).
    pub fn io(path: &Path, action: &str, source: io::Error) -> Self {
        Self {
            path: path.to_owned(),
            what: format!("cannot {action}: {}", message(&source)),
            at: None,
            source: Some(source),
        }
    }

    /// The blob at `path` is not as its format demands.
    pub fn format(path: &Path, error: ovbd_image::Error, at: Place) -> Self {
        Self::new(path, error.reason().as_str()).at(at)
    }

    /// The same error at a byte.
    pub fn at(self, at: Place) -> Self {
        Self {
            at: Some(at),
            ..self
        }
    }

    /// The same error at a byte of the file.
    pub fn at_byte(self, offset: u64) -> Self {
        self.at(Place::File(offset))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is wrong, without file and byte.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Where it is wrong.
    pub fn place(&self) -> Option<Place> {
        self.at
    }

    /// What the system said, where it was the system.
    pub fn io_error(&self) -> Option<&io::Error> {
        self.source.as_ref()
    }
}

/// The system's text without the "(os error N)" that the standard library adds.
fn message(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// A path as it can be printed: [`escaped`], and bytes that are no text are written as their codes.
pub fn name(path: &Path) -> impl fmt::Display + '_ {
    struct Name<'a>(&'a Path);

    impl fmt::Display for Name<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            for chunk in self.0.as_os_str().as_bytes().utf8_chunks() {
                escaped(chunk.valid()).fmt(f)?;
                for byte in chunk.invalid() {
                    write!(f, "\\x{byte:02x}")?;
                }
            }
            Ok(())
        }
    }

    Name(path)
}

/// A text as it can be printed in a line: what could move the cursor, end the line or turn the direction of writing is
/// written as its code. A text that is escaped already stays as it is.
pub fn escaped(text: &str) -> impl fmt::Display + '_ {
    struct Escaped<'a>(&'a str);

    impl fmt::Display for Escaped<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            for c in self.0.chars() {
                let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
                match c.is_control() || turns {
                    true => write!(f, "{}", c.escape_default())?,
                    false => f.write_char(c)?,
                }
            }
            Ok(())
        }
    }

    Escaped(text)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", name(&self.path))?;
        escaped(&self.what).fmt(f)?;
        match self.at {
            Some(Place::File(offset)) => write!(f, " at byte {offset}"),
            Some(Place::Content(offset)) => {
                write!(f, " at byte {offset} of the uncompressed content")
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    use super::*;

    #[test]
    fn names_cannot_write_to_a_terminal() {
        for (raw, printed) in [
            (&b"plain \xc3\xa4.img"[..], "plain \u{e4}.img"),
            (b"a\nb\x1b[31m\r", "a\\nb\\u{1b}[31m\\r"),
            (b"x\xff\x80y", "x\\xff\\x80y"),
            (b"\xe2\x80\xaegpj", "\\u{202e}gpj"),
        ] {
            let path = Path::new(OsStr::from_bytes(raw));
            assert_eq!(name(path).to_string(), printed);
            let error = Error::new(path, "what\n").at_byte(1).to_string();
            assert_eq!(error, format!("{printed}: what\\n at byte 1"));
            assert_eq!(escaped(&error).to_string(), error, "it is escaped once");
        }
    }
}
