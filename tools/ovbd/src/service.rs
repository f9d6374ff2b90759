// SPDX-License-Identifier: GPL-2.0

//! The services that bring stacks up at boot: `ovbd@NAME.service`.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Result;
use ovbd_devices::programs::run;

use crate::config::Config;

/// The service of a stack.
///
/// # Errors
///
/// systemd is not installed.
pub fn unit(name: &str) -> Result<String> {
    Ok(run("systemd-escape", ["--template=ovbd@.service", name])?
        .trim()
        .to_owned())
}

/// The file that says what the service waits for, among an administrator's additions to it.
pub fn waits_path(unit: &str) -> PathBuf {
    Path::new("/etc/systemd/system")
        .join(format!("{unit}.d"))
        .join("ovbd-layers.conf")
}

/// What systemd must have mounted, and which devices there must be, before the stack can be brought up.
///
/// # Errors
///
/// systemd is not installed.
pub fn waits(config: &Config) -> Result<String> {
    let mut text = "# Written by \"ovbd enable\".\n[Unit]\n".to_owned();
    let cow = config.options.iter().filter_map(|option| {
        let value = option.to_str()?.strip_prefix("--cow=")?;
        Some(PathBuf::from(value))
    });
    let layers = config.layers.iter().map(PathBuf::from);
    for path in layers.chain(cow).filter(|path| path.is_absolute()) {
        let words = ["--path", "--suffix=device"].map(Into::into);
        if path.starts_with("/dev") {
            let unit = run(
                "systemd-escape",
                words.iter().chain([&path.into_os_string()]),
            )?;
            writeln!(text, "Requires={0}\nAfter={0}", unit.trim())?;
        } else {
            writeln!(text, "RequiresMountsFor={}", quoted(&path))?;
        }
    }
    Ok(text)
}

/// A path as a word of a unit file.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let text = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", text.replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_service_waits_for() {
        let config = Config {
            options: vec!["--writable".into(), "--cow=/srv/50% \"full\"".into()],
            layers: vec!["/a b/c".into(), "h.x:5000/a:b".into()],
        };
        let lines = "RequiresMountsFor=\"/a b/c\"\nRequiresMountsFor=\"/srv/50%% \\\"full\\\"\"\n";
        assert!(waits(&config)
            .unwrap()
            .ends_with(&format!("[Unit]\n{lines}")));
    }
}
