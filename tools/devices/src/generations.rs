// SPDX-License-Identifier: GPL-2.0

//! The generations of a running stack: dm-snapshots of which each but the newest is frozen, as nobody writes to it.
//!
//! ```text
//! NAME -> NAME-cow<n> -> NAME-lower<n> -> ... -> NAME-cow<k> -> NAME-lower<k>, the stack itself
//!              |                                      |
//!           store n                                store k
//! ```

use ovbd_kernel::{dm::Control, Number};

use crate::{
    discards,
    mapped::{node, Mapped, Mapper, Target},
    running::{Role, Running},
};
use ovbd_layers::{
    error::{Error, Result},
    sysfs::device_name,
};

/// The target that moves what a generation holds to what it is written over.
pub const MERGING: &str = "snapshot-merge";

/// One generation.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Its number.
    pub number: u32,
    /// The snapshot.
    pub device: Mapped,
    /// What it is written over.
    pub lower: Mapped,
    /// The device of its store.
    pub store: Number,
    /// Sectors of a chunk of its store.
    pub chunk_sectors: u32,
    /// Whether it discards in its store.
    pub discards: bool,
    /// Whether dm-snapshot moves what it holds to what it is written over ([`crate::fold`]).
    pub merging: bool,
}

/// How a generation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It holds nothing.
    Empty,
    /// It holds something, or it cannot be told.
    Written,
}

/// All generations of a stack.
#[derive(Clone, Debug)]
pub struct Chain {
    /// The device that users see.
    pub top: Mapped,
    /// Newest first; there is one at least.
    pub generations: Vec<Generation>,
    /// The stack that the oldest is written over, or dm-verity over it.
    pub stack: Mapped,
}

impl Generation {
    /// Refuses one that lost writes.
    ///
    /// # Errors
    ///
    /// That one, and those of the ioctl.
    pub fn check_valid(&self, control: &Control) -> Result<()> {
        self.state(control).map(drop)
    }

    /// Whether something was written.
    ///
    /// # Errors
    ///
    /// It lost writes, and those of the ioctl.
    pub fn state(&self, control: &Control) -> Result<State> {
        Ok(match self.written_sectors(control)? {
            Some(0) => State::Empty,
            Some(_) | None => State::Written,
        })
    }

    /// Sectors of the chunks that were written; `None` where it cannot be told.
    ///
    /// # Errors
    ///
    /// It lost writes, and those of the ioctl.
    pub fn written_sectors(&self, control: &Control) -> Result<Option<u64>> {
        let usage = self.usage(control)?;
        Ok(usage.and_then(|(used, _, metadata)| used.checked_sub(metadata)))
    }

    /// Sectors of the store that are in use, and all of them; `None` where it cannot be told.
    ///
    /// # Errors
    ///
    /// As [`Generation::written_sectors`].
    pub fn used_sectors(&self, control: &Control) -> Result<Option<(u64, u64)>> {
        let usage = self.usage(control)?;
        Ok(usage.map(|(used, all, _)| (used, all)))
    }

    /// Sectors in use, all, and those of metadata.
    fn usage(&self, control: &Control) -> Result<Option<(u64, u64, u64)>> {
        let status = self.device.status(control)?;
        let words = status
            .first()
            .map(|target| target.words.as_slice())
            .unwrap_or_default();
        // "<used>/<all> <metadata>" in sectors, else it says what happened.
        if let Some((used, all)) = words.first().and_then(|word| word.split_once('/')) {
            let number = |word: &str| word.parse::<u64>().ok();
            let metadata = words.get(1).and_then(|word| number(word));
            let usage = number(used).zip(number(all)).zip(metadata);
            return Ok(usage.map(|((used, all), metadata)| (used, all, metadata)));
        }
        match words.join(" ").as_str() {
            // It refused writes, or what it is over did, and has all that it took.
            "Overflow" | "Merge failed" => Ok(None),
            state => {
                let what = format!("the snapshot is {}: writes are lost", state.to_lowercase());
                Err(Error::new(&self.device.node(), what))
            }
        }
    }

    /// Its devices, in the order in which they can be removed.
    pub fn devices(&self) -> [&Mapped; 2] {
        [&self.device, &self.lower]
    }

    /// The node of its store.
    pub fn store_node(&self) -> std::path::PathBuf {
        device_name(self.store).into()
    }
}

impl Chain {
    /// Follows the tables of a stack down from the device that users see.
    ///
    /// # Errors
    ///
    /// The stack is not writable, was brought up by a version without generations, or has tables of others.
    pub fn of(stack: &Running) -> Result<Self> {
        let fail = |what: String| Err(Error::new(&node(&stack.name), what));
        if stack.device(Role::Cow).is_some() {
            return fail(
                "brought up by a version of ovbd without generations: take it down and up again, or \
                 make a layer with \"ovbd build --base\""
                    .to_owned(),
            );
        }
        let Some(top) = stack.top() else {
            return fail(format!(
                "parts of it are missing (\"ovbd down {}\" removes the others)",
                stack.name
            ));
        };
        if stack.device(Role::Top).is_none() {
            return fail("not writable: up without --writable".to_owned());
        }
        let mut generations = Vec::new();
        let mut above = top;
        loop {
            let Some(device) = below_linear(above).and_then(|number| of_number(stack, number))
            else {
                return strange(above);
            };
            let (Role::Generation(number), device) = device else {
                return strange(above);
            };
            let Some((lower, store, chunk_sectors)) = snapshot(device) else {
                return strange(device);
            };
            let discards = has_discards(device);
            let Some((Role::Lower(of), lower)) = of_number(stack, lower) else {
                return strange(device);
            };
            // Numbers grow, so this ends.
            let grows = generations
                .last()
                .is_none_or(|newer: &Generation| *number < newer.number);
            if of != number || !grows || device.sectors() != top.sectors() {
                return strange(device);
            }
            generations.push(Generation {
                number: *number,
                device: device.clone(),
                lower: lower.clone(),
                store,
                chunk_sectors,
                discards,
                merging: is_merging(device),
            });
            if lower.sectors() != top.sectors() {
                return strange(lower);
            }
            match only_line(lower) {
                Some(table) if ["overlaybd", "verity"].contains(&table.kind.as_str()) => {
                    return Ok(Self {
                        top: top.clone(),
                        generations,
                        stack: lower.clone(),
                    })
                }
                _ => above = lower,
            }
        }
    }

    /// The devices of all generations.
    pub fn numbers(&self) -> Vec<Number> {
        let generations = self.generations.iter();
        generations
            .flat_map(|one| [one.device.number, one.lower.number])
            .collect()
    }

    /// The one that is written to.
    ///
    /// # Panics
    ///
    /// Never: there is one.
    pub fn newest(&self) -> &Generation {
        &self.generations[0]
    }

    /// Those that nobody writes to, newest first.
    pub fn frozen(&self) -> &[Generation] {
        &self.generations[1..]
    }
}

/// A table that is not ours.
fn strange(device: &Mapped) -> Result<Chain> {
    let what = "its table was changed by something else (\"dmsetup table\" shows it)";
    Err(Error::new(&device.node(), what))
}

fn of_number(stack: &Running, number: Number) -> Option<(&Role, &Mapped)> {
    let mut devices = stack.devices.iter();
    let found = devices.find(|(_, device)| device.number == number);
    found.map(|(role, device)| (role, device))
}

fn only_line(device: &Mapped) -> Option<&Target> {
    match device.table.as_slice() {
        [line] => Some(line),
        _ => None,
    }
}

/// The device of which all is mapped.
fn below_linear(device: &Mapped) -> Option<Number> {
    let table = only_line(device).filter(|table| table.kind == "linear")?;
    table.device(0).filter(|_| table.number(1) == Some(0))
}

/// What a snapshot is over, its store, and the sectors of a chunk.
fn snapshot(device: &Mapped) -> Option<(Number, Number, u32)> {
    let table = only_line(device).filter(|table| ["snapshot", MERGING].contains(&&*table.kind))?;
    let persistent = table.words.get(2).is_some_and(|word| word.starts_with('P'));
    let chunk = table.number(3)?.try_into().ok()?;
    Some((table.device(0)?, table.device(1)?, chunk)).filter(|_| persistent)
}

fn is_merging(device: &Mapped) -> bool {
    only_line(device).is_some_and(|table| table.kind == MERGING)
}

/// Whether a snapshot discards in its store.
fn has_discards(device: &Mapped) -> bool {
    let mut words = device.table.iter().flat_map(|line| &line.words);
    words.any(|word| word == discards::FEATURE)
}

/// Removes what a commit that was killed left behind, which is in no table any more. Returns the generations of those
/// that were removed because a layer has what they held.
///
/// # Errors
///
/// Something is in use, or holds what nothing else does.
pub fn remove_leftovers(
    control: &Control,
    stack: &Running,
    chain: &Chain,
    mapper: &Mapper<'_>,
) -> Result<()> {
    // Tables that were loaded and never became live hold devices.
    for device in [&chain.top, &chain.newest().lower] {
        let cleared = control.clear(device.id());
        cleared.map_err(|e| Error::io(&device.node(), "clear the table of", e))?;
    }
    let layers = stack.layers().len();
    let numbers: Vec<u32> = chain.generations.iter().map(|one| one.number).collect();
    for (role, device) in &stack.devices {
        let is_left = match role {
            Role::Probe => true,
            Role::Generation(number) | Role::Lower(number) => !numbers.contains(number),
            Role::Turbo(layer) | Role::Zfile(layer) | Role::Blob(layer) => *layer >= layers,
            Role::Top | Role::Cow | Role::Stack | Role::Sealed => false,
        };
        if !is_left {
            continue;
        }
        if let Role::Generation(number) = role {
            check_unneeded(control, device, *number, chain)?;
        }
        mapper.remove_each([device])?;
    }
    Ok(())
}

/// Refuses to remove a generation that NAME is not over any more, or not yet, if only it has what it holds.
fn check_unneeded(control: &Control, device: &Mapped, number: u32, chain: &Chain) -> Result<()> {
    let oldest = chain.generations.last().map_or(0, |one| one.number);
    // A layer has all that was written before the oldest, or the stack could not be below that.
    if number < oldest {
        return Ok(());
    }
    let Some((_, store, chunk_sectors)) = snapshot(device) else {
        // It was never finished.
        return Ok(());
    };
    let generation = Generation {
        number,
        device: device.clone(),
        lower: device.clone(),
        store,
        chunk_sectors,
        discards: false,
        merging: false,
    };
    match generation.state(control) {
        Ok(State::Written) => {
            let what = "was written to, though it is no part of the stack";
            Err(Error::new(&device.node(), what))
        }
        // One that was never used cannot have lost anything.
        Ok(State::Empty) | Err(_) => Ok(()),
    }
}
