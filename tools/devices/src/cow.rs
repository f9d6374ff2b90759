// SPDX-License-Identifier: GPL-2.0

//! The COW store of a writable stack: what it is on, how large it must be, and whether it can be used.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileExt, FileTypeExt},
    path::{Path, PathBuf},
};

use crate::{
    exceptions::{header, Header, Unusable, HEADER_BYTES, MAGIC, VALID, VERSION},
    loops::Loop,
    plan::{Device, Step, UNNAMED_FOLDER, WIPE_BYTES},
    record::{self, Below, Record},
    recovery, store_files,
};
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    overwrite, signature,
};

/// Sectors of a chunk in a new store: the block of the usual filesystems, so that a layer made of the
/// chunks holds little that was not written.
pub const CHUNK_SECTORS: u32 = 8;

const CHUNK_BYTES: u64 = CHUNK_SECTORS as u64 * 512;
const EXCEPTIONS_PER_CHUNK: u64 = CHUNK_BYTES / 16;

/// A store with less can hold no chunk: header, an area, and data.
const MIN_BYTES: u64 = 4 * CHUNK_BYTES;

/// Where writes go.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A file or block device; without it a file that goes with the stack.
    pub path: Option<PathBuf>,
    /// Bytes of a new file; enough for everything if there is no number.
    pub size: Option<u64>,
}

/// A store that can be used.
#[derive(Debug)]
pub struct Store {
    /// Its file or device; the folder of one without a name.
    pub path: PathBuf,
    /// What must be done first.
    pub steps: Vec<Step>,
    /// The device, once that is done.
    pub device: Device,
    /// Sectors of a chunk.
    pub chunk_sectors: u32,
    /// What it says of itself, or will.
    pub record: Option<Record>,
}

/// The first bytes of a store without exceptions, all others being zeros. With these dm-snapshot writes nothing when it
/// begins to use the store, so that the record stays.
pub fn beginning(chunk_sectors: u32, record: &Record) -> Vec<u8> {
    let mut bytes = vec![0; record::AT as usize];
    let fields = [MAGIC, VALID, VERSION, chunk_sectors];
    for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    bytes.extend_from_slice(&record.to_bytes());
    bytes
}

/// Variable of the loop device.
const VARIABLE: &str = "cow";

impl Store {
    /// Looks at the store for a stack of `origin_sectors`, or at the stores, newest first: an interrupted commit leaves
    /// several. `below` says what they are to be over, which `any_stack` does not demand. `wipe` allows to overwrite what
    /// is not a store.
    ///
    /// # Errors
    ///
    /// One is too small, in use, invalid, holds something else, or is over another stack, and those of reading.
    pub fn prepare(
        options: &Options,
        origin_sectors: u64,
        below: Below,
        any_stack: bool,
        wipe: bool,
        loops: &[Loop],
    ) -> Result<Vec<Self>> {
        let path = options.path.as_deref();
        let later = match path {
            Some(path) => store_files::later(path)?,
            None => Vec::new(),
        };
        if let (Some(path), [first, ..]) = (path, later.as_slice()) {
            if wipe {
                let what = format!("is part of what is written to {}", path.display());
                return Err(Error::new(first, what));
            }
        }
        let found = match path {
            Some(path) => FileId::at(path)?,
            None => None,
        };
        let is_there = found.is_some() || !later.is_empty();
        let Some(path) = path.filter(|_| is_there) else {
            let store = Self::new_file(path, options.size, origin_sectors, below)?;
            return Ok(vec![store]);
        };
        if options.size.is_some() {
            return Err(Error::new(path, "exists, so --size does not apply"));
        }
        let first = found.map(|_| path.to_owned());
        let mut stores = Vec::new();
        for path in first.iter().chain(&later) {
            let new = new_record(path, origin_sectors, below)?;
            stores.push(Self::existing(path, wipe, new, loops)?);
        }
        let mut known = Vec::new();
        for store in &stores {
            match store.record {
                Some(record) => known.push((store.path.clone(), record)),
                // A store of dmsetup, or of before there were records.
                None if stores.len() == 1 => return Ok(stores),
                None => {
                    let what = format!(
                        "says nothing of what it was written over, and there is {} (move one of them)",
                        later[0].display()
                    );
                    return Err(Error::new(&store.path, what));
                }
            }
        }
        let order = recovery::order(&known, below, any_stack)?;
        let mut stores: Vec<Option<Self>> = stores.into_iter().map(Some).collect();
        Ok(order
            .into_iter()
            .filter_map(|at| stores[at].take())
            .collect())
    }

    fn new_file(
        path: Option<&Path>,
        size: Option<u64>,
        origin_sectors: u64,
        below: Below,
    ) -> Result<Self> {
        let bytes = size.unwrap_or_else(|| enough_for(origin_sectors));
        if bytes < MIN_BYTES {
            return Err(Error::new(
                path.unwrap_or(Path::new("--size")),
                format!("a COW store needs at least {MIN_BYTES} bytes"),
            ));
        }
        let record = new_record(path.unwrap_or(Path::new("-")), origin_sectors, below)?;
        Ok(Self {
            path: path.unwrap_or(Path::new(UNNAMED_FOLDER)).to_owned(),
            steps: vec![Step::Cow {
                variable: VARIABLE.to_owned(),
                path: path.map(Path::to_owned),
                create: Some(bytes.next_multiple_of(CHUNK_BYTES)),
                beginning: Some(beginning(CHUNK_SECTORS, &record)),
            }],
            device: Device::Loop(VARIABLE.to_owned()),
            chunk_sectors: CHUNK_SECTORS,
            record: Some(record),
        })
    }

    fn existing(path: &Path, wipe: bool, new: Record, loops: &[Loop]) -> Result<Self> {
        let found = fs::metadata(path).map_err(|e| Error::io(path, "look up", e))?;
        let is_device = found.file_type().is_block_device();
        if !is_device && !found.is_file() {
            let what = "neither a regular file nor a block device";
            return Err(Error::new(path, what));
        }
        if let Some(user) = loops.iter().find(|user| user.is_on(FileId::of(&found))) {
            let node = user.node.display();
            return Err(Error::new(path, format!("in use by {node}")));
        }
        let mut file = match is_device {
            true => overwrite::open_exclusively(path)?,
            false => {
                let file = File::options().read(true).write(true).open(path);
                file.map_err(|e| Error::io(path, "open", e))?
            }
        };
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))
            .map_err(|e| Error::io(path, "find the size", e))?;
        if bytes < MIN_BYTES {
            let what = format!("too small: {bytes} bytes of at least {MIN_BYTES}");
            return Err(Error::new(path, what));
        }
        let mut steps = Vec::new();
        let refuse = |what: &str| {
            let what = format!("{what} (--wipe-cow overwrites it with a new store)");
            Err(Error::new(path, what))
        };
        let holds = |what: &str| format!("holds {what} and no store");
        let (header, found) = read_beginning(&mut file, path)?;
        let mut is_new = true;
        let chunk_sectors = match (header, signature::find(path)?) {
            (Ok(Header::Store(sectors)), _) => {
                is_new = false;
                sectors
            }
            // dm-snapshot takes a store that starts with zeros for a new one, whatever comes after.
            (Ok(Header::New), None) => CHUNK_SECTORS,
            _ if wipe => {
                steps.push(Step::Wipe {
                    path: path.to_owned(),
                    bytes: bytes.min(WIPE_BYTES),
                });
                CHUNK_SECTORS
            }
            (Ok(Header::New), Some(what)) => return refuse(&holds(&what)),
            (Err(Unusable::Store(what)), _) => return refuse(what),
            (Err(Unusable::Other), what) => {
                return refuse(&holds(what.as_deref().unwrap_or("something else")))
            }
        };
        let beginning = is_new.then(|| beginning(CHUNK_SECTORS, &new));
        let record = match is_new {
            true => Some(new),
            false => found,
        };
        let variable = match record.map(|record| record.generation) {
            None | Some(0) => VARIABLE.to_owned(),
            Some(generation) => format!("{VARIABLE}{generation}"),
        };
        let device = if is_device {
            steps.extend(beginning.map(|beginning| Step::Begin {
                path: path.to_owned(),
                beginning,
            }));
            Device::Path(path.to_owned())
        } else {
            steps.push(Step::Cow {
                variable: variable.clone(),
                path: Some(path.to_owned()),
                create: None,
                beginning,
            });
            Device::Loop(variable)
        };
        Ok(Self {
            path: path.to_owned(),
            steps,
            device,
            chunk_sectors,
            record,
        })
    }
}

/// A record for a new store; an error is about `path`.
fn new_record(path: &Path, sectors: u64, below: Below) -> Result<Record> {
    Record::new(0, sectors, below).map_err(|e| Error::io(path, "number", e))
}

/// Header and record. A damaged record of something else than a store is none.
fn read_beginning(
    file: &mut File,
    path: &Path,
) -> Result<(std::result::Result<Header, Unusable>, Option<Record>)> {
    let fail = |e| Error::io(path, "read", e);
    let mut block = [0; HEADER_BYTES];
    io::Seek::rewind(file).map_err(fail)?;
    file.read_exact(&mut block).map_err(fail)?;
    let header = header(&block);
    let mut bytes = [0; record::BYTES];
    file.read_exact_at(&mut bytes, record::AT).map_err(fail)?;
    Ok(match (header, Record::from_bytes(&bytes)) {
        (Ok(Header::Store(_)), Err(_)) => {
            let what = "the record of what the store was written over is damaged";
            (Err(Unusable::Store(what)), None)
        }
        (header, record) => (header, record.unwrap_or(None)),
    })
}

/// Bytes of a store that can hold every chunk of the origin.
pub fn enough_for(origin_sectors: u64) -> u64 {
    let chunks = origin_sectors.div_ceil(CHUNK_SECTORS.into());
    // One more than it fills, because dm-snapshot prepares the next one early.
    let areas = chunks / EXCEPTIONS_PER_CHUNK + 2;
    (1 + chunks + areas).saturating_mul(CHUNK_BYTES)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, process::Command};

    use super::*;
    use crate::test_programs::has;

    const BYTES: u64 = 320 << 20;

    fn prepare(path: &Path, wipe: bool) -> Result<Store> {
        let options = Options {
            path: Some(path.to_owned()),
            size: None,
        };
        let mut stores = Store::prepare(&options, 8, Below::Unknown, false, wipe, &[])?;
        Ok(stores.remove(0))
    }

    /// A file as the tool `program` makes it; `None` where that is not here.
    fn made(folder: &Path, program: &str, words: &[&str]) -> Option<PathBuf> {
        if !has(program) {
            return None;
        }
        let path = folder.join("disk");
        File::create(&path).unwrap().set_len(BYTES).unwrap();
        let words = words.iter().map(|word| match *word {
            "DISK" => path.as_os_str().to_owned(),
            "FOLDER" => folder.join("content").into(),
            word => word.into(),
        });
        let words: Vec<_> = words.collect();
        let output = Command::new(&words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        // Some make the file as short as what they write.
        let file = File::options().write(true).open(&path).unwrap();
        if file.metadata().unwrap().len() < BYTES {
            file.set_len(BYTES).unwrap();
        }
        Some(path)
    }

    #[test]
    fn what_a_tool_made_is_no_empty_store() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::create_dir(folder.join("content")).unwrap();
        fs::write(folder.join("content/file"), "content").unwrap();
        for (words, kind) in [
            (&["mkfs.ext4", "-q", "-F", "DISK"][..], "ext4"),
            (&["mkfs.btrfs", "-q", "-f", "DISK"], "btrfs"),
            (&["mkfs.xfs", "-q", "-f", "DISK"], "xfs"),
            (&["mkfs.vfat", "DISK"], "vfat"),
            (&["mkfs.erofs", "--quiet", "DISK", "FOLDER"], "erofs"),
            (
                &["mksquashfs", "FOLDER", "DISK", "-noappend", "-quiet"],
                "squashfs",
            ),
            (&["mkswap", "-q", "DISK"], "swap"),
            (
                &[
                    "cryptsetup",
                    "-q",
                    "--pbkdf=pbkdf2",
                    "--pbkdf-force-iterations=1000",
                    "luksFormat",
                    "DISK",
                    "/proc/version",
                ],
                "LUKS",
            ),
            (
                &["sh", "-c", "echo 'label: gpt' | sfdisk -q \"$0\"", "DISK"],
                "gpt",
            ),
            (
                &[
                    "xorriso", "-as", "mkisofs", "-quiet", "-o", "DISK", "FOLDER",
                ],
                "iso9660",
            ),
        ] {
            let program = match words {
                ["sh", ..] => "sfdisk",
                words => words[0],
            };
            let Some(path) = made(folder, program, words) else {
                continue;
            };
            let before = fs::read(&path).unwrap();
            let error = prepare(&path, false).unwrap_err().to_string();
            assert!(error.contains(kind), "{error}");
            assert!(error.contains("--wipe-cow"), "{error}");
            assert!(fs::read(&path).unwrap() == before, "{kind}: is untouched");
            let store = prepare(&path, true).unwrap();
            assert!(matches!(
                store.steps[0],
                Step::Wipe {
                    bytes: WIPE_BYTES,
                    ..
                }
            ));
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn signatures_by_hand_and_data_without_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let md = [
            &0xa92b_4efc_u32.to_le_bytes()[..],
            &1_u32.to_le_bytes(),
            &[0; 248],
        ]
        .concat();
        for (at, bytes) in [
            (0, &b"LUKS\xba\xbe\0\x01"[..]),
            (512, b"LABELONE\x01"),
            (4096, &md),
            (0x8001, b"CD001\x01"),
            (16, b"x"),
            (WIPE_BYTES - 1, b"x"),
        ] {
            let file = File::create(&path).unwrap();
            file.set_len(4 << 20).unwrap();
            assert!(prepare(&path, false).is_ok(), "an empty file is taken");
            file.write_all_at(bytes, at).unwrap();
            let error = prepare(&path, false).unwrap_err().to_string();
            assert!(error.contains("--wipe-cow"), "{error}");
        }
        // A store is taken as it is, one that lost writes is not.
        let file = File::create(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        let header: Vec<u8> = [u32::from_le_bytes(*b"SnAp"), 1, 1, 16]
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect();
        file.write_all_at(&header, 0).unwrap();
        assert_eq!(prepare(&path, false).unwrap().chunk_sectors, 16);
        file.write_all_at(&[0], 4).unwrap();
        let error = prepare(&path, false).unwrap_err().to_string();
        assert!(
            error.contains("invalid") && error.contains("--wipe-cow"),
            "{error}"
        );
    }

    #[test]
    fn sizes() {
        assert_eq!(enough_for(8), 4 * 4096);
        assert_eq!(enough_for(8 * 256), (1 + 256 + 3) * 4096);
        assert!(enough_for(u64::MAX) > 1 << 62);
    }
}
