// SPDX-License-Identifier: GPL-2.0

//! Making a file system of a tar, by its ordinary tool, into a file without a name.

use std::{
    env,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{sync_channel, Receiver, SyncSender},
    thread::JoinHandle,
};

use sha2::{Digest as _, Sha256};

use super::original::DiffId;
use crate::{
    error::{Error, Result},
    output,
};

/// Parts of the tar that the tool has not taken yet.
const QUEUED: usize = 8;

/// Zeros at the end of an archive, and some for the last block if that is not whole.
const END_BYTES: usize = 3 * 512;

/// Bytes of what a tool says that are shown.
const SAID_BYTES: u64 = 4096;

/// A file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// EROFS, by mkfs.erofs 1.8 or newer.
    Erofs,
}

impl Kind {
    /// The program that makes it.
    fn program(self) -> &'static str {
        match self {
            Kind::Erofs => "mkfs.erofs",
        }
    }

    /// The package that has it.
    fn package(self) -> &'static str {
        match self {
            Kind::Erofs => "erofs-utils",
        }
    }

    /// Its name, as mount and blkid have it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Erofs => "erofs",
        }
    }

    /// Whether a device that starts with `first` holds it.
    pub fn recognise(self, first: &[u8]) -> bool {
        match self {
            Kind::Erofs => first.get(1024..1028) == Some(&[0xe2, 0xe1, 0xf5, 0xe0]),
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

/// A tool that takes a tar and makes a file system of it. It is stopped when this is dropped.
pub struct Maker {
    kind: Kind,
    child: Child,
    /// The parts that the thread gives to the tool.
    queue: Option<SyncSender<Vec<u8>>>,
    feeder: Option<JoinHandle<(io::Result<()>, Sha256)>>,
    said: File,
}

impl Maker {
    /// Starts the tool on `image`, a file that is empty, or holds the file system of the layers below. `identity` is what
    /// the UUID of the file system is derived from; `folder` is for the tool's own files.
    ///
    /// # Errors
    ///
    /// The program is missing, and the system's.
    pub fn start(
        kind: Kind,
        image: &File,
        over_base: bool,
        identity: &[&[u8]],
        folder: &Path,
    ) -> Result<Self> {
        let program = kind.program();
        let path = Path::new(program);
        let said = tempfile::tempfile_in(folder);
        let said = said.map_err(|e| Error::io(folder, "create a file in", e))?;
        let errors = said.try_clone().map_err(|e| Error::io(path, "start", e))?;
        let mut command = Command::new(program);
        let Kind::Erofs = kind;
        // Tails stay blocks of their own, which are in the tar; only the time of the whole is fixed.
        command.args(["--quiet", "--tar=f", "-b4096", "-Enoinline_data"]);
        command.args(["-T0", "--mkfs-time", "-U"]);
        command.arg(uuid_of(identity).hyphenated().to_string());
        // Whiteouts are for the layers below: without any they are names as others.
        command.arg("--aufs");
        if over_base {
            command.arg("--incremental=data");
        }
        command.arg("--ovlfs-strip=1");
        command.arg(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            image.as_raw_fd()
        ));
        command.env("TMPDIR", folder).env("LC_ALL", "C");
        let search = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
        let mut child = command
            .env("PATH", search)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => {
                    let package = kind.package();
                    Error::new(path, format!("is missing (package {package})"))
                }
                _ => Error::io(path, "start", e),
            })?;
        let (queue, parts) = sync_channel(QUEUED);
        let stdin = child.stdin.take();
        let feeder = std::thread::spawn(move || feed(stdin, &parts));
        Ok(Self {
            kind,
            child,
            queue: Some(queue),
            feeder: Some(feeder),
            said,
        })
    }

    /// Gives the tool what follows of the tar.
    pub fn feed(&mut self, part: Vec<u8>) {
        // A thread that has ended says why in the end.
        let _ = self.queue.as_ref().map(|queue| queue.send(part));
    }

    /// Waits for the tool; returns the SHA-256 of the tar.
    ///
    /// # Errors
    ///
    /// What it said, if it failed.
    pub fn finish(mut self) -> Result<DiffId> {
        let path = Path::new(self.kind.program());
        self.queue = None;
        let fed = self.feeder.take().map(JoinHandle::join);
        let status = self.child.wait();
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
            Some(Ok((Ok(()), hash))) => Ok(DiffId(hash.finalize().into())),
            Some(Ok((Err(e), _))) => Err(Error::io(path, "write to", e)),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Err(Error::new(path, "was not started")),
        }
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
        // After `finish` there is nothing of it any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.feeder.take().map(JoinHandle::join);
    }
}

/// Writes all parts to the tool, and the end of an archive, which not every tar has. The tool may end before it has all: it
/// needs nothing after the end.
fn feed(stdin: Option<ChildStdin>, parts: &Receiver<Vec<u8>>) -> (io::Result<()>, Sha256) {
    let mut hash = Sha256::new();
    let mut result = Ok(());
    let mut stdin = stdin;
    let mut write = |part: &[u8]| {
        let written = stdin.as_mut().map(|pipe| pipe.write_all(part));
        if let Some(Err(error)) = written {
            stdin = None;
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
