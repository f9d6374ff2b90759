// SPDX-License-Identifier: GPL-2.0

//! Making a layer of what was written over a stack.
//!
//! The device is suspended, which flushes and, where a file system is mounted, freezes it. Then the COW
//! store is complete on its device: its exceptions say which chunks were written, and only these are read. What they
//! hold is compared with the stack below, so that the layer is that which `ovbd build --base` makes of a copy.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use ovbd_image::lsmt::{Identity, UuidText, SECTOR_BYTES};

use ovbd_kernel::{
    dm::{Control, Suspend},
    udev::{Cookie, Rules as UdevRules},
};

use crate::{
    block_writer::{self, BlockWriter},
    check_root,
    exceptions::{read_exceptions, read_header, Exception, Header},
    hold_still::{check_elsewhere, Frozen},
    lock::Lock,
    mapped::{self, node, Mapped},
    running::{check_name, Running},
    storage::Storage,
    users::device_name,
    Interrupt,
};
use ovbd_layers::{
    blob::Content,
    build::{finish_output, start_blob, Options},
    direct::{Aligned, DirectFile},
    error::{Error, Result},
    file_range::FileRange,
    layer::read_trailer,
    layer_writer::{LayerWriter, MAX_SEGMENTS},
    output::{Output, Rules},
    report::Report,
    units,
};

/// Bytes that are read at once, if a chunk is not larger.
const READ_BYTES: u64 = 1 << 20;

/// Writes the changes of the stack `name` to the new layer `out`. The stack stays as it is. For `assume_elsewhere` see
/// [`Storage::assume_elsewhere`].
///
/// # Errors
///
/// The stack is not writable or its snapshot invalid, `out` cannot be written, and those of reading.
/// Nothing is left behind then.
pub fn commit(
    name: &str,
    out: &Path,
    options: &Options,
    assume_elsewhere: bool,
    interrupt: &Interrupt,
    report: &dyn Report,
) -> Result<()> {
    options.check().map_err(|what| Error::new(out, what))?;
    check_root()?;
    check_name(name)?;
    let control = mapped::open()?;
    let _lock = Lock::take(name, interrupt, report)?;
    let stack = Running::find(&control, name)?;
    let (Some(device), Some(snapshot), Some(below)) =
        (stack.top(), stack.snapshot(), stack.stack())
    else {
        return Err(Error::new(
            &node(name),
            "not writable: up without --writable",
        ));
    };
    if device.suspended {
        let what = format!("suspended; \"dmsetup resume {name}\" goes on");
        return Err(Error::new(&device.node(), what));
    }
    let cow = snapshot
        .target()
        .and_then(|table| table.device(1))
        .ok_or_else(|| Error::new(&snapshot.node(), "an unknown table"))?;
    let storage = Storage::look()?.assume_elsewhere(assume_elsewhere);
    check_elsewhere(device, out, &storage)?;
    let cow = PathBuf::from(device_name(cow));
    // What is known now can only become more.
    Store::open(&cow, device.sectors())?.runs(out)?;
    let lower = Lower::new(&stack)?;
    let below = FileRange::open(&below.node())?;
    let rules = Rules {
        replace: options.replace,
        ..Rules::default()
    };
    let output = Output::create_file(out, rules)?;

    let frozen = Frozen::above(device, &storage, report)?;
    let suspended = Suspended::new(&control, device, report)?;
    check_valid(&control, snapshot)?;
    let store = Store::open(&cow, device.sectors())?;
    let runs = store.runs(out)?;
    report.expect(store.bytes());
    let (blob, start) = start_blob(&output, out, options)?;
    let first = Identity {
        virtual_size: lower.virtual_size,
        uuid: options.uuid.unwrap_or(UuidText::NIL),
        parent_uuid: options.parent(lower.uuid),
    };
    let layer = LayerWriter::new(blob, out, &first)?;
    let mut writer = BlockWriter::new(layer, below, device.sectors(), runs, MAX_SEGMENTS);
    store.each(|sector, data| {
        interrupt.check(out)?;
        report.add(data.len() as u64);
        writer.add(sector, data)
    })?;
    let written = writer.finish()?;
    suspended.end()?;
    drop(frozen);
    if written.same > 0 {
        let what = format!(
            "so scattered that segments do not suffice: {} that did not change are stored too",
            units::size(written.same)
        );
        report.warn(&Error::new(out, what));
    }
    let hash = written.content;
    let identity = Identity {
        uuid: options
            .uuid
            .unwrap_or_else(|| hash.uuid(lower.virtual_size, first.parent_uuid)),
        ..first
    };
    let end = written.layer.finish(&identity)?;
    finish_output(output, options, start, end)
}

/// What the new layer must know of the one below.
struct Lower {
    virtual_size: u64,
    uuid: Option<UuidText>,
}

impl Lower {
    fn new(stack: &Running) -> Result<Self> {
        let mut lower = Self {
            virtual_size: 0,
            uuid: None,
        };
        let layers = stack.layers();
        for (number, layer) in layers.iter().enumerate().rev() {
            let device = FileRange::open(Path::new(&device_name(layer.device)))?;
            if layer.bytes > device.bytes() {
                return Err(Error::new(device.path(), "smaller than its layer"));
            }
            let trailer = read_trailer(&Content::Plain(device.part(0, layer.bytes)))?;
            if number + 1 == layers.len() {
                lower.uuid = trailer.uuid;
            }
            lower.virtual_size = trailer.virtual_size;
            if lower.virtual_size != 0 {
                break;
            }
        }
        Ok(lower)
    }
}

/// Refuses a snapshot that lost writes.
fn check_valid(control: &Control, device: &Mapped) -> Result<()> {
    let status = device.status(control)?;
    // "<used>/<all> <metadata>", else it says what happened.
    let state = status
        .first()
        .map_or_else(String::new, |target| target.words.join(" "));
    // One that is full refused writes, and has all that it took.
    if state.contains('/') || state == "Overflow" {
        return Ok(());
    }
    let what = format!("the snapshot is {}: writes are lost", state.to_lowercase());
    Err(Error::new(&device.node(), what))
}

/// A device that we suspended; it goes on when this is dropped.
struct Suspended<'a> {
    control: &'a Control,
    device: Option<&'a Mapped>,
    report: &'a dyn Report,
}

impl<'a> Suspended<'a> {
    /// Suspends a device that is not: one that somebody else suspended is not ours to resume.
    fn new(control: &'a Control, device: &'a Mapped, report: &'a dyn Report) -> Result<Self> {
        control
            .suspend(device.id(), Suspend::default())
            .map_err(|e| Error::io(&device.node(), "suspend", e))?;
        Ok(Self {
            control,
            device: Some(device),
            report,
        })
    }

    fn end(mut self) -> Result<()> {
        match self.device.take() {
            Some(device) => resume(self.control, device),
            None => Ok(()),
        }
    }
}

fn resume(control: &Control, device: &Mapped) -> Result<()> {
    let fail = |e| Error::io(&device.node(), "resume", e);
    let cookie = Cookie::new().map_err(fail)?;
    control
        .resume(device.id(), cookie.event(UdevRules::All))
        .map_err(fail)?;
    cookie.wait();
    Ok(())
}

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        let device = self.device.take();
        if let Some(Err(e)) = device.map(|device| resume(self.control, device)) {
            self.report.warn(&e);
        }
    }
}

/// An exception store, read past the page cache: the kernel does not write through it.
struct Store {
    device: DirectFile,
    /// Sectors of the origin.
    sectors: u64,
    chunk_bytes: u64,
    exceptions: Vec<Exception>,
}

impl Store {
    fn open(path: &Path, origin_sectors: u64) -> Result<Self> {
        let device = DirectFile::open(path)?;
        let sectors = match read_header(&device)? {
            Header::New => {
                return Err(Error::new(path, "holds no exception store").at_byte(0));
            }
            Header::Store(sectors) => sectors,
        };
        Ok(Self {
            exceptions: read_exceptions(&device, sectors, origin_sectors)?,
            device,
            sectors: origin_sectors,
            chunk_bytes: u64::from(sectors) * SECTOR_BYTES,
        })
    }

    /// The blocks that were written. More than a layer can have, each run stored whole, are refused.
    fn runs(&self, out: &Path) -> Result<Vec<Range<u64>>> {
        let chunk = self.chunk_bytes / SECTOR_BYTES;
        let chunks = self.exceptions.iter();
        let chunks = chunks.map(|found| found.origin * chunk..(found.origin + 1) * chunk);
        let runs = block_writer::runs(chunks, self.sectors);
        let segments = block_writer::segments(&runs);
        if segments <= MAX_SEGMENTS {
            return Ok(runs);
        }
        let what = format!(
            "what was written takes {segments} segments, of at most {MAX_SEGMENTS} in a layer \
             (ovbd build --base makes one of a copy of the device)"
        );
        Err(Error::new(out, what))
    }

    /// Bytes of all chunks.
    fn bytes(&self) -> u64 {
        self.exceptions.len() as u64 * self.chunk_bytes
    }

    /// Calls `work` with the content of all chunks, in the order of the origin, and the sector of the
    /// origin at which it belongs.
    fn each(&self, mut work: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let most = (READ_BYTES / self.chunk_bytes).max(1) as usize;
        let mut buffer = Aligned::new(most * self.chunk_bytes as usize);
        let mut rest = self.exceptions.as_slice();
        while let Some(first) = rest.first() {
            // Chunks that follow each other on both sides are one read.
            let count = (1..rest.len().min(most))
                .find(|i| {
                    let (i, far) = (&rest[*i], *i as u64);
                    i.origin != first.origin + far || i.stored != first.stored + far
                })
                .unwrap_or(rest.len().min(most));
            let bytes = buffer.bytes(count * self.chunk_bytes as usize);
            self.device.read(bytes, first.stored * self.chunk_bytes)?;
            work(first.origin * (self.chunk_bytes / SECTOR_BYTES), bytes)?;
            rest = &rest[count..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_places_are_known_before_anything_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let store = |distance: u64, count: u64| Store {
            device: DirectFile::open(file.path()).unwrap(),
            sectors: 1 << 40,
            chunk_bytes: 65536,
            exceptions: (0..count)
                .map(|i| Exception {
                    origin: i * distance,
                    stored: i + 2,
                })
                .collect(),
        };
        let check = |distance, count| store(distance, count).runs(Path::new("out"));
        assert!(check(1, 0).is_ok());
        assert!(check(2, MAX_SEGMENTS).is_ok());
        // Those that follow each other are one segment.
        assert!(check(1, MAX_SEGMENTS + 1).is_ok());
        let error = check(2, MAX_SEGMENTS + 1).unwrap_err().to_string();
        let segments = format!("takes {} segments", MAX_SEGMENTS + 1);
        assert!(error.contains(&segments), "{error}");
    }
}
