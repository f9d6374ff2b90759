// SPDX-License-Identifier: GPL-2.0

//! What a `case.json` says.

use serde::Deserialize;

/// One case.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// `image`, `zfile`, `rw-image` or `turbo-image`.
    pub kind: String,
    /// Bottom first.
    pub layers: Vec<LayerFile>,
    /// Bytes of the device.
    pub virtual_size: u64,
    /// What must happen.
    pub expect: Expect,
    /// How it must fail.
    pub error: Option<Failure>,
    /// Hash of the content, unless that is too large.
    pub sha256: Option<String>,
    /// Hash of the content before it was damaged.
    pub sha256_intact: Option<String>,
    /// Hashes of parts of the content.
    #[serde(default)]
    pub probes: Vec<Probe>,
}

/// The files of one layer.
#[derive(Debug, Deserialize)]
pub struct LayerFile {
    /// A sealed blob.
    pub file: Option<String>,
    /// The blob, gzipped.
    pub stored_as: Option<String>,
    /// The original tar of a TurboOCI layer.
    pub target: Option<String>,
    /// Data file of a writable pair.
    pub data: Option<String>,
    /// Index file of a writable pair.
    pub index: Option<String>,
}

/// What must happen.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Expect {
    /// Reads right.
    Ok,
    /// Fails.
    Error,
    /// Damaged, but the content is intact.
    UndetectedSame,
    /// Damaged without a sign of it.
    UndetectedDifferent,
    /// Valid, although the original library fails.
    OriginalFails,
    /// Valid, although the original library reads it wrong.
    OriginalWrong,
}

/// How a case must fail.
#[derive(Debug, Deserialize)]
pub struct Failure {
    /// When.
    #[serde(rename = "where")]
    pub place: Place,
    /// Ranges of the device, in bytes, of which reads of 4 KiB fail; all others succeed.
    #[serde(default)]
    pub failed_4k_ranges: Vec<(u64, u64)>,
}

/// When a case must fail.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// When the layers are opened.
    Open,
    /// When some ranges are read.
    Read,
}

/// A part of the content and its hash.
#[derive(Debug, Deserialize)]
pub struct Probe {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Its hash.
    pub sha256: Option<String>,
}
