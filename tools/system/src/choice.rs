// SPDX-License-Identifier: GPL-2.0

//! The rules: which generation the loader takes, to which one a rollback goes, and which may be removed.

use crate::boot_folder::Generation;

use crate::entry::State;

/// What runs on this machine, as its command line says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Running<'a> {
    /// Number of the generation.
    pub number: Option<u64>,
    /// Its image.
    pub image: Option<&'a str>,
}

impl<'a> Running<'a> {
    /// Of a kernel's command line.
    pub fn of(command_line: &'a str) -> Self {
        Self {
            number: crate::entry::generation(command_line),
            image: crate::entry::stack(command_line).map(|(_, image)| image),
        }
    }

    /// Whether it is this generation. Where the number is missing, every one with its image may be it.
    pub fn is(&self, generation: &Generation) -> bool {
        let image = generation.text.stack().map(|(_, image)| image);
        let same = self.image.is_some() && self.image == image;
        same && self
            .number
            .is_none_or(|number| number == generation.name.number)
    }
}

/// The generations in the order in which a loader takes them: those that are bad are last, whatever their place.
pub fn boot_order(generations: &[Generation]) -> Vec<&Generation> {
    let mut order: Vec<_> = generations.iter().collect();
    order.sort_by_key(|generation| {
        let bad = matches!(generation.state(), State::Bad(_));
        (bad, std::cmp::Reverse(generation.name.order))
    });
    order
}

/// The one that the next boot takes.
pub fn default(generations: &[Generation]) -> Option<&Generation> {
    boot_order(generations).into_iter().next()
}

/// The one that the loader took before the default: what a rollback goes to, and a rollback of that comes back from.
pub fn before_default(generations: &[Generation]) -> Option<&Generation> {
    let order = boot_order(generations);
    let can_be = |generation: &&Generation| !matches!(generation.state(), State::Bad(_));
    order.into_iter().skip(1).find(can_be)
}

/// The newest that has come up.
pub fn last_good(generations: &[Generation]) -> Option<&Generation> {
    let order = boot_order(generations).into_iter();
    let mut good = order.filter(|generation| generation.state() == State::Good);
    good.next()
}

/// Why a generation must stay, if it must.
pub fn why_kept(
    generations: &[Generation],
    generation: &Generation,
    running: Running<'_>,
) -> Option<&'static str> {
    let is = |other: Option<&Generation>| {
        other.is_some_and(|other| other.name.number == generation.name.number)
    };
    if running.is(generation) {
        return Some("this system runs from it");
    }
    if is(default(generations)) {
        return Some("the next boot takes it");
    }
    if is(last_good(generations)) {
        return Some("it is the newest that has come up");
    }
    None
}

/// Those that a prune removes which keeps `keep` of them: never those that must stay.
pub fn superfluous<'a>(
    generations: &'a [Generation],
    keep: usize,
    running: Running<'_>,
) -> Vec<&'a Generation> {
    boot_order(generations)
        .into_iter()
        .skip(keep)
        .filter(|generation| why_kept(generations, generation, running).is_none())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{command_line, Name, Text};

    fn all(names: &[&str]) -> Vec<Generation> {
        let one = |name: &&str| {
            let name = Name::parse(name).unwrap();
            let image = format!("image{}", name.number);
            let options = command_line("", "LABEL=x", &image, name.number);
            Generation {
                name,
                text: Text {
                    options,
                    ..Text::default()
                },
            }
        };
        names.iter().map(one).collect()
    }

    fn numbers<'a>(list: impl IntoIterator<Item = &'a Generation>) -> Vec<u64> {
        list.into_iter().map(|one| one.name.number).collect()
    }

    #[test]
    fn what_a_loader_takes() {
        // 2 has come up again after 3, 4 failed.
        let list = all(&[
            "ovbd-1-1.conf",
            "ovbd-5-2.conf",
            "ovbd-3-3+1-2.conf",
            "ovbd-6-4+0-3.conf",
        ]);
        assert_eq!(numbers(boot_order(&list)), [2, 3, 1, 4]);
        assert_eq!(numbers(default(&list)), [2]);
        assert_eq!(numbers(before_default(&list)), [3]);
        assert_eq!(numbers(last_good(&list)), [2]);
        // If nothing is good, the bad are tried again.
        let list = all(&["ovbd-1-1+0-3.conf", "ovbd-2-2+0-1.conf"]);
        assert_eq!(numbers(default(&list)), [2]);
        assert_eq!(numbers(before_default(&list)), [0; 0]);
        assert_eq!(numbers(last_good(&list)), [0; 0]);
        assert!(default(&[]).is_none());
    }

    #[test]
    fn what_stays() {
        let list = all(&[
            "ovbd-1-1.conf",
            "ovbd-2-2.conf",
            "ovbd-3-3.conf",
            "ovbd-4-4+2-1.conf",
            "ovbd-5-5+0-3.conf",
            "ovbd-6-6+3.conf",
        ]);
        let running = |line| Running::of(line);
        let none = running("root=/dev/sda1");
        // 6 is the default and 3 the newest good one.
        assert_eq!(numbers(superfluous(&list, 0, none)), [4, 2, 1, 5]);
        assert_eq!(numbers(superfluous(&list, 2, none)), [2, 1, 5]);
        let two = running("ovbd=LABEL=x:image2 ovbd.generation=2");
        assert_eq!(numbers(superfluous(&list, 2, two)), [1, 5]);
        // The number of a generation of another machine.
        let other = running("ovbd=LABEL=x:other ovbd.generation=2");
        assert_eq!(numbers(superfluous(&list, 2, other)), [2, 1, 5]);
        // A system that was not booted by an entry, or by one whose words somebody changed.
        let unknown = running("ovbd=LABEL=x:image1 ro");
        assert_eq!(numbers(superfluous(&list, 2, unknown)), [2, 5]);
        assert_eq!(
            why_kept(&list, &list[1], two),
            Some("this system runs from it")
        );
        assert_eq!(
            why_kept(&list, &list[5], two),
            Some("the next boot takes it")
        );
        assert_eq!(why_kept(&list, &list[3], two), None);
        assert_eq!(numbers(superfluous(&list[..1], 0, none)), [0; 0]);
    }
}
