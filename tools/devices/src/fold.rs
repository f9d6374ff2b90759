// SPDX-License-Identifier: GPL-2.0

//! Folding generations back: what was written to the newest goes to the store of the one below, until there is one again.
//!
//! dm-snapshot does that (snapshot-merge), while the device is in use: chunk by chunk, each of which is on the disk below
//! before the newer store forgets it. So at every moment the newer generation over the older one reads as the device, from
//! the files too. Only what the older one has by itself is of no single moment any more, which the record of the newer one
//! says from before the first chunk on.

use std::{path::Path, thread, time::Duration};

use ovbd_kernel::dm::Suspend;

use crate::{
    commit::{Request, Work},
    cow::enough_for,
    generations::{Generation, State, MERGING},
    hold_still::check_no_swap,
    layer_place::{line, linear},
    lock::Lock,
    mapped::{Mapped, Mapper},
    plan::{Device, Line},
    record::Record,
    store_files::{self, Place},
    up::snapshot,
    users, Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    file_range::FileRange,
    report::Report,
    units,
};

/// How often it is looked how far the kernel is.
const PAUSE: Duration = Duration::from_millis(50);

/// Folds all generations of a stack into the oldest.
///
/// # Errors
///
/// There is one only, a frozen one is in use or in a layer, its store has no room, and the system's. The device reads as
/// before in any case, and nothing that was written is lost.
pub fn fold(request: &Request<'_>, interrupt: &Interrupt, report: &dyn Report) -> Result<()> {
    let mut work = Work::begin(request, interrupt, report)?;
    if work.chain.frozen().is_empty() {
        let what = "there is one generation, and nothing to fold back";
        return Err(Error::new(&work.chain.top.node(), what));
    }
    while let [newest, below, ..] = work.chain.generations.as_slice() {
        Fold {
            work: &work,
            newest,
            below,
        }
        .run(interrupt, report)?;
        work = work.again(request)?;
    }
    Ok(())
}

/// The newest generation, and the one that it is folded into.
struct Fold<'a> {
    work: &'a Work<'a>,
    newest: &'a Generation,
    below: &'a Generation,
}

impl Fold<'_> {
    fn run(&self, interrupt: &Interrupt, report: &dyn Report) -> Result<()> {
        let (newest, control) = (self.newest, &self.work.control);
        check_no_swap(&self.work.chain.top, &self.work.storage)?;
        if !newest.merging {
            self.check()?;
            self.note()?;
            let begun = self
                .table(&newest.lower, false, self.linear())
                .and_then(|()| self.table(&newest.device, false, self.merge()));
            if let Err(e) = begun {
                self.stop(report);
                return Err(e);
            }
        }
        if let Err(e) = self.wait(interrupt, report) {
            self.stop(report);
            return Err(e);
        }
        // What was acknowledged is in the older store, which gets the next flush.
        let top = &self.work.chain.top;
        let below = self.linear().resolve(Device::number)?;
        let mapper = Mapper::new(control)?;
        let result = mapper.reload(&top.name, &top.uuid, &[below], false, Suspend::default());
        let removed = result.and_then(|()| mapper.remove_each(newest.devices()));
        // Before the devices go the store has a name, if it has one.
        let old = self.work.file_of(newest);
        mapper.finish()?;
        removed?;
        let _stores = Lock::take_stores(interrupt, report)?;
        store_files::settle(old.as_slice(), &Place::Unnamed)
    }

    /// Refuses what would lose something or change what somebody reads.
    fn check(&self) -> Result<()> {
        let (newest, below) = (self.newest, self.below);
        let ours = self.work.chain.numbers();
        for device in [&newest.lower, &below.device] {
            if device.opens > 1 {
                let why = users::why_in_use(device.number, &ours, &self.work.storage)?;
                let why = why.or_else(|| users::why_open(device.number));
                let why = why.unwrap_or_else(|| "in use".to_owned());
                let what = format!("{why}, and what is frozen would change");
                return Err(Error::new(&device.node(), what));
            }
        }
        let node = newest.store_node();
        if let Some(layer) = Record::read(&node)?.and_then(|record| record.layer) {
            let what = format!(
                "an interrupted commit made the layer {layer} of what is frozen: \"ovbd commit\" goes on"
            );
            return Err(Error::new(&node, what));
        }
        let control = &self.work.control;
        let written = newest.written_sectors(control)?;
        let used = below.used_sectors(control)?;
        let Some((written, (used, all))) = written.zip(used) else {
            let what = "a store is full: \"ovbd commit\" makes a layer of both";
            return Err(Error::new(&node, what));
        };
        let bytes = FileRange::open(&below.store_node())?.bytes();
        // An exception for each chunk, and an area that is begun.
        let needed = written + written / 128 + 2 * u64::from(below.chunk_sectors);
        if bytes < enough_for(self.work.chain.top.sectors()) && used + needed > all {
            let what = format!(
                "has no room for the {} that were written since: \"ovbd commit\" makes a layer of both",
                units::size(written * 512)
            );
            return Err(Error::new(&below.store_node(), what));
        }
        Ok(())
    }

    /// From now on what is frozen is of no single moment.
    fn note(&self) -> Result<()> {
        let node = self.newest.store_node();
        let lost = || Error::new(&node, "the store lost its record");
        let record = Record::read(&node)?.ok_or_else(lost)?;
        let record = Record {
            folding: true,
            ..record
        };
        record.write(&node)
    }

    /// Waits until the newest generation is empty. It stays so: what is written meanwhile goes to the one below.
    fn wait(&self, interrupt: &Interrupt, report: &dyn Report) -> Result<()> {
        let (newest, control) = (self.newest, &self.work.control);
        let mut left = newest.written_sectors(control)?;
        report.expect(left.unwrap_or(0) * 512);
        loop {
            interrupt.check(Path::new(&newest.device.name))?;
            if newest.state(control)? == State::Empty {
                return Ok(());
            }
            let now = newest.written_sectors(control)?;
            if now.is_none() {
                let what = "dm-snapshot gave up, as what is below took no more; the device goes on with both generations";
                return Err(Error::new(&newest.device.node(), what));
            }
            let done = left.zip(now).map(|(left, now)| left.saturating_sub(now));
            report.add(done.unwrap_or(0) * 512);
            left = now;
            thread::sleep(PAUSE);
        }
    }

    /// Goes on with two generations.
    fn stop(&self, report: &dyn Report) {
        let stopped = self
            .table(&self.newest.device, false, self.snapshot())
            .and_then(|()| self.table(&self.newest.lower, true, self.linear()));
        if let Err(e) = stopped {
            report.warn(&e);
        }
    }

    /// Puts a device of the stack on another table; nobody but the stack uses it.
    fn table(&self, device: &Mapped, read_only: bool, line: Line) -> Result<()> {
        let line = line.resolve(Device::number)?;
        let mapper = Mapper::new(&self.work.control)?;
        let how = Suspend {
            skip_freeze: true,
            ..Suspend::default()
        };
        let (name, uuid) = (&device.name, &device.uuid);
        let result = mapper.reload(name, uuid, &[line], read_only, how);
        mapper.finish()?;
        result
    }

    /// The older generation.
    fn linear(&self) -> Line {
        let below = Device::Number(self.below.device.number);
        line(self.work.chain.top.sectors(), linear(&below, 0))
    }

    /// The newer one.
    fn snapshot(&self) -> Line {
        let newest = self.newest;
        let [lower, store] = [newest.lower.number, newest.store].map(Device::Number);
        let words = snapshot(lower, store, newest.chunk_sectors, newest.discards);
        line(self.work.chain.top.sectors(), words)
    }

    /// The same while it is folded.
    fn merge(&self) -> Line {
        let mut line = self.snapshot();
        line.words[0] = MERGING.into();
        line
    }
}
