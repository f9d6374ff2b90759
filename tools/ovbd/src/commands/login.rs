// SPDX-License-Identifier: GPL-2.0

//! `ovbd login`.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    process::ExitCode,
};

use anyhow::{bail, Context, Result};
use clap::Args;
use ovbd_oci::{Reference, Registry};
use rustix::termios::{tcgetattr, tcsetattr, LocalModes, OptionalActions};

use crate::{remote::Connection, report::Report};

const EXAMPLES: &str = "Examples:

  ovbd login --user me reg.example:5000
      asks for the password

  ovbd login --user me --creds-file auth.json reg.example:5000 <password
      for programs";

/// Save name and password for a registry.
///
/// They are asked for on the terminal, or the password is the first line of standard input. The registry is asked whether
/// it knows them. They go where skopeo and podman have theirs, which is a folder in /run that is empty after a reboot,
/// or to --creds-file. The file can be read by its owner alone.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Login {
    /// Name of the user
    #[arg(short, long, value_name = "NAME")]
    pub user: Option<String>,
    /// How to reach it.
    #[command(flatten)]
    pub connection: Connection,
    /// The registry: HOST[:PORT]
    #[arg(value_name = "HOST")]
    pub host: String,
}

impl Login {
    /// Asks and saves.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let host = host_of(&self.host)?;
        let terminal = io::stdin().is_terminal();
        let user = match self.user {
            Some(user) => user,
            None if terminal => ask("User: ")?,
            None => bail!("--user is missing: there is no terminal to ask on"),
        };
        let password = if terminal {
            ask_hidden("Password: ")?
        } else {
            line()?
        };
        if user.is_empty() || user.contains(':') || password.is_empty() {
            bail!("name and password must not be empty, nor may there be a colon in the name");
        }
        let options = self.connection.options();
        let keychain = options.keychain.clone();
        Registry::to_pull(&host, options).check_login(&user, &password)?;
        let path = keychain.save(host.host(), &user, &password)?;
        report.print(&format!(
            "{user} for {} saved in {}\n",
            host.host(),
            path.display()
        ))
    }
}

/// Any repository of the registry `host`.
pub fn host_of(host: &str) -> Result<Reference> {
    let reference: Reference = format!("{host}/x")
        .parse()
        .context("not the name of a registry")?;
    if reference.host() != host && host != "index.docker.io" {
        bail!("{host} is not the name of a registry: HOST or HOST:PORT");
    }
    Ok(reference)
}

fn ask(what: &str) -> Result<String> {
    eprint!("{what}");
    io::stderr().flush()?;
    line()
}

fn line() -> Result<String> {
    let mut line = String::new();
    io::stdin()
        .lock()
        .read_line(&mut line)
        .context("cannot read standard input")?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// Asks without showing what is typed.
fn ask_hidden(what: &str) -> Result<String> {
    let terminal = io::stdin();
    let before = tcgetattr(&terminal).context("cannot ask the terminal for its modes")?;
    let mut hidden = before.clone();
    // A signal would leave the terminal as it is now.
    hidden
        .local_modes
        .remove(LocalModes::ECHO | LocalModes::ISIG);
    tcsetattr(&terminal, OptionalActions::Now, &hidden).context("cannot hide what is typed")?;
    let answer = ask(what);
    tcsetattr(&terminal, OptionalActions::Now, &before).ok();
    eprintln!();
    match answer {
        // What the keys that interrupt are without the signal.
        Ok(text) if text.contains(|c: char| c.is_control()) => bail!("interrupted"),
        answer => answer,
    }
}
