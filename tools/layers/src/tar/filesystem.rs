// SPDX-License-Identifier: GPL-2.0

//! Making a file system of a tar, by its ordinary tool, into a file without a name.

use std::{
    env,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{sync_channel, Receiver, SyncSender},
    thread::JoinHandle,
};

use sha2::{Digest as _, Sha256};

use super::{members::Odd, original::DiffId, pieces::Extent};
use crate::{
    error::{Error, Result},
    output,
};

/// Parts of the tar that the tool has not taken yet.
const QUEUED: usize = 8;

/// Zeros at the end of an archive, and some for the last block if that is not whole.
const END_BYTES: usize = 3 * 512;

/// Bytes of the blocks of a file system.
const BLOCK_BYTES: u64 = 4096;

/// Inodes of ext4 in a block.
const INODES_PER_BLOCK: u64 = 16;

/// The time of what has no other, for the same bytes from the same tar. mke2fs takes it for the time of files that are newer,
/// too.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// Room for the journal and the like.
const SPARE_BYTES: u64 = 48 << 20;

/// Bytes of what a tool says that are shown.
const SAID_BYTES: u64 = 4096;

/// A file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// EROFS, by mkfs.erofs 1.8 or newer.
    Erofs,
    /// ext4, by mke2fs 1.47.1 or newer with libarchive.
    Ext4,
}

impl Kind {
    /// The program that makes it.
    fn program(self) -> &'static str {
        match self {
            Kind::Erofs => "mkfs.erofs",
            Kind::Ext4 => "mke2fs",
        }
    }

    /// The package that has it.
    fn package(self) -> &'static str {
        match self {
            Kind::Erofs => "erofs-utils",
            Kind::Ext4 => "e2fsprogs",
        }
    }

    /// Its name, as mount and blkid have it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Erofs => "erofs",
            Kind::Ext4 => "ext4",
        }
    }

    /// Whether the tool can go on with the file system of the layers below.
    pub fn goes_over_layers(self) -> bool {
        self == Kind::Erofs
    }

    /// Refuses a member that the tool would leave out, or make another file of, and say nothing.
    ///
    /// # Errors
    ///
    /// Why.
    pub fn check_member(self, odd: Odd) -> std::result::Result<(), String> {
        match (self, odd) {
            // libarchive knows them.
            (Kind::Ext4, _) => Ok(()),
            (Kind::Erofs, Odd::Sparse) => Err(
                "has a sparse file, which mkfs.erofs does not understand (--fs ext4 does)"
                    .to_owned(),
            ),
            (Kind::Erofs, Odd::Kind(kind)) => {
                let kind = char::from(kind).escape_default();
                Err(format!(
                    "has a member of type '{kind}', which mkfs.erofs leaves out"
                ))
            }
        }
    }

    /// Whether a device that starts with `first` holds it.
    pub fn recognise(self, first: &[u8]) -> bool {
        match self {
            Kind::Erofs => first.get(1024..1028) == Some(&[0xe2, 0xe1, 0xf5, 0xe0]),
            Kind::Ext4 => first.get(1080..1082) == Some(&[0x53, 0xef]),
        }
    }
}

/// The folder for large files that nobody sees: where the result goes, unless the user names another.
pub fn scratch_folder(result: &Path) -> PathBuf {
    match env::var_os("TMPDIR") {
        Some(folder) => folder.into(),
        None => output::directory(result).to_owned(),
    }
}

/// What to make a file system of and where.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The file system.
    pub kind: Kind,
    /// A file that is empty, or holds the file system of the layers below.
    pub image: &'a File,
    /// Whether it does.
    pub over_base: bool,
    /// What the UUID of the file system is derived from.
    pub identity: &'a [&'a [u8]],
    /// The file that is the tar, if there is one.
    pub tar: Option<&'a File>,
    /// For files that nobody sees.
    pub folder: &'a Path,
}

/// A tool that takes a tar and makes a file system of it. It is stopped when this is dropped.
pub struct Maker {
    kind: Kind,
    command: Command,
    /// The tool, which for EROFS runs while the tar comes.
    child: Option<Child>,
    /// The parts that the thread takes.
    queue: Option<SyncSender<Vec<u8>>>,
    feeder: Option<JoinHandle<Fed>>,
    said: File,
    /// The tar, where the tool wants all of it before it begins.
    spool: Option<File>,
    image: File,
}

/// What became of the parts of a tar.
type Fed = (io::Result<()>, Sha256);

impl Maker {
    /// Starts the tool, or for one that must know how much there is prepares for it.
    ///
    /// # Errors
    ///
    /// The program is missing, and the system's.
    pub fn start(job: Job<'_>) -> Result<Self> {
        let Job { kind, folder, .. } = job;
        let scratch = || {
            let file = tempfile::tempfile_in(folder);
            file.map_err(|e| Error::io(folder, "create a file in", e))
        };
        let duplicate = |file: &File| {
            let file = file.try_clone();
            file.map_err(|e| Error::io(folder, "open a file in", e))
        };
        let said = scratch()?;
        let uuid = uuid_of(job.identity).hyphenated().to_string();
        let mut command = Command::new(find(kind.program()));
        command.env("LC_ALL", "C").env("TMPDIR", folder);
        command.stdout(Stdio::null());
        command.stderr(duplicate(&said)?);
        let mut maker = Self {
            kind,
            command,
            child: None,
            queue: None,
            feeder: None,
            said,
            spool: None,
            image: duplicate(job.image)?,
        };
        let to: Box<dyn Write + Send> = match kind {
            Kind::Erofs => {
                maker.command.args(erofs_arguments(&uuid, job.over_base));
                maker.command.arg(own_name(&maker.image));
                maker.command.stdin(Stdio::piped());
                let mut child = maker.spawn()?;
                let stdin = child.stdin.take();
                maker.child = Some(child);
                stdin.map_or_else(|| Box::new(io::sink()) as _, |stdin| Box::new(stdin) as _)
            }
            Kind::Ext4 => {
                maker.command.args(ext4_arguments(&uuid));
                maker.command.stdin(Stdio::null());
                let (spool, to): (File, Box<dyn Write + Send>) = match job.tar {
                    Some(tar) => (duplicate(tar)?, Box::new(io::sink())),
                    None => {
                        let spool = scratch()?;
                        let to = duplicate(&spool)?;
                        (spool, Box::new(to))
                    }
                };
                maker.spool = Some(spool);
                to
            }
        };
        let (queue, parts) = sync_channel(QUEUED);
        maker.queue = Some(queue);
        maker.feeder = Some(std::thread::spawn(move || feed(to, &parts)));
        Ok(maker)
    }

    fn spawn(&mut self) -> Result<Child> {
        let path = Path::new(self.kind.program());
        self.command.spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                let package = self.kind.package();
                Error::new(path, format!("is missing (package {package})"))
            }
            _ => Error::io(path, "start", e),
        })
    }

    /// Gives the tool what follows of the tar.
    pub fn feed(&mut self, part: Vec<u8>) {
        // A thread that has ended says why in the end.
        let _ = self.queue.as_ref().map(|queue| queue.send(part));
    }

    /// Waits for the tool, which makes a file system of a tar of this extent; returns the SHA-256 of the tar.
    ///
    /// # Errors
    ///
    /// What it said, if it failed.
    pub fn finish(mut self, extent: Extent) -> Result<DiffId> {
        let path = Path::new(self.kind.program());
        self.queue = None;
        let fed = match self.feeder.take().map(JoinHandle::join) {
            Some(Ok(fed)) => fed,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => return Err(Error::new(path, "was not started")),
        };
        let mut child = match self.child.take() {
            Some(child) => child,
            None => self.start_with(extent)?,
        };
        let status = child.wait();
        let status = status.map_err(|e| Error::io(path, "wait for", e))?;
        if !status.success() {
            let said = self.said().unwrap_or_default();
            let what = match said.lines().find(|line| line.contains("<E>")) {
                Some(line) => line.trim().to_owned(),
                None if said.trim().is_empty() => status.to_string(),
                None => said.trim().to_owned(),
            };
            return Err(Error::new(path, format!("fails: {what}")));
        }
        match fed {
            (Ok(()), hash) => Ok(DiffId(hash.finalize().into())),
            (Err(e), _) => Err(Error::io(path, "write to", e)),
        }
    }

    /// Starts the tool that had to wait for all of the tar.
    fn start_with(&mut self, extent: Extent) -> Result<Child> {
        // An inode for each header is more than enough, and so is a block besides what files have.
        let inodes = extent.headers.saturating_add(1024);
        let blocks = extent.blocks.saturating_add(extent.headers);
        let blocks = blocks.saturating_add(inodes / INODES_PER_BLOCK);
        let bytes = (blocks + blocks / 8).saturating_mul(BLOCK_BYTES);
        let bytes = bytes.saturating_add(SPARE_BYTES).next_multiple_of(1 << 20);
        let path = Path::new(self.kind.program());
        let sized = self.image.set_len(bytes);
        sized.map_err(|e| Error::io(path, "set the size of a file for", e))?;
        self.command.env(EPOCH, extent.newest.max(1).to_string());
        self.command.arg("-N").arg(inodes.to_string());
        if let Some(spool) = &self.spool {
            self.command.arg("-d").arg(own_name(spool));
        }
        self.command.arg(own_name(&self.image));
        self.command.arg((bytes / BLOCK_BYTES).to_string());
        self.spawn()
    }

    /// The beginning of what the tool said.
    fn said(&mut self) -> io::Result<String> {
        let mut said = Vec::new();
        self.said.seek(SeekFrom::Start(0))?;
        (&self.said).take(SAID_BYTES).read_to_end(&mut said)?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(mut child) = self.child.take() {
            // It is of no use any more.
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = self.feeder.take().map(JoinHandle::join);
    }
}

/// A program, also where administration is not in the path.
fn find(program: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let mut places = folders.map(|folder: PathBuf| folder.join(program));
    places
        .find(|place| place.is_file())
        .unwrap_or_else(|| program.into())
}

/// Writes all parts to the tool, and the end of an archive, which not every tar has. The tool may end before it has all: it
/// needs nothing after the end.
fn feed(mut to: Box<dyn Write + Send>, parts: &Receiver<Vec<u8>>) -> Fed {
    let mut hash = Sha256::new();
    let mut result = Ok(());
    let mut write = |part: &[u8]| {
        if let Err(error) = to.write_all(part) {
            to = Box::new(io::sink());
            if error.kind() != io::ErrorKind::BrokenPipe {
                result = Err(error);
            }
        }
    };
    for part in parts {
        write(&part);
        hash.update(&part);
    }
    write(&[0; END_BYTES]);
    (result, hash)
}

/// A name of a file for the tool, which need not have one.
fn own_name(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

/// Tails stay blocks of their own, which are in the tar; only the time of the whole is fixed. Whiteouts are for the layers
/// below.
fn erofs_arguments(uuid: &str, over_base: bool) -> Vec<&str> {
    let mut arguments = vec!["--quiet", "--tar=f", "-b4096", "-Enoinline_data"];
    arguments.extend([
        "-T0",
        "--mkfs-time",
        "-U",
        uuid,
        "--aufs",
        "--ovlfs-strip=1",
    ]);
    if over_base {
        arguments.push("--incremental=data");
    }
    arguments
}

/// Nothing is reserved, and nothing of it depends on the time.
fn ext4_arguments(uuid: &str) -> Vec<String> {
    let extended = format!("lazy_itable_init=1,nodiscard,root_owner=0:0,hash_seed={uuid}");
    let words = "-q -F -t ext4 -b 4096 -I 256 -m 0 -U";
    let words = words.split(' ').map(str::to_owned);
    words
        .chain([uuid.to_owned(), "-E".to_owned(), extended])
        .collect()
}

/// The UUID of a file system, of version 8 (custom).
fn uuid_of(identity: &[&[u8]]) -> uuid::Uuid {
    let mut hash = Sha256::new();
    for part in identity {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    uuid::Uuid::new_v8(bytes)
}
