// SPDX-License-Identifier: GPL-2.0

//! The `ovbd` command: its command line, one file for each verb, and the report that shows how a verb goes.
//!
//! What the verbs do is in [`ovbd_layers`], [`ovbd_devices`] and [`ovbd_oci`]; here is what a user types and sees.

pub mod acceleration;
pub mod background;
pub mod base;
pub mod checked;
pub mod chunk_lists;
pub mod cli;
pub mod commands;
pub mod config;
pub mod convert;
pub mod deploy;
pub mod documents;
pub mod filesystem;
pub mod layer_files;
pub mod layer_format;
pub mod names;
pub mod place;
pub mod policy;
pub mod pull_lazy;
pub mod pull_thin;
pub mod pull_vg;
pub mod pulled_volume;
pub mod push_stack;
pub mod push_volume;
pub mod remote;
pub mod report;
pub mod seal_note;
pub mod service;
pub mod signing;
pub mod squash_runs;
pub mod system_commit;
pub mod system_place;
pub mod tar_layers;
pub mod trace;
pub mod turbo;
pub mod watch;
