// SPDX-License-Identifier: GPL-2.0

//! dm-verity over a sealed stack: every block that is read is checked against one root hash, which does not come from the
//! stack.
//!
//! Where tree and data are, and what is hashed, a superblock in the stack says. Nothing of that is believed: with anything
//! else than what was sealed the hashes do not lead to the root.

use std::{
    fmt::{self, Write as _},
    fs,
    path::Path,
    str::FromStr,
};

use linux_keyutils::{KeyRing, KeyRingIdentifier};
use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_kernel::dm::Line;
use ovbd_layers::{
    error::{Error, Result},
    layer::LayerPath,
    parents::Parents,
    stack::Stack,
    verity::{Geometry, Superblock},
};

use crate::{
    plan::{Device, Word},
    programs::run,
};

/// What a stack is checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The hash.
    pub digest: Vec<u8>,
    /// Bytes of the image, which is where the superblock is; without it, where a stack of its size has it.
    pub data_bytes: Option<u64>,
}

impl FromStr for Root {
    type Err = &'static str;

    /// `HASH` or `HASH:BYTES`; the hash in hexadecimal digits.
    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let (digits, bytes) = match text.split_once(':') {
            Some((digits, bytes)) => (digits, Some(bytes)),
            None => (text, None),
        };
        let digest = from_hex(digits).filter(|digest| (16..=64).contains(&digest.len()));
        Ok(Self {
            digest: digest.ok_or("not a root hash, which are at least 32 hexadecimal digits")?,
            data_bytes: match bytes {
                Some(bytes) => Some(bytes.parse().map_err(|_| {
                    "after the colon there must be the bytes of the image, a number"
                })?),
                None => None,
            },
        })
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.digest))?;
        match self.data_bytes {
            Some(bytes) => write!(f, ":{bytes}"),
            None => Ok(()),
        }
    }
}

/// How a stack is checked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Against what.
    pub root: Root,
    /// A signature of the root for the kernel: PKCS#7 in DER, of its hexadecimal digits.
    pub signature: Option<Vec<u8>>,
}

/// Most bytes that a key of the kernel can have.
pub const MAX_SIGNATURE: u64 = 32767;

/// What dm-verity is told of a stack.
#[derive(Debug)]
pub struct Checked {
    superblock: Superblock,
    /// Where the superblock is, in blocks of the tree.
    at: u64,
    digest: Vec<u8>,
    /// Description of the key with the signature.
    key: Option<String>,
}

impl Checked {
    /// Looks for the superblock in the stack of `layers`, for the device `name`.
    ///
    /// # Errors
    ///
    /// There is none, and those of reading.
    pub fn new(
        name: &str,
        layers: &[LayerPath],
        parents: Parents,
        options: &Options,
    ) -> Result<Self> {
        let stack = Stack::open(layers, parents)?;
        let (superblock, at) = find_superblock(&stack, &options.root)?;
        if options.signature.is_none() && signatures_are_required() {
            let top = stack.top().map_or(Path::new("-"), |layer| layer.path());
            let what =
                "the kernel demands a signature of the root (dm_verity.require_signatures): \
                        --signature gives it";
            return Err(Error::new(top, what));
        }
        Ok(Self {
            at: at / u64::from(superblock.hash_block_bytes),
            superblock,
            digest: options.root.digest.clone(),
            key: options.signature.as_ref().map(|_| key_of(name)),
        })
    }

    /// Sectors of what is checked.
    pub fn sectors(&self) -> u64 {
        let sectors = u64::from(self.superblock.data_block_bytes) / SECTOR_BYTES;
        self.superblock.data_blocks.saturating_mul(sectors)
    }

    /// The table of dm-verity over the sealed stack `below` (Documentation/admin-guide/device-mapper/verity.rst).
    pub fn words(&self, below: &Device) -> Vec<Word> {
        let superblock = &self.superblock;
        let salt = match superblock.salt.as_slice() {
            [] => "-".to_owned(),
            salt => hex(salt),
        };
        let mut words: Vec<Word> = vec![
            "verity".into(),
            u64::from(superblock.hash_type).into(),
            below.clone().into(),
            below.clone().into(),
            u64::from(superblock.data_block_bytes).into(),
            u64::from(superblock.hash_block_bytes).into(),
            superblock.data_blocks.into(),
            // The tree begins in the block behind the superblock.
            (self.at + 1).into(),
            superblock.algorithm.as_str().into(),
            hex(&self.digest).as_str().into(),
            salt.as_str().into(),
        ];
        if let Some(key) = &self.key {
            words.extend([2.into(), KEY_OPTION.into(), key.as_str().into()]);
        }
        words
    }
}

/// The superblock of the hash tree in a stack, and the byte where it is.
fn find_superblock(stack: &Stack, root: &Root) -> Result<(Superblock, u64)> {
    let top = stack.top().map_or(Path::new("-"), |layer| layer.path());
    let fail = |what: String| Err(Error::new(top, what));
    let guessed = Geometry::of_sealed(stack.virtual_bytes()).map(|found| found.data_bytes());
    let Some(at) = root.data_bytes.or(guessed) else {
        return fail(
            "the stack is not sealed: its size is not one with a hash tree (\"ovbd seal\" \
                 makes one; --verity ROOT:BYTES says where another is)"
                .to_owned(),
        );
    };
    let mut found = vec![0; Superblock::BYTES];
    let end = at.checked_add(Superblock::BYTES as u64);
    if at % SECTOR_BYTES == 0 && end.is_some_and(|end| end <= stack.virtual_bytes()) {
        stack.reader().read(&mut found, at)?;
    }
    let superblock = match Superblock::parse(&found) {
        Ok(Some(superblock)) => superblock,
        Ok(None) => {
            let what = format!(
                "the stack is not sealed: no superblock of dm-verity at byte {at} (is the seal \
                     the topmost layer?)"
            );
            return fail(what);
        }
        Err(what) => return fail(what.to_owned()),
    };
    let block = u64::from(superblock.hash_block_bytes);
    let data_bytes = superblock.data_bytes();
    if at % block != 0 || !data_bytes.is_some_and(|bytes| (1..=at).contains(&bytes)) {
        return fail("the superblock of the hash tree is of another image".to_owned());
    }
    if root.data_bytes.is_some() && data_bytes != Some(at) {
        let what = format!(
            "the hash tree is of {} bytes, and the root of {at}",
            data_bytes.unwrap_or_default()
        );
        return fail(what);
    }
    // The root is the digest of the highest block of the tree, or of the only block that there is.
    let (top_at, top_bytes) = match superblock.data_blocks {
        1 => (0, superblock.data_block_bytes),
        _ => (at + block, superblock.hash_block_bytes),
    };
    let mut highest = vec![0; top_bytes as usize];
    if top_at + u64::from(top_bytes) <= stack.virtual_bytes() {
        stack.reader().read(&mut highest, top_at)?;
    }
    let found = superblock.digest(&highest);
    if found.is_some_and(|found| found != *root.digest) {
        return fail(
            "the root of the hash tree is another: the layers are not those that were sealed, or \
                 the root hash is of another stack"
                .to_owned(),
        );
    }
    Ok((superblock, at))
}

/// Bytes of the image in the sealed stack of `layers`, whose tree has that root hash as far as that can be seen at once.
///
/// # Errors
///
/// As [`Checked::new`].
pub fn data_bytes(layers: &[LayerPath], parents: Parents, root: &Root) -> Result<u64> {
    let stack = Stack::open(layers, parents)?;
    let (superblock, at) = find_superblock(&stack, root)?;
    Ok(superblock.data_bytes().unwrap_or(at))
}

/// The option that names the key with the signature.
pub const KEY_OPTION: &str = "root_hash_sig_key_desc";

/// Description of the key with the signature for the device `name`.
pub fn key_of(name: &str) -> String {
    format!("ovbd:{name}")
}

/// Says of an error of making a device with `table` that it is about the signature, where there is one.
pub fn explain(table: &[Line], error: Error) -> Error {
    let signed = |line: &Line| line.kind == "verity" && line.text.contains(KEY_OPTION);
    if !table.iter().any(signed) {
        return error;
    }
    let what = format!(
        "the kernel does not accept the signature of the root hash: {}",
        error.what()
    );
    Error::new(error.path(), what)
}

/// Whether dm-verity takes no root without a signature.
pub fn signatures_are_required() -> bool {
    let module = Path::new("/sys/module/dm_verity");
    if !module.exists() {
        // Its parameters may be on the kernel's command line. Where it cannot be loaded the kernel says so later.
        let _ = run("modprobe", ["dm-verity"]);
    }
    let found = fs::read(module.join("parameters/require_signatures"));
    found.is_ok_and(|text| text.starts_with(b"Y"))
}

/// Gives the kernel a signature, for this thread and those that it starts from now on.
///
/// # Errors
///
/// Those of the kernel.
pub fn add_key(description: &str, signature: &[u8]) -> Result<()> {
    let path = Path::new("/proc/keys");
    let fail = |e: linux_keyutils::KeyError| {
        let what = format!("cannot give the kernel the signature {description}: {e}");
        Error::new(path, what)
    };
    // It goes with the process.
    let ring = KeyRing::from_special_id(KeyRingIdentifier::Process, true).map_err(fail)?;
    ring.add_key(description, signature).map_err(fail)?;
    Ok(())
}

/// Hexadecimal digits of bytes.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn from_hex(digits: &str) -> Option<Vec<u8>> {
    if digits.len() % 2 != 0 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let bytes = digits.as_bytes().chunks_exact(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    bytes.map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_read_as_they_are_written() {
        for text in [
            "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef:4096",
        ] {
            assert_eq!(text.parse::<Root>().unwrap().to_string(), text);
        }
        let digits = "ab".repeat(32);
        for wrong in ["", "ab", "+a", ":1"] {
            assert!(wrong.parse::<Root>().is_err(), "{wrong}");
        }
        for wrong in [":", ":-1", ":1k", ":18446744073709551616", "a", "g"] {
            assert!(
                format!("{digits}{wrong}").parse::<Root>().is_err(),
                "{wrong}"
            );
        }
    }
}
