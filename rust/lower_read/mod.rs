// SPDX-License-Identifier: GPL-2.0

//! Reads from lower devices: on behalf of a bio, and of a constructor.
//!
//! A target that does not just pass bios on reads what it needs from the devices below and fills
//! the bio from that. [`read_lower`] starts such a read and has the target called when the data is
//! there; [`BioCursor`] puts what the target makes of it into the pages of the bio. A constructor
//! reads its metadata with [`read_metadata`].
//!
//! What the devices of a module can use in turns they share: buffers, the workqueue, and by
//! [`Shared`] what else the target needs for its work.
//!
//! This uses `device_mapper`, which does not know it: a target that reads has its [`LowerReads`] as
//! a field.

// A target uses only a part of it.
#![allow(dead_code, unreachable_pub, unused_imports)]

use crate::bindings;

mod bio_read;
mod buffers;
mod counters;
mod flags;
mod metadata;
mod pages;
mod shared;

pub use self::{
    bio_read::{
        read_lower,
        Extent,
        FinishedRead,
        LowerRead,
        LowerReader,
        LowerReads,
        Piece, //
    },
    buffers::{
        online_cpus,
        MARGIN, //
    },
    counters::Counters,
    flags::gfp_table,
    metadata::{
        read_metadata,
        read_metadata_batch,
        ReadRequest, //
    },
    pages::{
        BioCursor,
        Destination, //
    },
    shared::{
        Shared,
        SharedRef, //
    },
};
