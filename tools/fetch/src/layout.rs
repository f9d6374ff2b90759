// SPDX-License-Identifier: GPL-2.0

//! Where the blobs of an image are on the device.

/// Bytes to which each blob is filled up with zeros, so that every one begins at a page.
const ALIGNMENT: u64 = 4096;

/// The places of blobs, one after the other.
///
/// # Invariants
///
/// `starts` has one entry more than there are blobs, none is less than the one before, and none exceeds what
/// a file can have (2^63).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    starts: Vec<u64>,
    sizes: Vec<u64>,
}

impl Layout {
    /// That of blobs of `sizes` bytes; nothing where they are more than a device can have.
    pub fn new(sizes: impl IntoIterator<Item = u64>) -> Option<Self> {
        let (mut starts, mut all) = (vec![0_u64], Vec::new());
        let mut end = 0_u64;
        for size in sizes {
            end = end
                .checked_add(size)?
                .checked_next_multiple_of(ALIGNMENT)
                .filter(|end| *end <= 1 << 62)?;
            starts.push(end);
            all.push(size);
        }
        Some(Self { starts, sizes: all })
    }

    /// Bytes of the device.
    pub fn bytes(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// First byte and bytes of a blob.
    pub fn place(&self, blob: usize) -> Option<(u64, u64)> {
        Some((*self.starts.get(blob)?, *self.sizes.get(blob)?))
    }

    /// The blob that byte `at` of the device belongs to, or the zeros after it.
    pub fn blob_at(&self, at: u64) -> Option<usize> {
        let blob = self.starts.partition_point(|start| *start <= at);
        // Of several that begin there only the last has bytes.
        blob.checked_sub(1).filter(|blob| *blob < self.sizes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_follow_each_other() {
        let layout = Layout::new([1, 4096, 0, 4097]).unwrap();
        assert_eq!(layout.bytes(), 4096 + 4096 + 8192);
        assert_eq!(layout.place(0), Some((0, 1)));
        assert_eq!(layout.place(1), Some((4096, 4096)));
        assert_eq!(layout.place(2), Some((8192, 0)));
        assert_eq!(layout.place(3), Some((8192, 4097)));
        assert_eq!(layout.place(4), None);
        for (at, blob) in [
            (0, 0),
            (4095, 0),
            (4096, 1),
            (8191, 1),
            (8192, 3),
            (16383, 3),
        ] {
            assert_eq!(layout.blob_at(at), Some(blob), "{at}");
        }
        assert_eq!(layout.blob_at(16384), None);
        assert_eq!(Layout::new([u64::MAX]), None);
        assert_eq!(Layout::new([1 << 62, 1]), None);
    }
}
