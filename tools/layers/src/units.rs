// SPDX-License-Identifier: GPL-2.0

//! Sizes as people write and read them.

use bytesize::ByteSize;

/// `bytes` for people, in units of 1024: `512 B`, `93.6 MiB`.
pub fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// A number of bytes: `4096`, `4k`, `512M` and `1GiB` are powers of 1024 as in LVM and losetup, `500MB` of 1000.
///
/// # Errors
///
/// What is wrong with it.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    // bytesize takes a single letter for a power of 1000.
    let unit = match unit.len() {
        1 if !unit.eq_ignore_ascii_case("b") => format!("{unit}iB"),
        _ => unit.to_owned(),
    };
    let bytes = format!("{digits}{unit}")
        .parse::<ByteSize>()
        .map_err(|_| format!("{text:?} is no size; 4096, 4k, 512M, 1.5GiB and 500MB are"))?;
    match bytes.as_u64() {
        // Where it ends for what does not fit.
        u64::MAX => Err(format!("{text:?} is too large")),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("5K", 5 << 10),
            ("3GiB", 3 << 30),
            ("1.5G", 3 << 29),
            ("500MB", 500_000_000),
            ("100b", 100),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "M",
            "-1",
            "1X",
            "1e3",
            "99999999999T",
            "99999999999999999999",
            "4 k x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
