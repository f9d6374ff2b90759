// SPDX-License-Identifier: GPL-2.0

//! What a registry may do to a client, each against a registry that does just that.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../../layers/tests/common/programs.rs"]
mod programs;

mod credentials;
mod documents;
mod pull;
mod push;

use common::{options, reference, scripted::Scripted};
use ovbd_oci::{Options, Registry};

const TAG: &str = "vm/web:mon";

fn puller(server: &Scripted) -> Registry {
    Registry::to_pull(&reference(&server.host, TAG), options())
}

fn pusher(server: &Scripted, part_bytes: u64) -> Registry {
    Registry::to_push(
        &reference(&server.host, TAG),
        Options {
            part_bytes,
            ..options()
        },
    )
}
