// SPDX-License-Identifier: GPL-2.0

//! CRC-32C in the form the formats use: the kernel's `crc32c(seed, ...)`, without inversion.

/// Continues `crc` over `bytes`.
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    // The crate inverts before and after, as iSCSI does.
    !crc32c::crc32c_append(!crc, bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_the_kernels() {
        // The check value of CRC-32C is that of "123456789" with inversion before and after.
        assert_eq!(super::crc32c(!0, b"123456789"), !0xe306_9283);
        assert_eq!(super::crc32c(0, &[0; 64]), 0);
    }
}
