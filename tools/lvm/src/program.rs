// SPDX-License-Identifier: GPL-2.0

//! Running the programs of LVM, of device-mapper and of thin-provisioning-tools.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, ErrorKind, Read},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
};

use ovbd_layers::error::{Error, Result};

/// Bytes of what a program says on stderr that are kept.
const MAX_STDERR: u64 = 64 << 10;

/// Characters of what a program said on stderr that an error shows.
const MAX_SAID: usize = 1000;

/// The package of Debian, and of most others, that a program is in.
fn package(program: &str) -> &'static str {
    match program {
        "dmsetup" => "dmsetup",
        "thin_delta" | "thin_dump" => "thin-provisioning-tools",
        _ => "lvm2",
    }
}

/// Runs a program and returns what it prints; errors are about `subject`.
///
/// # Errors
///
/// It is not installed, or it failed: with what it said.
pub fn run<S: AsRef<OsStr>>(
    subject: &Path,
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<Vec<u8>> {
    let output = command(program, arguments).output();
    let output = output.map_err(|e| not_run(subject, program, e))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(failed(subject, program, &output.stderr)),
    }
}

/// What a program of LVM ends with that does not know an option, before it has done anything.
const WRONG_USAGE: i32 = 3;

/// As [`run`], for options that not every version has; false if this one does not know them, and nothing was done.
///
/// # Errors
///
/// As [`run`].
pub fn run_if_known<S: AsRef<OsStr>>(
    subject: &Path,
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<bool> {
    let output = command(program, arguments).output();
    let output = output.map_err(|e| not_run(subject, program, e))?;
    match output.status.code() {
        Some(0) => Ok(true),
        Some(WRONG_USAGE) => Ok(false),
        _ => Err(failed(subject, program, &output.stderr)),
    }
}

/// Runs a program and has `read` read what it prints, as it comes; errors are about `subject`. Returns what `read` returns,
/// unless the program failed.
///
/// # Errors
///
/// As [`run`].
pub fn run_and_read<S: AsRef<OsStr>, T>(
    subject: &Path,
    program: &str,
    arguments: impl IntoIterator<Item = S>,
    read: impl FnOnce(&mut dyn BufRead) -> T,
) -> Result<T> {
    let mut command = command(program, arguments);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| not_run(subject, program, e))?;
    let fail = |e| Error::io(subject, &format!("run {program}"), e);
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let (result, said) = std::thread::scope(|scope| {
        // It could not go on if nobody took what it says.
        let said = scope.spawn(|| {
            let mut said = Vec::new();
            if let Some(mut errors) = errors {
                let _ = errors.by_ref().take(MAX_STDERR).read_to_end(&mut said);
                let _ = std::io::copy(&mut errors, &mut std::io::sink());
            }
            said
        });
        let output: Box<dyn Read> = match output {
            Some(output) => Box::new(output),
            None => Box::new(std::io::empty()),
        };
        let mut output = BufReader::new(output);
        let result = read(&mut output);
        // What is wrong with it is known when it has come to its end.
        let drained = std::io::copy(&mut output, &mut std::io::sink());
        (drained.map(|_| result), said.join().unwrap_or_default())
    });
    let status = child.wait().map_err(fail)?;
    match status.success() {
        true => result.map_err(fail),
        false => Err(failed(subject, program, &said)),
    }
}

/// In the environment of every program that is run: by which process.
const STARTED_BY: &str = "OVBD_STARTED_BY";

/// Number of this process, and when it was started, in ticks since the boot: no other one has both.
pub fn this_process() -> String {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name, which may have any characters, is in parentheses; of what follows the start is the 20th.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let start = rest.split_whitespace().nth(19).unwrap_or("0");
    format!("{}.{start}", std::process::id())
}

/// Whether a program runs that `process` started, which is gone itself perhaps. What LVM leaves running for long does not
/// count, nor what another user runs: everybody may have anything in the environment.
pub fn runs_for(process: &str) -> bool {
    let wanted = format!("{STARTED_BY}={process}");
    let own = rustix::process::geteuid().as_raw().to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.map(|entry| entry.path()).any(|process| {
        let Ok(environment) = std::fs::read(process.join("environ")) else {
            return false;
        };
        if !environment
            .split(|byte| *byte == 0)
            .any(|word| word == wanted.as_bytes())
        {
            return false;
        }
        let status = std::fs::read_to_string(process.join("status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let name = field("Name:").unwrap_or_default().trim();
        // The real, the effective and the saved user, and that for files: of a setuid program they differ.
        let mut users = field("Uid:").unwrap_or_default().split_whitespace();
        !matches!(name, "dmeventd" | "lvmpolld") && users.all(|user| user == own)
    })
}

fn command<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .env(STARTED_BY, this_process())
        .stdin(Stdio::null())
        // A Ctrl-C is for us alone: what was begun is completed, then undone.
        .process_group(0);
    command
}

fn not_run(subject: &Path, program: &str, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound => {
            let what = format!(
                "{program} is missing: install the package {}",
                package(program)
            );
            Error::new(subject, what)
        }
        _ => Error::io(subject, &format!("run {program}"), error),
    }
}

fn failed(subject: &Path, program: &str, stderr: &[u8]) -> Error {
    let text = String::from_utf8_lossy(stderr);
    let lines = text.lines().map(str::trim).filter(|line| {
        // What LVM says of its own circumstances is not why it failed.
        !line.is_empty() && !line.starts_with("WARNING:") && !line.starts_with("File descriptor")
    });
    let said: String = lines
        .collect::<Vec<_>>()
        .join("; ")
        .chars()
        .take(MAX_SAID)
        .collect();
    Error::new(subject, format!("{program}: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_package() {
        let error = not_run(
            Path::new("vg/pool"),
            "thin_delta",
            ErrorKind::NotFound.into(),
        );
        let wanted = "vg/pool: thin_delta is missing: install the package thin-provisioning-tools";
        assert_eq!(error.to_string(), wanted);
    }

    #[test]
    fn programs_that_run_are_seen() {
        let mut child = command("sleep", ["60"]).spawn().unwrap();
        let start = std::time::Instant::now();
        while !runs_for(&this_process()) {
            assert!(start.elapsed().as_secs() < 30);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!runs_for("4294967295.0"));
        assert!(!this_process().ends_with(".0"));
    }

    /// Whoever knows the number of a process can have it in an environment of their own.
    #[test]
    fn programs_of_other_users_do_not_count() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root runs programs as another user");
            return;
        }
        let run = |user: u32| {
            Command::new("sleep")
                .arg("60")
                .env(STARTED_BY, "another.1")
                .uid(user)
                .spawn()
                .unwrap()
        };
        let mut others = run(65534);
        // Once it is another program, it has its environment.
        let start = std::time::Instant::now();
        let environment = format!("/proc/{}/environ", others.id());
        while !std::fs::read(&environment)
            .is_ok_and(|text| text.windows(9).any(|w| w == b"another.1"))
        {
            assert!(start.elapsed().as_secs() < 30);
        }
        assert!(!runs_for("another.1"));
        let mut own = run(0);
        while !runs_for("another.1") {
            assert!(start.elapsed().as_secs() < 60);
        }
        for child in [&mut others, &mut own] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn options_that_are_not_known() {
        let run = |code: &str| run_if_known(Path::new("vg/x"), "sh", ["-c", code]);
        assert!(run("true").unwrap());
        assert!(!run("exit 3").unwrap());
        assert!(run("exit 5").is_err());
    }

    #[test]
    fn what_a_program_prints_is_read_as_it_comes() {
        let subject = Path::new("vg/x");
        let run = |script: &str, most: u64| {
            run_and_read(subject, "sh", ["-c", script], |text| {
                let mut first = String::new();
                text.take(most).read_to_string(&mut first).unwrap();
                first
            })
        };
        assert_eq!(run("echo text", 100).unwrap(), "text\n");
        // It is not stopped where no more of it is wanted, however much it says.
        let many = "head -c 300000 /dev/zero | tr '\\0' x | tee /dev/stderr; exit 0";
        assert_eq!(run(many, 3).unwrap(), "xxx");
        let error = run("echo text; echo '  No such' >&2; exit 5", 3).unwrap_err();
        assert_eq!(error.to_string(), "vg/x: sh: No such");
        let error = run_and_read(subject, "thin_missing", ["x"], |_| ()).unwrap_err();
        assert!(error.to_string().contains("is missing"), "{error}");
    }

    #[test]
    fn what_a_program_says_is_in_the_error() {
        let words = [
            "-c",
            "echo '  WARNING: of something' >&2; echo '  No such' >&2; exit 5",
        ];
        let error = run(Path::new("vg/x"), "sh", words).unwrap_err();
        assert_eq!(error.to_string(), "vg/x: sh: No such");
        let many = ["-c", "head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1"];
        let error = run(Path::new("vg/x"), "sh", many).unwrap_err();
        assert!(error.to_string().len() < 1100);
    }
}
