// SPDX-License-Identifier: GPL-2.0

//! How `ovbd pull --lazy` goes on where no terminal is: as a service of systemd, or as a process of its own.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{net::UnixDatagram, process::CommandExt},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{bail, Result};
use ovbd_devices::{lock::FOLDER, mapped::node};
use ovbd_oci::{Error, Kind};

use crate::report::Report;

/// The program is started again by itself with this option, to go on where no terminal is.
const FOREGROUND: &str = "--foreground";
/// Set in the environment of that one.
const BACKGROUND: &str = "OVBD_BACKGROUND";

/// Starts this program again with `arguments` where it outlives this process, and waits until the stack is there.
pub fn start(name: &str, mut arguments: Vec<OsString>, report: &Report) -> Result<ExitCode> {
    let verb = arguments.iter().position(|word| word == "pull");
    arguments.insert(verb.map_or(0, |verb| verb + 1), FOREGROUND.into());
    let program = std::env::current_exe()?;
    if Path::new("/run/systemd/system").exists() {
        let unit = unit(name);
        let mut command = Command::new("systemd-run");
        command.args([
            "--quiet",
            "--collect",
            "--same-dir",
            "--service-type=notify",
        ]);
        command.arg(format!("--unit={unit}"));
        for property in [
            "Restart=on-failure",
            "RestartSec=1",
            "OOMScoreAdjust=-900",
            "TimeoutStartSec=infinity",
        ] {
            command.arg(format!("--property={property}"));
        }
        if outlives_root() {
            for property in OUTLIVING_ROOT {
                command.arg(format!("--property={property}"));
            }
        }
        for variable in PASSED_ON {
            if std::env::var_os(variable).is_some() {
                command.arg(format!("--setenv={variable}"));
            }
        }
        let status = command.arg("--").arg(program).args(arguments).status()?;
        if !status.success() {
            bail!(Error::new(
                Kind::System,
                &unit,
                format!("did not start (journalctl --unit={unit})")
            ));
        }
        report.print(&format!("{}\n", node(name).display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut child = Command::new(program)
        .args(arguments)
        .env(BACKGROUND, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let mut said = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        // It closes its end when the stack is there.
        io::Read::read_to_string(&mut pipe, &mut said)?;
    }
    match said.is_empty() {
        false => report.print(&said),
        // It has said why.
        true => Ok(match child.wait()?.code() {
            Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
            None => ExitCode::FAILURE,
        }),
    }
}

/// What has systemd leave a process alone while the file systems are unmounted, in `systemctl soft-reboot` too, and in the end:
/// the root file system may be on what it serves (systemd-soft-reboot.service(8)).
const OUTLIVING_ROOT: [&str; 3] = [
    "DefaultDependencies=no",
    "IgnoreOnIsolate=yes",
    "SurviveFinalKillSignal=yes",
];

/// Whether systemd knows all of `OUTLIVING_ROOT`, which came with version 255.
fn outlives_root() -> bool {
    let said = Command::new("systemctl").arg("--version").output();
    // The first line is "systemd 257 (257.8-1~deb13u2)".
    said.ok()
        .and_then(|output| {
            let text = String::from_utf8(output.stdout).ok()?;
            text.split_whitespace().nth(1)?.parse::<u32>().ok()
        })
        .is_some_and(|version| version >= 255)
}

/// What tells where credentials and proxies are.
const PASSED_ON: [&str; 9] = [
    "HOME",
    "XDG_RUNTIME_DIR",
    "REGISTRY_AUTH_FILE",
    "DOCKER_CONFIG",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "RUST_LOG",
];

/// The unit of the process of a stack.
fn unit(name: &str) -> String {
    let mut unit = String::from("ovbd-fetch-");
    for c in name.chars() {
        match c {
            '+' | '=' | '@' => unit.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => unit.push(c),
        }
    }
    unit + ".service"
}

/// Tells systemd that the stack is there.
pub fn ready() {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let send = || -> io::Result<()> {
        let from = UnixDatagram::unbound()?;
        match socket.to_string_lossy().strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt as _;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                from.send_to_addr(b"READY=1", &address)?;
            }
            None => drop(from.send_to(b"READY=1", &socket)?),
        }
        Ok(())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "systemd was not told");
    }
}

/// Closes what the process that started this one listens to, so that it goes on. Messages go to a file beside the status.
pub fn let_go_of_output(name: &str) {
    if std::env::var_os(BACKGROUND).is_none() {
        return;
    }
    let log = Path::new(FOLDER).join(format!("{name}.fetch.log"));
    let open = |path: &Path| {
        fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
    };
    let log = open(&log).or_else(|_| open(Path::new("/dev/null")));
    if let Ok(log) = log {
        let _ = rustix::stdio::dup2_stdout(&log);
        let _ = rustix::stdio::dup2_stderr(&log);
    }
}
