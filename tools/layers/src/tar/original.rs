// SPDX-License-Identifier: GPL-2.0

//! The original tar in a layer: where it is, its digest, and getting it back.

use std::{fmt, path::Path, str::FromStr};

use ovbd_image::lsmt::{self, HEADER_BYTES};
use sha2::{Digest as _, Sha256};

use crate::{
    blob::{Blob, Content},
    error::{Error, Result},
    layer::{read_header, read_trailer},
    output::{Output, Rules, Stream},
    pipeline::{run_and_take_behind, Pool},
    report::Report,
    stack::WINDOW_BYTES,
    zfile::{Cursor, ReadAhead},
};

/// SHA-256 of a tar: what the configuration of an image calls the diff ID of a layer. Written `sha256:` and hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiffId(pub [u8; 32]);

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for DiffId {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refuse = || format!("{text:?} is not sha256: and 64 lower-case hexadecimal digits");
        let hex = text.strip_prefix("sha256:").ok_or_else(refuse)?.as_bytes();
        let lower = |c: &u8| c.is_ascii_digit() || (b'a'..=b'f').contains(c);
        if hex.len() != 64 || !hex.iter().all(lower) {
            return Err(refuse());
        }
        let mut id = [0; 32];
        for (to, pair) in id.iter_mut().zip(hex.chunks(2)) {
            let value = |c: u8| char::from(c).to_digit(16).map_or(0, |digit| digit as u8);
            *to = pair.iter().fold(0, |byte, c| (byte << 4) | value(*c));
        }
        Ok(Self(id))
    }
}

/// The bytes of the tar that the data section of `content`, a layer, begins with; `None` if it says of none.
///
/// # Errors
///
/// No layer, one that says of more than there is, and those of reading.
pub fn tar_bytes(content: &Content) -> Result<Option<u64>> {
    read_header(content)?;
    let trailer = read_trailer(content)?;
    let at = content.bytes() - HEADER_BYTES as u64;
    let block = content.read_array(&mut Cursor::default(), at)?;
    let Some(bytes) = lsmt::tar_bytes(&block) else {
        return Ok(None);
    };
    // The data section ends where the index begins.
    let room = trailer.index_offset.saturating_sub(HEADER_BYTES as u64);
    if bytes > room {
        let what = format!("says of a tar of {bytes} bytes, and has room for {room}");
        return Err(Error::new(content.input().path(), what).at(content.place(at)));
    }
    Ok(Some(bytes))
}

/// The tar of a layer.
pub struct Original<'a> {
    content: &'a Content,
    bytes: u64,
}

impl<'a> Original<'a> {
    /// The tar in `blob`.
    ///
    /// # Errors
    ///
    /// Those of [`tar_bytes`], and a layer without one.
    pub fn of(blob: &'a Blob) -> Result<Self> {
        let content = &blob.content;
        match tar_bytes(content)? {
            Some(bytes) => Ok(Self { content, bytes }),
            None => {
                let what = "holds no original tar (\"ovbd build --from-tar\" makes layers that do)";
                Err(Error::new(content.input().path(), what))
            }
        }
    }

    /// Bytes of the tar.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// SHA-256 of the tar, which is the digest of the layer in the configuration of the original image.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn diff_id(&self, report: &dyn Report) -> Result<DiffId> {
        let mut hash = Sha256::new();
        self.each_window(report, |window| {
            hash.update(window);
            Ok(())
        })?;
        Ok(DiffId(hash.finalize().into()))
    }

    /// Checks that the tar has this digest.
    ///
    /// # Errors
    ///
    /// It has another, and those of reading.
    pub fn check(&self, wanted: DiffId, report: &dyn Report) -> Result<()> {
        let found = self.diff_id(report)?;
        if found != wanted {
            let what = format!("its tar has the digest {found}, not {wanted}");
            return Err(Error::new(self.content.input().path(), what));
        }
        Ok(())
    }

    /// Writes the tar to the file or pipe `path`; of a file nothing is left behind on failure.
    ///
    /// # Errors
    ///
    /// Those of reading and writing, and of [`Output::create_file`].
    pub fn to_file(&self, path: &Path, rules: Rules<'_>, report: &dyn Report) -> Result<()> {
        let output = Output::create_file(path, rules)?;
        self.write(&mut Stream::new(&output, 0), report)?;
        output.finish()
    }

    /// Writes the tar to `stream`.
    ///
    /// # Errors
    ///
    /// Those of reading and writing.
    pub fn write(&self, stream: &mut Stream<'_>, report: &dyn Report) -> Result<()> {
        self.each_window(report, |window| stream.write(window))
    }

    /// Calls `take` with every MiB in order; all threads decompress ahead of it.
    fn each_window(
        &self,
        report: &dyn Report,
        mut take: impl FnMut(&[u8]) -> Result<()> + Send,
    ) -> Result<()> {
        let cursors = Pool::<Cursor>::default();
        let buffers = Pool::<Vec<u8>>::default();
        let read = |window: u64| {
            let at = window * WINDOW_BYTES;
            let mut ahead = ReadAhead::default();
            if let Content::Zfile(zfile) = self.content {
                let from = HEADER_BYTES as u64 + at;
                let to = HEADER_BYTES as u64 + self.bytes.min(at + WINDOW_BYTES);
                zfile.read_ahead(from, to, 0, &mut ahead);
            }
            Ok((at, ahead))
        };
        let decompress = |(at, ahead): (u64, ReadAhead)| {
            let mut data = buffers.take().unwrap_or_default();
            data.resize((self.bytes - at).min(WINDOW_BYTES) as usize, 0);
            cursors.with(
                || Ok::<_, Error>(Cursor::default()),
                |cursor| {
                    cursor.take_ahead(&std::sync::Arc::new(ahead), 0);
                    let read = self
                        .content
                        .read(cursor, &mut data, HEADER_BYTES as u64 + at);
                    cursor.drop_ahead();
                    read
                },
            )?;
            Ok(data)
        };
        let windows = 0..self.bytes.div_ceil(WINDOW_BYTES);
        run_and_take_behind(windows, read, decompress, |data| {
            take(&data)?;
            report.add(data.len() as u64);
            buffers.put(data);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_as_text() {
        let text = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(text.parse::<DiffId>().unwrap().to_string(), text);
        for wrong in [
            "",
            "sha256:",
            &text[7..],
            &text[..70],
            &text.to_uppercase(),
            &text.replace("sha256", "sha512"),
        ] {
            assert!(wrong.parse::<DiffId>().is_err(), "{wrong}");
        }
    }
}
