// SPDX-License-Identifier: GPL-2.0

//! Formats that are easily given where a raw image or a layer is meant.

use ovbd_image::{lsmt, tar, zfile};

/// Bytes that [`kind`] looks at.
pub const LOOK_BYTES: usize = 2048;

/// What a file of `bytes` that starts with `first` is, if it is an image that is not raw, or a layer.
pub fn kind(first: &[u8], bytes: u64) -> Option<&'static str> {
    let at = |offset: usize, magic: &[u8]| {
        first
            .get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    if zfile::Header::recognise(first) {
        return Some("a ZFile");
    }
    if lsmt::Header::recognise(first) {
        return Some("an LSMT layer");
    }
    if let Ok(Some(member)) = tar::recognise(first, bytes) {
        let inside = usize::try_from(member.offset)
            .ok()
            .and_then(|start| first.get(start..));
        return match inside {
            Some(blob) if zfile::Header::recognise(blob) || lsmt::Header::recognise(blob) => {
                Some("a layer in a tar wrapper")
            }
            _ => Some("a tar archive"),
        };
    }
    [
        (0, &b"QFI\xfb"[..], "a qcow2 image"),
        (0, b"KDMV", "a VMDK image"),
        (0, b"COWD", "a VMDK image"),
        (
            0,
            b"# Disk DescriptorFile",
            "the descriptor of a VMDK image",
        ),
        (0, b"vhdxfile", "a VHDX image"),
        (0, b"conectix", "a VHD image"),
        (0x40, b"\x7f\x10\xda\xbe", "a VDI image"),
        (0, b"QED\0", "a QED image"),
        (0, b"\x1f\x8b", "a gzip file"),
        (0, b"\xfd7zXZ\0", "an xz file"),
        (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
        (0, b"BZh", "a bzip2 file"),
    ]
    .into_iter()
    .find(|(offset, magic, _)| at(*offset, magic))
    .map(|(_, _, name)| name)
}

#[cfg(test)]
mod tests {
    use super::kind;

    #[test]
    fn kinds() {
        for (first, wanted) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Some("a qcow2 image")),
            (b"KDMV\x01\0\0\0", Some("a VMDK image")),
            (b"ZFile\0\x01\0tuji.yyf@Alibaba", Some("a ZFile")),
            (b"\xeb\x63\x90", None),
            (b"", None),
        ] {
            assert_eq!(kind(first, 4096), wanted);
        }
    }
}
