// SPDX-License-Identifier: GPL-2.0

//! Taking a few files with known names out of a tar that somebody else made.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use ovbd_image::tar::{member_name, MemberHeader, BLOCK_BYTES};

use super::source::TarSource;
use crate::{
    error::{Error, Result},
    report::Report,
};

/// Copies those regular files of `tar`, which may be compressed and has `max_bytes` at most, that have one of `names` into
/// `folder`, under that name. Returns for each name the file that was made, where there is one.
///
/// # Errors
///
/// Those of [`TarSource::each_window`], one that ends inside such a file, and those of writing.
pub fn unpack_files(
    tar: &Path,
    names: &[&str],
    folder: &Path,
    max_bytes: u64,
    report: &dyn Report,
) -> Result<Vec<Option<PathBuf>>> {
    let source = TarSource::open(tar)?;
    let mut found: Vec<Option<PathBuf>> = vec![None; names.len()];
    // Of the content that goes by: the file it belongs to, the bytes that are left, and the bytes with what fills the last
    // block.
    let mut open: Option<(File, PathBuf)> = None;
    let (mut bytes, mut padded) = (0_u64, 0_u64);
    source.each_window(max_bytes, report, |mut window| {
        while !window.is_empty() {
            if padded > 0 {
                let (now, rest) = window.split_at(padded.min(window.len() as u64) as usize);
                let content = &now[..bytes.min(now.len() as u64) as usize];
                if let Some((file, path)) = &mut open {
                    file.write_all(content)
                        .map_err(|e| Error::io(path, "write", e))?;
                }
                bytes -= content.len() as u64;
                padded -= now.len() as u64;
                window = rest;
                continue;
            }
            open = None;
            let Some((block, rest)) = window.split_first_chunk::<BLOCK_BYTES>() else {
                return Ok(());
            };
            window = rest;
            let Some(header) = MemberHeader::parse(block) else {
                continue;
            };
            if matches!(header.kind, b'1'..=b'6') {
                continue;
            }
            bytes = header.bytes;
            padded = bytes
                .checked_next_multiple_of(BLOCK_BYTES as u64)
                .unwrap_or(u64::MAX);
            let name = member_name(block);
            let name = name.strip_prefix(b"./").unwrap_or(name);
            let place = names.iter().position(|wanted| wanted.as_bytes() == name);
            if let (Some(place), b'0' | 0) = (place, header.kind) {
                let path = folder.join(names[place]);
                let file = File::create(&path).map_err(|e| Error::io(&path, "create", e))?;
                found[place] = Some(path.clone());
                open = Some((file, path));
            }
        }
        Ok(())
    })?;
    if bytes > 0 && open.is_some() {
        return Err(Error::new(tar, "is cut off inside a member"));
    }
    Ok(found)
}
