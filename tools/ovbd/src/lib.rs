// SPDX-License-Identifier: GPL-2.0

//! The `ovbd` command: its command line, one file for each verb, and the report that shows how a verb goes.
//!
//! What the verbs do is in [`ovbd_layers`] and [`ovbd_devices`]; here is what a user types and sees.

pub mod cli;
pub mod commands;
pub mod report;
