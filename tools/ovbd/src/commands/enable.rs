// SPDX-License-Identifier: GPL-2.0

//! `ovbd enable`.

use std::{
    ffi::OsString,
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Args;
use ovbd_devices::{
    check_root,
    list::{Entry, List},
    programs::run,
    running::check_name,
};
use ovbd_layers::{error::Error, layer::LayerPath, parents::Parents, stack_or_zfile::StackOrZfile};

use crate::{
    config::{self, Config},
    report::Report,
    service,
};

/// Bring a stack up at every boot.
///
/// What it is made of is in /etc/ovbd/NAME.conf (see ovbd.conf(5)). Where that file is missing it is written from
/// the stack that is up. Further, what the service ovbd@NAME.service waits for is written, and it is enabled.
#[derive(Debug, Args)]
pub struct Enable {
    /// Write the file from the stack that is up, also if there is one
    #[arg(short, long)]
    pub force: bool,
    /// Name of the stack
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Where names of block devices are that stay the same at the next boot.
const STABLE_NAMES: [&str; 3] = ["by-id", "by-partuuid", "by-path"];

impl Enable {
    /// Writes the files and enables the service.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        check_root()?;
        check_name(&self.name)?;
        let path = config::path(Path::new("/"), &self.name);
        if self.force || !path.exists() {
            let list = List::new()?;
            let entry = list
                .find(&self.name)
                .ok_or_else(|| Error::new(&path, "no stack of that name is up to write it from"))?;
            let config = config_of(entry, report)?;
            write(&path, &config.text(&path)?)?;
            report.print(&format!("{}: written\n", path.display()))?;
        } else {
            report.print(&format!("{}: kept as it is\n", path.display()))?;
        }
        let unit = service::unit(&self.name)?;
        let waits = service::waits(&Config::read(&path)?)?;
        write(&service::waits_path(&unit), waits.as_bytes())?;
        run("systemctl", ["enable", &unit]).context("cannot enable the service")?;
        report.print(&format!("{unit}: enabled\n"))
    }
}

/// What brings the stack up again that is up.
fn config_of(stack: &Entry, report: &Report) -> Result<Config> {
    let mut config = Config::default();
    let mut layers = Vec::new();
    for layer in &stack.layers {
        let path = stable_name(&layer.path);
        fs::metadata(&path).map_err(|e| Error::io(&path, "look up", e))?;
        layers.push(LayerPath::Sealed(path.clone()));
        config.layers.push(path.into());
    }
    if layers.is_empty() {
        let what = "incomplete; \"ovbd down\" removes it";
        return Err(Error::new(Path::new(&stack.name), what).into());
    }
    if let Err(error) = StackOrZfile::open(&layers, Parents::All) {
        StackOrZfile::open(&layers, Parents::Ignored).map_err(|_| error)?;
        config.options.push("--ignore-parents".into());
    }
    if let Some(verity) = &stack.verity {
        config
            .options
            .push(format!("--verity={}", verity.root).into());
        if verity.signed {
            let what = "the kernel checked a signature, which it does not give back: add \"signature FILE\" to the file";
            ovbd_layers::report::Report::warn(report, &Error::new(Path::new(&stack.name), what));
        }
    }
    if let Some(cow) = &stack.cow {
        config.options.push("--writable".into());
        let path = stable_name(&cow.path);
        if path.exists() {
            let mut option = OsString::from("--cow=");
            option.push(path);
            config.options.push(option);
        } else {
            let what = "has no --cow: what is written is lost whenever it goes down";
            ovbd_layers::report::Report::warn(report, &Error::new(Path::new(&stack.name), what));
        }
    }
    Ok(config)
}

/// A name for a file or device that is the same at the next boot, if there is one.
fn stable_name(path: &Path) -> PathBuf {
    let kernel_name = path.parent() == Some(Path::new("/dev"));
    if !kernel_name {
        return path.to_owned();
    }
    for folder in STABLE_NAMES {
        let Ok(entries) = fs::read_dir(Path::new("/dev/disk").join(folder)) else {
            continue;
        };
        let links = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let links = links.filter(|link| fs::canonicalize(link).is_ok_and(|found| found == path));
        if let Some(link) = links.min() {
            return link;
        }
    }
    path.to_owned()
}

/// Writes a file as a whole, and its folder if it is missing.
fn write(path: &Path, text: &[u8]) -> Result<()> {
    let fail = |e| Error::io(path, "write", e);
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(fail)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(fail)?;
    let readable = fs::Permissions::from_mode(0o644);
    file.as_file().set_permissions(readable).map_err(fail)?;
    file.write_all(text).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_stay() {
        for path in [
            "/srv/a",
            "/dev/mapper/a",
            "/dev/vg/a",
            "/dev/no-such-device",
        ] {
            assert_eq!(stable_name(Path::new(path)), Path::new(path));
        }
    }
}
