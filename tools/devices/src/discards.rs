// SPDX-License-Identifier: GPL-2.0

//! Whether the kernel's dm-snapshot can discard what is in its store.
//!
//! With the option for that, kernels without `upstream/0002-dm-snapshot-*.patch` divide by zero as soon as a table with
//! chunks of less than 256 KiB is loaded: they take the sectors of a chunk for the bytes of a discard. With chunks of 256
//! KiB they only have a wrong granularity. So a device with such chunks, over and in memory, tells them apart, of any
//! version.

use std::{fs, path::Path};

use ovbd_kernel::{
    dm::{Control, Line},
    loops::Part,
};
use rustix::fs::MemfdFlags;

use crate::{loops::attach, mapped::Mapper, running::Role};
use ovbd_layers::error::{Error, Result};

/// What dm-snapshot calls it.
pub const FEATURE: &str = "discard_zeroes_cow";

/// The smallest chunk with which no kernel divides by zero.
const CHUNK_SECTORS: u64 = 512;

/// Whether it can; it cannot where that does not show. The device for that is beside those of the stack `name`.
pub fn are_possible(control: &Control, name: &str) -> bool {
    let granularity = granularity(control, name);
    tracing::debug!(?granularity, "bytes of a discard in chunks of 256 KiB");
    granularity.is_ok_and(|bytes| bytes == CHUNK_SECTORS * 512)
}

/// Bytes of a discard of a snapshot with such chunks.
fn granularity(control: &Control, name: &str) -> Result<u64> {
    let memory = || {
        let path = Path::new("memfd");
        let file = rustix::fs::memfd_create("discards", MemfdFlags::CLOEXEC)
            .map_err(|e| Error::io(path, "create", e.into()))?;
        let file = fs::File::from(file);
        file.set_len(4 * CHUNK_SECTORS * 512)
            .map_err(|e| Error::io(path, "set the size of", e))?;
        attach(&file, path, true, Part::ALL)
    };
    let (origin, store) = (memory()?, memory()?);
    let table = [Line {
        start: 0,
        sectors: 2 * CHUNK_SECTORS,
        kind: "snapshot".to_owned(),
        text: format!(
            "{} {} N {CHUNK_SECTORS} 1 {FEATURE}",
            origin.number, store.number
        ),
    }];
    let (uuid, probe) = (
        Role::Probe.device_uuid(name, None),
        Role::Probe.device_name(name),
    );
    let node = ovbd_kernel::dm::node(&probe);
    let mapper = Mapper::new(control)?;
    let number = mapper.create(&probe, &uuid, &table, false)?;
    let path = format!("/sys/dev/block/{number}/queue/discard_granularity");
    let found = fs::read_to_string(&path);
    let removed = mapper.remove(&probe, &uuid);
    mapper.finish()?;
    removed.map_err(|e| Error::io(&node, "remove", e))?;
    let found = found.map_err(|e| Error::io(Path::new(&path), "read", e))?;
    let bytes = found.trim().parse();
    bytes.map_err(|_| Error::new(Path::new(&path), "not a number"))
}
