// SPDX-License-Identifier: GPL-2.0

//! The verbs: what each takes and does.

pub mod build;
pub mod chunks;
pub mod commit;
pub mod disable;
pub mod down;
pub mod enable;
pub mod export;
pub mod fsck;
pub mod gc;
pub mod images;
pub mod info;
pub mod inspect;
pub mod login;
pub mod logout;
pub mod ls;
pub mod lvm;
pub mod pull;
pub mod push;
pub mod qemu_args;
pub mod rebase;
pub mod rmi;
pub mod seal;
pub mod sign;
pub mod squash;
pub mod system;
pub mod tag;
pub mod trace;
pub mod up;
pub mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

use crate::report::Report;

/// What to do.
// The texts of the help are on the structures: a comment here would hide them.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum Command {
    Build(build::Build),
    Seal(seal::Seal),
    Squash(squash::Squash),
    Rebase(rebase::Rebase),
    Sign(sign::Sign),
    Export(export::Export),
    Verify(verify::Verify),
    Info(info::Info),
    Up(up::Up),
    QemuArgs(qemu_args::QemuArgs),
    Down(down::Down),
    Ls(ls::Ls),
    Enable(enable::Enable),
    Disable(disable::Disable),
    Commit(commit::Commit),
    Push(push::Push),
    Pull(pull::Pull),
    Chunks(chunks::Chunks),
    Trace(trace::Show),
    Images(images::Images),
    Inspect(inspect::Inspect),
    Tag(tag::Tag),
    Rmi(rmi::Rmi),
    Gc(gc::Gc),
    Fsck(fsck::Fsck),
    Login(login::Login),
    Logout(logout::Logout),
    Lvm(lvm::Lvm),
    System(system::System),
}

impl Command {
    /// Whether the answer is to be JSON, errors too.
    pub fn wants_json(&self) -> bool {
        match self {
            Command::Squash(squash) => squash.json,
            Command::Rebase(rebase) => rebase.json,
            Command::Info(info) => info.json,
            Command::Ls(ls) => ls.json,
            Command::Verify(verify) => verify.json,
            Command::Push(push) => push.json,
            Command::Pull(pull) => pull.json,
            Command::Images(images) => images.json,
            Command::Inspect(inspect) => inspect.json,
            Command::Gc(gc) => gc.json,
            Command::Fsck(fsck) => fsck.json,
            Command::Lvm(lvm) => lvm.wants_json(),
            Command::System(system) => system.wants_json(),
            _ => false,
        }
    }

    /// Does it; returns the exit status.
    ///
    /// # Errors
    ///
    /// Why it could not be done.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        match self {
            Command::Build(build) => build.run(report),
            Command::Seal(seal) => seal.run(report),
            Command::Squash(squash) => squash.run(report),
            Command::Rebase(rebase) => rebase.run(report),
            Command::Sign(sign) => sign.run(report),
            Command::Export(export) => export.run(report),
            Command::Verify(verify) => verify.run(report),
            Command::Info(info) => info.run(report),
            Command::Up(up) => up.run(report),
            Command::QemuArgs(qemu_args) => qemu_args.run(report),
            Command::Down(down) => down.run(report),
            Command::Ls(ls) => ls.run(report),
            Command::Enable(enable) => enable.run(report),
            Command::Disable(disable) => disable.run(report),
            Command::Commit(commit) => commit.run(report),
            Command::Push(push) => push.run(report),
            Command::Pull(pull) => pull.run(report),
            Command::Chunks(chunks) => chunks.run(report),
            Command::Trace(trace) => trace.run(report),
            Command::Images(images) => images.run(report),
            Command::Inspect(inspect) => inspect.run(report),
            Command::Tag(tag) => tag.run(report),
            Command::Rmi(rmi) => rmi.run(report),
            Command::Gc(gc) => gc.run(report),
            Command::Fsck(fsck) => fsck.run(report),
            Command::Login(login) => login.run(report),
            Command::Logout(logout) => logout.run(report),
            Command::Lvm(lvm) => lvm.run(report),
            Command::System(system) => system.run(report),
        }
    }
}
