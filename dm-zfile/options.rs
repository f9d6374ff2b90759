// SPDX-License-Identifier: GPL-2.0

//! The optional arguments of a table line.

use super::device_mapper::{
    Args,
    CtrError,
    StatusWriter, //
};
use core::fmt::{
    self,
    Write, //
};
use kernel::prelude::*;

/// Blocks in the cache unless the table says otherwise.
const CACHE_BLOCKS: usize = 8;

/// Blocks that the cache may have: 16 MiB at the largest block size.
const MAX_CACHE_BLOCKS: usize = 256;

/// What a table line can choose.
pub(super) struct Options {
    /// Decompress blocks whatever their CRC says.
    pub(super) ignore_crc: bool,
    /// Number of partly read blocks that are kept.
    pub(super) cache_blocks: usize,
    /// First byte of the file on the device.
    pub(super) offset: u64,
}

impl Options {
    /// Parses the group of optional arguments.
    pub(super) fn parse(args: &mut Args<'_>) -> Result<Self, CtrError> {
        let mut options = Self {
            ignore_crc: false,
            cache_blocks: CACHE_BLOCKS,
            offset: 0,
        };
        let mut group = args.group(5, c"Invalid number of optional arguments")?;
        while let Some(option) = group.next_opt() {
            match option.to_bytes() {
                b"ignore_crc" => options.ignore_crc = true,
                b"cache_blocks" => {
                    options.cache_blocks = group.number(c"Invalid number of cache blocks")?;
                    if options.cache_blocks > MAX_CACHE_BLOCKS {
                        return Err(CtrError::invalid(
                            c"Number of cache blocks must be 0 to 256",
                        ));
                    }
                }
                b"offset" => options.offset = group.number(c"Invalid offset")?,
                _ => return Err(CtrError::invalid(c"Unrecognised optional argument")),
            }
        }
        Ok(options)
    }

    /// Writes those that are not the default, as they stand in a table line.
    pub(super) fn write(&self, out: &mut StatusWriter<'_>) -> fmt::Result {
        let cache = self.cache_blocks != CACHE_BLOCKS;
        let offset = self.offset != 0;
        let words = usize::from(self.ignore_crc) + 2 * usize::from(cache) + 2 * usize::from(offset);
        if words != 0 {
            write!(out, " {words}")?;
        }
        if self.ignore_crc {
            out.write_str(" ignore_crc")?;
        }
        if cache {
            write!(out, " cache_blocks {}", self.cache_blocks)?;
        }
        if offset {
            write!(out, " offset {}", self.offset)?;
        }
        Ok(())
    }
}
