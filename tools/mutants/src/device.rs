// SPDX-License-Identifier: GPL-2.0

//! The kernel's side: files behind loop devices, mapped devices over them, and direct reads.

use std::{
    fs::File,
    io::{self, ErrorKind, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use anyhow::{bail, Context, Result};
use ovbd_layers::direct::Aligned;
use rustix::fs::OFlags;

/// A file that can be overwritten, and the device that shows it.
pub struct Slot {
    file: File,
    bytes: u64,
    /// Bytes that are not zero.
    used: u64,
    /// Path of the device.
    pub device: String,
}

impl Slot {
    /// Takes `FILE=DEVICE`.
    pub fn open(slot: &str) -> Result<Self> {
        let (file, device) = slot
            .split_once('=')
            .context("a device is named FILE=DEVICE")?;
        let file = File::options().write(true).open(file)?;
        let bytes = file.metadata()?.len();
        Ok(Self {
            file,
            bytes,
            used: bytes,
            device: device.to_owned(),
        })
    }

    /// Puts `blob` at the start, and zeros behind it.
    pub fn write(&mut self, blob: &[u8]) -> io::Result<()> {
        let used = blob.len() as u64;
        if used > self.bytes {
            return Err(ErrorKind::FileTooLarge.into());
        }
        self.file.write_all_at(blob, 0)?;
        let rest = vec![0; self.used.saturating_sub(used) as usize];
        self.file.write_all_at(&rest, used)?;
        self.used = used;
        Ok(())
    }
}

/// Whoever makes mapped devices: the parent, which reads requests from standard output and answers on standard
/// input, a line each. All other lines are for people.
///
/// | request                               | answer                        |
/// |---------------------------------------|-------------------------------|
/// | `create NAME SECTORS TARGET PARAMS`   | `ok NODE` or `refused REASON` |
/// | `remove NAME`                         | `ok`                          |
pub struct Mapper;

impl Mapper {
    fn ask(request: &str) -> Result<String> {
        println!("{request}");
        io::stdout().flush()?;
        let mut answer = String::new();
        if io::stdin().read_line(&mut answer)? == 0 {
            bail!("nobody answers: selftests/hostile/mutants.py has to run this");
        }
        Ok(answer.trim_end().to_owned())
    }

    /// Makes a device of one line of a table; the inner error is the kernel's refusal of that line.
    pub fn create(
        &self,
        name: &'static str,
        sectors: u64,
        target: &str,
        params: &str,
    ) -> Result<std::result::Result<Mapped, String>> {
        let answer = Self::ask(&format!("create {name} {sectors} {target} {params}"))?;
        if let Some(reason) = answer.strip_prefix("refused ") {
            return Ok(Err(reason.to_owned()));
        }
        let node = answer
            .strip_prefix("ok ")
            .with_context(|| format!("answer {answer:?}"))?;
        let direct = OFlags::DIRECT.bits() as i32;
        let file = File::options().read(true).custom_flags(direct).open(node);
        Ok(Ok(Mapped {
            name,
            node: node.to_owned(),
            file: Some(file.with_context(|| node.to_owned())?),
        }))
    }
}

/// A mapped device, which is removed when this is dropped.
pub struct Mapped {
    name: &'static str,
    /// Its path.
    pub node: String,
    file: Option<File>,
}

impl Mapped {
    /// Reads `bytes` from byte `offset`, whole sectors.
    pub fn read<'b>(
        &self,
        buffer: &'b mut Buffer,
        offset: u64,
        bytes: usize,
    ) -> io::Result<&'b [u8]> {
        let buffer = buffer.get(bytes);
        match &self.file {
            Some(file) => file.read_exact_at(buffer, offset)?,
            None => return Err(ErrorKind::NotConnected.into()),
        }
        Ok(buffer)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // A device that is open cannot be removed.
        self.file = None;
        if let Err(e) = Mapper::ask(&format!("remove {}", self.name)) {
            println!("# {}: {e}", self.name);
        }
    }
}

/// Memory for direct reads.
#[derive(Default)]
pub struct Buffer(Aligned);

impl Buffer {
    fn get(&mut self, bytes: usize) -> &mut [u8] {
        // What a read does not fill must not look as if it had.
        let buffer = self.0.bytes(bytes);
        buffer.fill(0xa5);
        buffer
    }
}
