// SPDX-License-Identifier: GPL-2.0

//! Finding zeros in data.

/// Bytes that are zero or not as a whole: the block of the usual filesystems.
pub const GRANULE_BYTES: usize = 4096;

static ZEROS: [u8; GRANULE_BYTES] = [0; GRANULE_BYTES];

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // A comparison of memory is the fastest safe way to look at every byte.
    bytes
        .chunks(GRANULE_BYTES)
        .all(|chunk| chunk == &ZEROS[..chunk.len()])
}

/// Calls `found` with every run of granules that are not zero: the byte in `data` where it starts, and
/// the run.
pub fn non_zero_runs<E>(
    data: &[u8],
    mut found: impl FnMut(usize, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut start = None;
    for (i, granule) in data.chunks(GRANULE_BYTES).enumerate() {
        let at = i * GRANULE_BYTES;
        match (start, is_zero(granule)) {
            (None, false) => start = Some(at),
            (Some(from), true) => {
                found(from, &data[from..at])?;
                start = None;
            }
            _ => {}
        }
    }
    match start {
        Some(from) => found(from, &data[from..]),
        None => Ok(()),
    }
}
