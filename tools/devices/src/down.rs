// SPDX-License-Identifier: GPL-2.0

//! Taking a stack down.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use ovbd_kernel::Number;
use rustix::io::Errno;

use crate::{
    check_root, fetched, in_parallel,
    lock::Lock,
    mapped::{self, Mapped, Mapper},
    running::{check_name, Role, Running},
    storage::Storage,
    users, Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    report::Report,
};

/// Removes all mapped devices of a stack; its loop devices go with them.
///
/// # Errors
///
/// There is no such stack, or it is in use.
pub fn down(name: &str, interrupt: &Interrupt, report: &dyn Report) -> Result<()> {
    check_root()?;
    check_name(name)?;
    let control = mapped::open()?;
    let _lock = Lock::take(name, interrupt, report)?;
    let stack = Running::find(&control, name)?;
    let suspects = used_by_others(&stack);
    if !suspects.is_empty() {
        let ours: Vec<Number> = stack.numbers().collect();
        let storage = Storage::look()?;
        for device in suspects {
            if let Some(why) = users::why_in_use(device.number, &ours, &storage)? {
                return Err(Error::new(&device.node(), why));
            }
        }
    }
    let fetched = stack.fetched();
    fetched::stop_unserved(&fetched)?;
    let mapper = Mapper::new(&control)?;
    let result = remove(&stack, &mapper);
    mapper.finish()?;
    result?;
    // Whoever serves them ends with them.
    fetched::remove(&fetched)?;
    fetched::remove_left(name)
}

/// The devices that are open more often than the stack itself explains: each device has those that its table names open
/// once. Whoever mounts a device, swaps on it or makes something of it has it open too.
fn used_by_others(stack: &Running) -> Vec<&Mapped> {
    let mut expected: HashMap<Number, u32> = HashMap::new();
    for (_, device) in &stack.devices {
        let words = device.table.iter().flat_map(|target| &target.words);
        let below: HashSet<Number> = words.filter_map(|word| word.parse().ok()).collect();
        for number in below {
            *expected.entry(number).or_default() += 1;
        }
    }
    let devices = stack.devices.iter().map(|(_, device)| device);
    devices
        .filter(|device| device.opens > expected.get(&device.number).copied().unwrap_or(0))
        .collect()
}

/// Removes from the top down: what is used by others of the stack goes after them. Devices that do not use each other
/// go at the same time, as each waits for whoever may still be in it.
fn remove(stack: &Running, mapper: &Mapper<'_>) -> Result<()> {
    // The device on top can be in use where no list says so. Only when it is gone the others go.
    let devices: Vec<(Role, &Mapped)> = stack
        .devices
        .iter()
        .map(|(role, device)| (*role, device))
        .collect();
    for group in devices.chunk_by(|(a, _), (b, _)| a.is_beside(*b)) {
        let results = in_parallel(group, |(_, device)| {
            let result = mapper.remove(&device.name, &device.uuid);
            result.map_err(|e| in_use(device, e))
        });
        results.into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}

fn in_use(device: &Mapped, error: io::Error) -> Error {
    let path = device.node();
    if Errno::from_io_error(&error) == Some(Errno::BUSY) {
        if let Some(why) = users::why_open(device.number) {
            return Error::new(&path, why);
        }
    }
    Error::io(&path, "remove", error)
}
