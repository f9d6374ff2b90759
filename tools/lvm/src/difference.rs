// SPDX-License-Identifier: GPL-2.0

//! In which ranges two volumes differ, as the metadata of their pool or a COW store says.

use std::{io::BufRead, path::Path};

use ovbd_devices::{
    exceptions::{read_exceptions, read_header, Header},
    Interrupt,
};
use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_kernel::dm::{Control, Id};
use ovbd_layers::{
    block_device::block_number,
    direct::{DirectFile, ALIGNMENT},
    error::{Error, Result},
    ranges::Ranges,
    report::Report,
};

use crate::{
    changes::{self, Sizes},
    pool, program,
    thin_xml::{self, Difference},
    undo::Undo,
    Volume,
};

/// With what and for whom metadata is read.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Notes of what is to be undone.
    pub undo: &'a Undo,
    /// Whether to go on.
    pub interrupt: &'a Interrupt,
    /// Who hears of it.
    pub report: &'a dyn Report,
}

/// The ranges of an active thin volume, all that it holds, or where it may differ from an older active one of its pool.
///
/// # Errors
///
/// Volumes that cannot be compared; those of [`pool::with_metadata`] and of the programs that read the metadata.
pub fn thin(
    pool: &Volume,
    old: Option<&Volume>,
    new: &Volume,
    context: Context<'_>,
) -> Result<Ranges> {
    pool::check(pool)?;
    let id = thin_id(new)?;
    let external = external_origin(new)?;
    let mut sizes = Sizes {
        old: 0,
        new: new.bytes,
        external: external.is_some(),
    };
    match old {
        None if sizes.external => Ok(changes::Whole::new(sizes).finish()),
        None => {
            let mut found = changes::Whole::new(sizes);
            let words = ["-m", "--dev-id", &id.to_string()];
            ask(pool, new, "thin_dump", &words, context, |text| {
                thin_xml::dump(text, id, |chunk, chunks| found.add(chunk, chunks))
            })?;
            Ok(found.finish())
        }
        Some(old) => {
            sizes.old = old.bytes;
            if external_origin(old)? != external {
                let what = format!(
                    "has another external origin than {}: what both have not written may differ (--full sends all)",
                    old.name
                );
                return Err(new.name.error(what));
            }
            let mut found = changes::Thin::new(sizes);
            let (left, right) = (thin_id(old)?, id);
            let words = [left.to_string(), right.to_string()];
            let words = ["-m", "--thin1", &words[0], "--thin2", &words[1]];
            ask(pool, new, "thin_delta", &words, context, |text| {
                thin_xml::delta(text, left, right, |chunk, difference, chunks| {
                    found.add(chunk, difference, chunks);
                })
            })?;
            Ok(found.finish())
        }
    }
}

/// How much of a thin volume may differ from an older one of its pool, in bytes of whole chunks: changed, and discarded. Only
/// metadata is read, and neither has to be active.
///
/// # Errors
///
/// Those of [`pool::with_metadata`] and of thin_delta.
pub fn amount(
    pool: &Volume,
    old: &Volume,
    new: &Volume,
    context: Context<'_>,
) -> Result<(u64, u64)> {
    pool::check(pool)?;
    let (left, right) = (thin_id(old)?, thin_id(new)?);
    let words = [left.to_string(), right.to_string()];
    let words = ["-m", "--thin1", &words[0], "--thin2", &words[1]];
    let (mut changed, mut discarded) = (0_u64, 0_u64);
    ask(pool, new, "thin_delta", &words, context, |text| {
        thin_xml::delta(text, left, right, |chunk, difference, chunks| {
            let bytes = chunks.length.saturating_mul(chunk);
            match difference {
                Difference::Same => {}
                Difference::LeftOnly => discarded = discarded.saturating_add(bytes),
                Difference::Different | Difference::RightOnly => {
                    changed = changed.saturating_add(bytes);
                }
            }
        })
    })?;
    Ok((changed, discarded))
}

fn thin_id(volume: &Volume) -> Result<u32> {
    volume
        .thin_id
        .ok_or_else(|| volume.name.error("not a thin volume"))
}

/// Has a program print of the metadata of a pool, and reads it as it comes. `read` returns the bytes of a chunk.
fn ask(
    pool: &Volume,
    volume: &Volume,
    program: &str,
    words: &[&str],
    context: Context<'_>,
    read: impl FnOnce(&mut dyn BufRead) -> std::result::Result<u64, String>,
) -> Result<()> {
    let subject = pool.name.path();
    let found = pool::with_metadata(
        pool,
        context.undo,
        context.interrupt,
        context.report,
        pool::PATIENCE,
        |metadata| {
            let metadata = metadata.to_string_lossy();
            let words = words.iter().copied().chain([&*metadata]);
            program::run_and_read(&subject, program, words, read)
        },
    )?;
    let bytes = found.map_err(|what| volume.name.error(what))?;
    if bytes == pool.chunk_bytes {
        return Ok(());
    }
    Err(pool.name.error(format!(
        "its metadata has chunks of {bytes} bytes, and LVM says {}",
        pool.chunk_bytes
    )))
}

/// The device that a thin volume shows where it has no chunks of its own: the third word of its table.
///
/// # Errors
///
/// It is not active, or mapped in another way.
pub fn external_origin(volume: &Volume) -> Result<Option<String>> {
    let node = volume.device();
    let fail = |e| Error::io(node, "read the table of", e);
    let number = block_number(node).ok_or_else(|| volume.name.error("is not active"))?;
    let table = Control::open().and_then(|control| control.table(Id::Number(number)));
    let table = table.map_err(fail)?.map(|(_, lines)| lines);
    match table.as_deref().unwrap_or_default() {
        [line] if line.kind == "thin" => Ok(line.text.split_whitespace().nth(2).map(str::to_owned)),
        _ => Err(volume.name.error("is not mapped as one thin volume")),
    }
}

/// The ranges in which a newer classic snapshot may differ from the older one `old` of the same origin. Both are active;
/// `new` was made before this is called.
///
/// # Errors
///
/// An invalid snapshot, a COW store that is damaged, and those of reading.
pub fn classic(old: &Volume, new: &Volume) -> Result<Ranges> {
    for volume in [old, new] {
        if volume.invalid {
            let what = "the snapshot is invalid: it was full, and lost what it held";
            return Err(volume.name.error(what));
        }
    }
    let path = Path::new("/dev/mapper").join(old.part("-cow"));
    let store = DirectFile::open(&path)?;
    let sectors = match read_header(&store)? {
        // Nothing was written to the origin since.
        Header::New => return Ok(Ranges::default()),
        Header::Store(sectors) => sectors,
    };
    if u64::from(sectors) * SECTOR_BYTES < ALIGNMENT as u64 {
        let what = "chunks below 4 KiB (--full sends all)";
        return Err(Error::new(&path, what).at_byte(0));
    }
    let found = read_exceptions(&store, sectors, old.bytes / SECTOR_BYTES)?;
    let sizes = Sizes {
        old: old.bytes,
        new: new.bytes,
        external: false,
    };
    let chunks = found.iter().map(|exception| exception.origin);
    Ok(changes::classic(
        chunks,
        u64::from(sectors) * SECTOR_BYTES,
        sizes,
    ))
}
