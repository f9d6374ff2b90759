// SPDX-License-Identifier: GPL-2.0

//! The steps of a plan as shell commands, which do the same when they are pasted.

use std::{fmt::Write as _, fs, path::Path};

use base64::prelude::{Engine as _, BASE64_STANDARD};

use crate::{
    mapped::node,
    plan::{Device, Line, Step, UNNAMED_FOLDER},
};

/// The steps as shell commands.
pub fn print(steps: &[Step]) -> String {
    let mut text = String::new();
    let mut loops = Vec::new();
    for step in steps {
        print_step(step, &mut loops, &mut text);
    }
    if !loops.is_empty() {
        // In use, they are only marked to go with the mapped devices.
        text += "losetup --detach";
        for variable in loops {
            let _ = write!(text, " ${variable}");
        }
        text.push('\n');
    }
    text
}

fn print_step(step: &Step, loops: &mut Vec<String>, text: &mut String) {
    let result = match step {
        Step::Key {
            description,
            signature,
        } => {
            let signature = BASE64_STANDARD.encode(signature);
            writeln!(
                text,
                "echo {signature} | base64 --decode | keyctl padd user {description} @s"
            )
        }
        Step::Layer {
            variable,
            path,
            part,
        } => {
            loops.push(variable.clone());
            let path = quote(path);
            writeln!(
                text,
                "{variable}=$(losetup --find --show --read-only --direct-io=on --sector-size {} \
                 --offset {} --sizelimit {} {path})",
                part.block_bytes, part.offset, part.bytes
            )
        }
        Step::Tails { variable, tails } => {
            loops.push(variable.clone());
            text.push_str("file=$(mktemp)\n");
            for tail in tails {
                let block = u64::from(tail.block_bytes);
                let bytes = fs::metadata(&tail.path).map_or(0, |found| found.len()) % block;
                let path = quote(&tail.path);
                let _ = writeln!(
                    text,
                    "tail -c {bytes} {path} >>$file; truncate -s +{} $file",
                    block - bytes
                );
            }
            writeln!(
                text,
                "{variable}=$(losetup --find --show --read-only $file); rm $file"
            )
        }
        Step::Memory { variable, bytes } => {
            loops.push(variable.clone());
            let text64 = BASE64_STANDARD.encode(bytes);
            writeln!(
                text,
                "file=$(mktemp)\n\
                 base64 --decode >$file <<END\n{text64}\nEND\n\
                 {variable}=$(losetup --find --show --read-only $file); rm $file"
            )
        }
        Step::Cow {
            variable,
            path,
            create,
            ..
        } => {
            loops.push(variable.clone());
            let name = match path {
                Some(path) => quote(path),
                None => {
                    let _ = writeln!(text, "file=$(mktemp --tmpdir={UNNAMED_FOLDER})");
                    "$file".to_owned()
                }
            };
            if let Some(bytes) = create {
                let _ = writeln!(text, "truncate -s {bytes} {name}");
            }
            let _ = write!(
                text,
                "{variable}=$(losetup --find --show --direct-io=on {name})"
            );
            text.write_str(if path.is_none() { "; rm $file\n" } else { "\n" })
        }
        Step::Reload { name, table, .. } => {
            let table = print_table(table);
            writeln!(
                text,
                "dmsetup load {name} --readonly --table \"{table}\"\n\
                 dmsetup resume --nolockfs {name}"
            )
        }
        // dm-snapshot makes a store of zeros, and "ovbd commit" gives it a record.
        Step::Begin { .. } => Ok(()),
        Step::Wipe { path, bytes } => {
            let path = quote(path);
            writeln!(
                text,
                "wipefs --all --quiet {path}\n\
                 dd if=/dev/zero of={path} bs={bytes} count=1 conv=notrunc,fsync status=none"
            )
        }
        Step::Map {
            name,
            uuid,
            read_only,
            table,
            ..
        } => {
            let option = if *read_only { "--readonly " } else { "" };
            let table = print_table(table);
            writeln!(
                text,
                "dmsetup create {name} {option}--uuid {uuid} --table \"{table}\""
            )
        }
    };
    // Writing to a string does not fail.
    result.unwrap_or_default();
}

fn print_table(table: &[Line]) -> String {
    let lines: Vec<String> = table
        .iter()
        .map(|line| format!("{} {} {}", line.start, line.sectors, line.words(in_shell)))
        .collect();
    lines.join("\n")
}

fn quote(path: &Path) -> String {
    // A path with a NUL byte could not be opened either.
    shlex::try_quote(&path.to_string_lossy()).map_or_else(|_| String::new(), Into::into)
}

/// A device as a word between double quotes of a shell.
fn in_shell(device: &Device) -> String {
    match device {
        Device::Mapped(name) => node(name).to_string_lossy().into_owned(),
        Device::Loop(variable) => format!("${variable}"),
        Device::Number(number) => number.to_string(),
        Device::Path(path) => match path.to_str() {
            Some(plain) if plain.chars().all(is_plain) => plain.to_owned(),
            // Neither the shell nor device-mapper splits a number.
            _ => format!(
                "$(lsblk --nodeps --noheadings --raw --output MAJ:MIN {})",
                quote(path)
            ),
        },
    }
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/+-._=:@".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Word;

    fn map(device: &str) -> Step {
        Step::Map {
            name: "stack".to_owned(),
            uuid: "UUID-stack".to_owned(),
            read_only: true,
            table: vec![Line {
                start: 0,
                sectors: 8,
                words: vec!["target".into(), Word::Device(Device::Path(device.into()))],
            }],
        }
    }

    #[test]
    fn names_of_devices_are_safe_in_a_shell() {
        for (path, wanted) in [
            ("/dev/sdb", "/dev/sdb"),
            ("/dev/mapper/vg-lv.0", "/dev/mapper/vg-lv.0"),
            (
                "/dev/a b",
                "$(lsblk --nodeps --noheadings --raw --output MAJ:MIN '/dev/a b')",
            ),
            (
                "/dev/$(reboot)",
                "$(lsblk --nodeps --noheadings --raw --output MAJ:MIN '/dev/$(reboot)')",
            ),
        ] {
            let text = print(&[map(path)]);
            assert!(
                text.contains(&format!("--table \"0 8 target {wanted}\"")),
                "{text}"
            );
        }
    }
}
