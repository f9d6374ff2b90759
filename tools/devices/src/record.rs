// SPDX-License-Identifier: GPL-2.0

//! What a COW store says of itself: which generation it is, and what it was written over.
//!
//! dm-snapshot keeps 16 bytes in the first chunk of a store, and writes that chunk only when it makes the store and when
//! the store becomes invalid. The record is at byte 512 of it. A store that dm-snapshot made itself has none.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use uuid::Uuid;
use zerocopy::{
    little_endian::{U32, U64},
    FromBytes, IntoBytes,
};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use ovbd_image::lsmt::UuidText;
use ovbd_layers::{
    direct::Aligned,
    error::{Error, Result as LayersResult},
};
use rustix::fs::OFlags;

/// Bytes of the header of a store and of its record each.
pub const BYTES: usize = 512;

/// Where the record is in a store.
pub const AT: u64 = 512;

const MAGIC: [u8; 8] = *b"OVBD-GEN";
const VERSION: u32 = 1;

/// What a store was written over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// A layer without a UUID.
    Unknown,
    /// The stack with this layer on top.
    Layer(Uuid),
    /// The generation of which the store is this one.
    Store(Uuid),
}

/// What a store says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// That of this store.
    pub own: Uuid,
    /// Number of the generation, which grows.
    pub generation: u32,
    /// Sectors of the device.
    pub sectors: u64,
    /// What it was written over.
    pub below: Below,
    /// The layer that was made of all that is below, down to the stack of that time.
    pub layer: Option<Uuid>,
    /// Whether some of what was written to this store may be in the one below, which is of no single moment then.
    pub folding: bool,
}

/// The record as it is stored.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Stored {
    magic: [u8; 8],
    version: U32,
    /// CRC-32C of the whole, with 0 here.
    checksum: U32,
    generation: U32,
    /// 0: unknown, 1: a layer, 2: a store.
    below_kind: U32,
    sectors: U64,
    own: [u8; 16],
    below: [u8; 16],
    layer: [u8; 16],
    /// 1: it is being folded back.
    folding: U32,
    padding: [u8; 428],
}

/// A record that is damaged, or of another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged;

impl Record {
    /// That of a new store.
    ///
    /// # Errors
    ///
    /// There are no random numbers.
    pub fn new(generation: u32, sectors: u64, below: Below) -> std::io::Result<Self> {
        let mut random = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        Ok(Self {
            own: uuid::Builder::from_random_bytes(random).into_uuid(),
            generation,
            sectors,
            below,
            layer: None,
            folding: false,
        })
    }

    /// As it is stored.
    pub fn to_bytes(self) -> [u8; BYTES] {
        let (kind, below) = match self.below {
            Below::Unknown => (0, Uuid::nil()),
            Below::Layer(uuid) => (1, uuid),
            Below::Store(uuid) => (2, uuid),
        };
        let mut stored = Stored {
            magic: MAGIC,
            version: VERSION.into(),
            checksum: 0.into(),
            generation: self.generation.into(),
            below_kind: kind.into(),
            sectors: self.sectors.into(),
            own: self.own.into_bytes(),
            below: below.into_bytes(),
            layer: self.layer.unwrap_or_default().into_bytes(),
            folding: u32::from(self.folding).into(),
            padding: [0; 428],
        };
        stored.checksum = crc32c::crc32c(stored.as_bytes()).into();
        zerocopy::transmute!(stored)
    }

    /// Reads one; `None` where there is none.
    ///
    /// # Errors
    ///
    /// It is damaged.
    pub fn from_bytes(bytes: &[u8; BYTES]) -> Result<Option<Self>, Damaged> {
        if !bytes.starts_with(&MAGIC) {
            return Ok(None);
        }
        let mut stored = Stored::read_from_bytes(bytes).map_err(|_| Damaged)?;
        let checksum = std::mem::take(&mut stored.checksum);
        if stored.version != VERSION || checksum != crc32c::crc32c(stored.as_bytes()) {
            return Err(Damaged);
        }
        let below = Uuid::from_bytes(stored.below);
        let layer = Uuid::from_bytes(stored.layer);
        Ok(Some(Self {
            own: Uuid::from_bytes(stored.own),
            generation: stored.generation.get(),
            sectors: stored.sectors.get(),
            below: match stored.below_kind.get() {
                0 => Below::Unknown,
                1 => Below::Layer(below),
                2 => Below::Store(below),
                _ => return Err(Damaged),
            },
            layer: Some(layer).filter(|layer| !layer.is_nil()),
            folding: match stored.folding.get() {
                0 => false,
                1 => true,
                _ => return Err(Damaged),
            },
        }))
    }
}

impl Record {
    /// That of the store in a file or on a device, read past the page cache where it is a device: the kernel does not
    /// write through it. `None` where there is none.
    ///
    /// # Errors
    ///
    /// It is damaged, and the system's.
    pub fn read(path: &Path) -> LayersResult<Option<Self>> {
        let file = direct(path, false)?;
        let mut buffer = Aligned::new(BYTES);
        let block = buffer.bytes(BYTES);
        file.read_exact_at(block, AT)
            .map_err(|e| Error::io(path, "read", e).at_byte(AT))?;
        let mut bytes = [0; BYTES];
        bytes.copy_from_slice(block);
        Self::from_bytes(&bytes).map_err(|Damaged| {
            let what = "the record of what the store was written over is damaged";
            Error::new(path, what).at_byte(AT)
        })
    }

    /// Writes it to the device of a store that is in use, and to its disk. dm-snapshot's own sector stays as it is.
    ///
    /// # Errors
    ///
    /// The system's; a device with blocks larger than sectors is one.
    pub fn write(&self, device: &Path) -> LayersResult<()> {
        let file = direct(device, true)?;
        let mut buffer = Aligned::new(BYTES);
        let block = buffer.bytes(BYTES);
        block.copy_from_slice(&self.to_bytes());
        file.write_all_at(block, AT)
            .and_then(|()| file.sync_data())
            .map_err(|e| Error::io(device, "write", e).at_byte(AT))
    }
}

/// Opens a device to be read, or written, past its page cache.
fn direct(path: &Path, write: bool) -> LayersResult<File> {
    let mut options = File::options();
    options.read(true).write(write);
    let is_device = std::fs::metadata(path)
        .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_block_device(&found.file_type()));
    // A file is what a loop device writes to, by whatever way.
    if is_device {
        options.custom_flags(OFlags::DIRECT.bits() as i32);
    }
    options.open(path).map_err(|e| Error::io(path, "open", e))
}

impl Below {
    /// That of the store of a first generation, over a layer of this UUID.
    pub fn layer(uuid: Option<UuidText>) -> Self {
        number(uuid).map_or(Below::Unknown, Below::Layer)
    }
}

/// A layer's UUID as a number: its text can have either case. `None` for a layer without one.
pub fn number(uuid: Option<UuidText>) -> Option<Uuid> {
    let uuid = Uuid::parse_str(uuid?.as_str()).ok()?;
    Some(uuid).filter(|uuid| !uuid.is_nil())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_and_notices_damage() {
        let uuid = Uuid::from_u128;
        for (below, layer) in [
            (Below::Unknown, None),
            (Below::Layer(uuid(1)), None),
            (Below::Store(uuid(2)), Some(uuid(3))),
        ] {
            let record = Record {
                layer,
                folding: layer.is_some(),
                ..Record::new(7, 1 << 40, below).unwrap()
            };
            let bytes = record.to_bytes();
            assert_eq!(Record::from_bytes(&bytes), Ok(Some(record)));
            for at in 8..BYTES {
                let mut bytes = bytes;
                bytes[at] ^= 1;
                assert_eq!(Record::from_bytes(&bytes), Err(Damaged), "byte {at}");
            }
        }
        assert_eq!(Record::from_bytes(&[0; BYTES]), Ok(None));
        let one = |_| Record::new(0, 8, Below::Unknown).unwrap().own;
        assert_ne!(one(0), one(1));
    }

    #[test]
    fn the_case_of_a_layers_uuid_does_not_matter() {
        let upper = UuidText::new(b"ABCDEF00-0000-0000-0000-000000000001");
        let lower = UuidText::new(b"abcdef00-0000-0000-0000-000000000001");
        assert_eq!(number(upper), number(lower));
        assert_eq!(number(Some(UuidText::NIL)), None);
    }
}
