// SPDX-License-Identifier: GPL-2.0

//! Blobs of an image on a block device while they are still being fetched.
//!
//! All blobs are on one device, one after the other ([`Layout`]). A read of what is missing waits until it has come, before
//! everything that is fetched without being asked for. What has come is kept in the store ([`ovbd_oci::Scattered`]); a blob
//! that is complete has been checked against its digest and can be read from its file instead.

mod layout;
mod read;
mod schedule;
mod server;
mod sources;

pub use crate::{
    layout::Layout,
    server::{Event, Options, Progress, Server, State, Wanted},
};
