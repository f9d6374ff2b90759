// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Why a blob is refused, and where.
//!
//! One reason has one text, as a `str` for the tools and as a `CStr` for the error field of a
//! device-mapper target. The offset counts bytes from the start of the blob that the parser was given;
//! a caller that looks through a wrapper or a decompressor moves it with [`Error::shifted`].

use core::{ffi::CStr, fmt};

/// Something in a blob that is not as the format demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    reason: Reason,
    offset: u64,
}

impl Error {
    /// `reason` was found at byte `offset` of the blob.
    pub const fn new(reason: Reason, offset: u64) -> Self {
        Self { reason, offset }
    }

    /// What is wrong.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Byte of the blob at which it was found.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The same error seen from a file in which the blob starts at byte `by`.
    pub fn shifted(self, by: u64) -> Self {
        Self {
            offset: self.offset.saturating_add(by),
            ..self
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.reason.as_str(), self.offset)
    }
}

impl core::error::Error for Error {}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What is wrong with a blob.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// The reason as text.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$name => $text,)*
                }
            }

            /// The reason as text for a C interface.
            pub const fn as_cstr(self) -> &'static CStr {
                match self {
                    $(Reason::$name => {
                        const TEXT: &CStr = match CStr::from_bytes_with_nul(
                            concat!($text, "\0").as_bytes(),
                        ) {
                            Ok(text) => text,
                            Err(_) => panic!("a reason contains a NUL byte"),
                        };
                        TEXT
                    })*
                }
            }
        }
    };
}

reasons! {
    /// The file cannot hold a header and a trailer.
    LsmtTooShort = "file too short for an LSMT layer",
    /// First bytes of the header.
    LsmtHeaderMagic = "not an LSMT layer (wrong header magic)",
    /// Bit 0 of the header's flags is clear.
    LsmtHeaderType = "LSMT header is not marked as header",
    /// Bit 1 of the header's flags is clear.
    LsmtHeaderIndexFile = "LSMT header belongs to an index file, not to a layer",
    /// First bytes of the trailer.
    LsmtTrailerMagic = "wrong LSMT trailer magic (truncated or not sealed)",
    /// Bit 0 of the trailer's flags is set.
    LsmtTrailerType = "LSMT trailer is marked as header",
    /// Bit 1 of the trailer's flags is clear.
    LsmtTrailerIndexFile = "LSMT trailer belongs to an index file",
    /// Bit 2 of the trailer's flags is clear.
    LsmtUnsealed = "LSMT layer is not sealed",
    /// More than [`lsmt::MAX_LAYER_ENTRIES`](super::lsmt::MAX_LAYER_ENTRIES).
    LsmtTooManyEntries = "too many LSMT index entries",
    /// The index starts in the header or off a sector boundary.
    LsmtIndexOffset = "LSMT index offset inside the header or not a multiple of 512",
    /// The index does not end before the trailer.
    LsmtIndexOutside = "LSMT index reaches beyond the trailer",
    /// A virtual size whose sectors an entry cannot address.
    LsmtVirtualSize = "LSMT virtual size too large",
    /// Entries are unsorted or overlap.
    LsmtOrder = "LSMT index entries overlap or are not sorted",
    /// An entry ends beyond the last sector that a stack can have.
    LsmtEntryOutside = "LSMT index entry beyond the largest virtual size",
    /// The data of an entry is not in the data section.
    LsmtDataOutside = "LSMT index entry with data outside the data section",
    /// The index ended early, or its bytes were not whole entries.
    LsmtIndexTruncated = "LSMT index truncated",
    /// The entries of a layer refer to a target file.
    TurboLayer = "TurboOCI layer (its data is in a target tar), not supported",
    /// Bit 4 of the flags of an unsealed data file.
    SparseLayer = "sparse writable layer, not supported",
    /// The index of a writable pair is sealed, or a data file.
    LogType = "not the index file of a writable layer",
    /// The log of a writable pair starts elsewhere than at byte 4096.
    LogOffset = "index of a writable layer does not start at byte 4096",
    /// A log of more entries than are accepted.
    LogTooManyEntries = "too many entries in the index of a writable layer",
    /// The file cannot hold a header.
    ZfileTooShort = "file too short for a ZFile",
    /// First bytes of the header.
    ZfileHeaderMagic = "not a ZFile (wrong header magic)",
    /// Bit 0 of the header's flags is clear.
    ZfileHeaderType = "ZFile header is not marked as header",
    /// Bit 1 of the flags is clear.
    ZfileIndexFile = "ZFile header or trailer belongs to an index file",
    /// The digest of the header.
    ZfileHeaderDigest = "ZFile header digest mismatch",
    /// First bytes of the trailer.
    ZfileTrailerMagic = "wrong ZFile trailer magic (truncated?)",
    /// Bit 0 of the trailer's flags is set.
    ZfileTrailerType = "ZFile trailer is marked as header",
    /// Bit 2 of the trailer's flags is clear.
    ZfileUnsealed = "ZFile is not sealed",
    /// The digest of the trailer.
    ZfileTrailerDigest = "ZFile trailer digest mismatch",
    /// Bit 5 of the flags.
    ZfileCompressedIndex = "ZFile with a compressed jump table, not supported",
    /// A dictionary is announced.
    ZfileDictionary = "ZFile with a dictionary, not supported",
    /// Neither lz4 nor zstd.
    ZfileAlgorithm = "unknown ZFile compression algorithm",
    /// Not a power of two up to 65536.
    ZfileBlockSize = "ZFile block size is not a power of two up to 65536",
    /// More than [`zfile::MAX_BLOCKS`](super::zfile::MAX_BLOCKS).
    ZfileTooManyBlocks = "too many ZFile blocks",
    /// Jump table entries differ from blocks of the original size.
    ZfileBlockCount = "number of ZFile jump table entries does not match the original size",
    /// The jump table is not where it must be.
    ZfileIndexOutside = "ZFile jump table outside the file",
    /// The CRC of the jump table.
    ZfileIndexCrc = "ZFile jump table CRC mismatch",
    /// The jump table ended early, or its bytes were not whole entries.
    ZfileIndexTruncated = "ZFile jump table truncated",
    /// An entry too small to hold any compressed data.
    ZfileBlockTooSmall = "ZFile block without compressed data",
    /// An entry larger than a compressor can make of a block.
    ZfileBlockTooLarge = "ZFile block larger than a compressed block can be",
    /// A block reaches into the jump table.
    ZfileBlockOutside = "ZFile block beyond the start of the jump table",
    /// The CRC after a block.
    ZfileBlockCrc = "ZFile block CRC mismatch",
    /// The decompressor failed or gave another length.
    ZfileBlockData = "ZFile block does not decompress to its length",
    /// The wrapper's extended header is not one block of records.
    TarPax = "tar extended header is not understood",
    /// The wrapper announces more than there is.
    TarTruncated = "tar member reaches beyond the end of the file",
    /// The wrapper holds something other than a file.
    TarType = "first tar member is not a regular file",
}
