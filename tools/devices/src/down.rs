// SPDX-License-Identifier: GPL-2.0

//! Taking a stack down.

use crate::{
    check_root,
    dmsetup::{self, dmsetup, Number},
    running::Running,
    users,
};
use ovbd_layers::error::{Error, Result};

/// Removes all mapped devices of a stack; its loop devices go with them.
///
/// # Errors
///
/// There is no such stack, or it is in use.
pub fn down(name: &str) -> Result<()> {
    check_root()?;
    let stack = Running::find(name, &dmsetup::all())?;
    let ours: Vec<Number> = stack
        .devices
        .iter()
        .map(|(_, device)| device.number)
        .collect();
    for (_, device) in &stack.devices {
        if let Some(why) = users::why_in_use(device.number, &ours) {
            return Err(Error::new(&device.node(), why));
        }
    }
    // The device on top can be in use where no list says so. Only when it is gone the others go.
    let mut names = stack.devices.iter().map(|(_, device)| device);
    let Some(top) = names.next() else {
        return Ok(());
    };
    // udev looks at a device after every program that wrote to it, so it is tried for a while.
    dmsetup(["remove", "--retry", &top.name]).map_err(|e| {
        match users::programs(top.number).as_slice() {
            [] => Error::new(&top.node(), e.what()),
            programs => Error::new(&top.node(), format!("in use by {}", programs.join(", "))),
        }
    })?;
    let names: Vec<&str> = names.map(|device| device.name.as_str()).collect();
    if !names.is_empty() {
        dmsetup(["remove", "--retry"].iter().chain(&names))?;
    }
    Ok(())
}
