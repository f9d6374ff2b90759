// SPDX-License-Identifier: GPL-2.0

//! Logical volumes of LVM: what there is, what changed between two snapshots, which snapshot is which image.
//!
//! LVM is asked by its programs, whose JSON is read and never what is meant for people. [`volume`] is what `lvs` says,
//! [`pool`] the metadata of a thin pool, [`changes`] the ranges in which two snapshots may differ, [`tags`] what is
//! noted on a volume about its image. Whatever a program that is killed leaves behind, [`undo`] and [`partial`] take back.
//!
//! Nothing here knows registries or writes layers. A volume is called `VG/LV` in errors.

pub mod active;
pub mod changes;
pub mod difference;
pub mod partial;
pub mod pool;
pub mod program;
pub mod snapshot;
pub mod tags;
pub mod thin_xml;
pub mod undo;
pub mod volume;

pub use volume::{Name, Volume, Volumes};
