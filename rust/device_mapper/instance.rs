// SPDX-License-Identifier: GPL-2.0

//! The memory behind `ti->private`.

use super::{
    device::{
        Devices,
        InstanceId, //
    },
    per_bio::Workqueue, //
};
use kernel::prelude::*;

/// A constructed target of type `T` and what belongs to it.
///
/// The order of the fields is that in which they are dropped: the workqueue first, since its work
/// functions use the target, and the devices last.
#[pin_data]
pub(super) struct Instance<T> {
    pub(super) id: InstanceId,
    pub(super) workqueue: Option<Workqueue>,
    #[pin]
    pub(super) target: T,
    pub(super) devices: Devices,
}
