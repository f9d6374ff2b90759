// SPDX-License-Identifier: GPL-2.0

//! What follows the blob in a tar wrapper.

use ovbd_image::tar::{Member, BLOCK_BYTES};

use super::{first_non_zero, Findings};
use crate::{error::Error, file_range::FileRange};

/// Checks the end of the archive: zeros up to a whole block, then two blocks of zeros, and nothing but zeros after
/// them.
pub(super) fn check_end(
    file: &FileRange,
    member: Member,
    is_device: bool,
    findings: &mut Findings<'_>,
) {
    let block = BLOCK_BYTES as u64;
    let end = member.offset.saturating_add(member.bytes);
    let archive = end.next_multiple_of(block).saturating_add(2 * block);
    if file.bytes() < archive {
        let what = format!("cut off: the tar archive has {archive} bytes");
        findings.problem(Error::new(file.path(), what).at_byte(file.bytes()));
    }
    let to = match is_device {
        true => archive.min(file.bytes()),
        false => file.bytes(),
    };
    let found = first_non_zero(end, to, |buffer, at| file.read(buffer, at));
    if let Some(Some(at)) = findings.note(found) {
        let what = "something follows the layer in its tar archive";
        findings.problem(Error::new(file.path(), what).at_byte(at));
    }
}
