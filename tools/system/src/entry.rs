// SPDX-License-Identifier: GPL-2.0

//! A boot entry: a file `loader/entries/ovbd-ORDER-NUMBER[+LEFT[-DONE]].conf`.
//!
//! The name says all that changes later. Of two entries loaders prefer that whose name has the higher version, so ORDER
//! decides, and another generation becomes the default by a rename. NUMBER is what the user calls the generation. LEFT is
//! how often the loader may still try it and DONE how often it has; it counts itself, and whoever calls a boot a success
//! takes both away.

use std::fmt;

/// Its system is on this stack: `ovbd=DEVICE:IMAGE`.
const STACK: &str = "ovbd=";
/// The word by which a running system knows its generation.
const GENERATION: &str = "ovbd.generation=";
const PREFIX: &str = "ovbd-";
const SUFFIX: &str = ".conf";

/// How often it was and may be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tries {
    /// Boots that the loader may still try.
    pub left: u32,
    /// Boots that it has tried.
    pub done: u32,
}

/// What is known of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has come up.
    Good,
    /// It has not come up yet.
    Trying(Tries),
    /// It has not come up in all the boots that it had.
    Bad(Tries),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Good => f.write_str("good"),
            State::Trying(tries) if tries.left == 1 => f.write_str("1 try left"),
            State::Trying(tries) => write!(f, "{} tries left", tries.left),
            State::Bad(_) => f.write_str("bad"),
        }
    }
}

/// What the name of an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// The place: the highest one is the default.
    pub order: u64,
    /// The number of the generation.
    pub number: u64,
    /// None for one that has come up, or whose boots nobody counts.
    pub tries: Option<Tries>,
}

impl Name {
    /// Reads a file's name; None for that of an entry of somebody else.
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
        let (numbers, tries) = match name.split_once('+') {
            None => (name, None),
            Some((numbers, counter)) => {
                let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
                let (left, done) = (number(left)?, number(done)?);
                (numbers, Some(Tries { left, done }))
            }
        };
        let (order, number_) = numbers.split_once('-')?;
        Some(Self {
            order: number(order)?,
            number: number(number_)?,
            tries,
        })
    }
}

/// Digits alone: others' numbers may have signs.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-{}", self.order, self.number)?;
        match self.tries {
            None => {}
            Some(Tries { left, done: 0 }) => write!(f, "+{left}")?,
            Some(Tries { left, done }) => write!(f, "+{left}-{done}")?,
        }
        f.write_str(SUFFIX)
    }
}

/// What an entry says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text {
    /// What a menu shows.
    pub title: String,
    /// Release of the kernel, where it is known.
    pub version: Option<String>,
    /// The kernel, from the top of the boot partition on.
    pub linux: String,
    /// Its initrd.
    pub initrd: String,
    /// The kernel's command line.
    pub options: String,
}

impl Text {
    /// Reads the text of an entry. What others have added there is left out.
    pub fn parse(text: &str) -> Self {
        let mut entry = Self::default();
        let mut options = Vec::new();
        for line in text.lines().map(str::trim) {
            let Some((key, value)) = line.split_once(char::is_whitespace) else {
                continue;
            };
            let value = value.trim();
            match key {
                "title" => entry.title = value.to_owned(),
                "version" => entry.version = Some(value.to_owned()),
                "linux" => entry.linux = value.to_owned(),
                "initrd" => entry.initrd = value.to_owned(),
                "options" => options.push(value),
                _ => {}
            }
        }
        entry.options = options.join(" ");
        entry
    }

    /// Device and image of the command line.
    pub fn stack(&self) -> Option<(&str, &str)> {
        stack(&self.options)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# Written by \"ovbd system\": see ovbd-system(8).")?;
        writeln!(f, "title {}", self.title)?;
        if let Some(version) = &self.version {
            writeln!(f, "version {version}")?;
        }
        writeln!(f, "linux {}", self.linux)?;
        writeln!(f, "initrd {}", self.initrd)?;
        writeln!(f, "options {}", self.options)
    }
}

/// Device and image of a command line.
pub fn stack(options: &str) -> Option<(&str, &str)> {
    let word = options.split_whitespace().rev();
    word.filter_map(|word| word.strip_prefix(STACK))
        .next()?
        .split_once(':')
}

/// The number of the generation that a command line names.
pub fn generation(options: &str) -> Option<u64> {
    let mut words = options.split_whitespace().rev();
    words.find_map(|word| number(word.strip_prefix(GENERATION)?))
}

/// A command line as `options`, for the generation `number` of `image` on `device`.
pub fn command_line(options: &str, device: &str, image: &str, number: u64) -> String {
    let others = options
        .split_whitespace()
        .filter(|word| !word.starts_with(STACK) && !word.starts_with(GENERATION));
    let mut words = vec![format!("{STACK}{device}:{image}")];
    words.extend(others.map(str::to_owned));
    words.push(format!("{GENERATION}{number}"));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (text, order, number, tries) in [
            ("ovbd-12-7.conf", 12, 7, None),
            ("ovbd-1-1+3.conf", 1, 1, Some((3, 0))),
            ("ovbd-1-1+2-1.conf", 1, 1, Some((2, 1))),
            ("ovbd-1-1+0-3.conf", 1, 1, Some((0, 3))),
        ] {
            let tries = tries.map(|(left, done)| Tries { left, done });
            let name = Name {
                order,
                number,
                tries,
            };
            assert_eq!(Name::parse(text), Some(name), "{text}");
            assert_eq!(name.to_string(), text);
        }
        for text in [
            "debian.conf",
            "ovbd-1.conf",
            "ovbd-1-1.conf~",
            "ovbd-1-1+.conf",
            "ovbd-+1-1.conf",
            "ovbd-1--1.conf",
            "ovbd-1-1+3-x.conf",
            "ovbd-1-99999999999999999999.conf",
            ".ovbd-1-1.conf",
        ] {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }

    #[test]
    fn texts() {
        let entry = Text {
            title: "Generation 1: a".to_owned(),
            version: Some("7.3".to_owned()),
            linux: "/ovbd/linux-1".to_owned(),
            initrd: "/ovbd/initrd-1".to_owned(),
            options: command_line(
                "root=/dev/mapper/root ro",
                "UUID=1-2",
                "h.x:5000/a:b@sha256:0",
                4,
            ),
        };
        assert_eq!(Text::parse(&entry.to_string()), entry);
        assert_eq!(entry.stack(), Some(("UUID=1-2", "h.x:5000/a:b@sha256:0")));
        assert_eq!(generation(&entry.options), Some(4));
        let text = "options a b\n#options x\nsort-key y\n\toptions   c\n";
        assert_eq!(Text::parse(text).options, "a b c");
    }

    #[test]
    fn a_command_line_names_one_image() {
        let old = "quiet ovbd=/dev/a:x ovbd.generation=1 ovbd.state=LABEL=state ro";
        let new = command_line(old, "LABEL=b", "y", 2);
        assert_eq!(
            new,
            "ovbd=LABEL=b:y quiet ovbd.state=LABEL=state ro ovbd.generation=2"
        );
        // As root-stack reads it: the last one counts.
        assert_eq!(stack("ovbd=a:b ovbd=c:d"), Some(("c", "d")));
        assert_eq!(generation("ovbd.generation=x quiet"), None);
    }
}
