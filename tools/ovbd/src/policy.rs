// SPDX-License-Identifier: GPL-2.0

//! `/etc/ovbd/policy.conf`: which images of which repositories are taken, see ovbd-policy.conf(5).
//!
//! A line has a repository, or the beginning of its name up to a slash, or `*` for all others, and then `accept`, `reject`,
//! or certificates, of which one must have signed the root hash of the image's seal.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ovbd_layers::error::{Error, Result};
use ovbd_oci::Reference;

/// Where the file is.
pub const PATH: &str = "/etc/ovbd/policy.conf";

/// What is demanded of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Nothing.
    Accept,
    /// It is not taken.
    Reject,
    /// The root hash of its seal is signed with the key of one of these certificates.
    SignedBy(Vec<PathBuf>),
}

/// All rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(Vec<(String, Rule)>);

impl Policy {
    /// Reads the file; without one everything is accepted.
    ///
    /// # Errors
    ///
    /// It cannot be read or understood.
    pub fn read(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text.map_err(|e| Error::io(path, "read", e))?,
        };
        Self::parse(&text).map_err(|what| Error::new(path, what))
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut rules: Vec<(String, Rule)> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fail = |what: &str| Err(format!("line {number}: {what}"));
            let mut words = line.split_whitespace();
            let repository = words.next().unwrap_or_default();
            let repository = repository.strip_suffix('/').unwrap_or(repository);
            let rule = match words.collect::<Vec<_>>()[..] {
                [] => return fail("what is demanded of the repository is missing"),
                ["accept"] => Rule::Accept,
                ["reject"] => Rule::Reject,
                ref certificates => {
                    let paths: Vec<PathBuf> = certificates.iter().map(PathBuf::from).collect();
                    if !paths.iter().all(|path| path.is_absolute()) {
                        return fail(
                            "neither accept, reject nor certificates, whose paths begin with /",
                        );
                    }
                    Rule::SignedBy(paths)
                }
            };
            if rules.iter().any(|(known, _)| known == repository) {
                return fail("a second rule for the same repository");
            }
            rules.push((repository.to_owned(), rule));
        }
        Ok(Self(rules))
    }

    /// The rule for an image: that with the longest name that fits.
    pub fn rule(&self, image: &Reference) -> &Rule {
        let name = image.name();
        let fits = |rule: &&(String, Rule)| {
            let rest = name.strip_prefix(rule.0.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let rules = self.0.iter().filter(fits);
        let longest = rules.max_by_key(|(repository, _)| repository.len());
        let rule = longest.or_else(|| self.0.iter().find(|(repository, _)| repository == "*"));
        rule.map_or(&Rule::Accept, |(_, rule)| rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str, image: &str) -> Rule {
        let policy = Policy::parse(text).unwrap();
        policy.rule(&image.parse().unwrap()).clone()
    }

    #[test]
    fn the_longest_name_counts() {
        let text = "# all\n* reject\nreg.example:5000/vm /k/vm.pem /k/old.pem\n\
                    reg.example:5000/vm/free/ accept\n  reg.example accept  \n";
        let signed = Rule::SignedBy(vec!["/k/vm.pem".into(), "/k/old.pem".into()]);
        for (image, wanted) in [
            ("reg.example:5000/vm:mon", &signed),
            ("reg.example:5000/vm/web", &signed),
            ("reg.example:5000/vm/free", &Rule::Accept),
            ("reg.example:5000/vm/free/a/b:c", &Rule::Accept),
            // No more of a name than whole parts.
            ("reg.example:5000/vmware", &Rule::Reject),
            ("reg.example:5000/vm/freedom", &signed),
            ("reg.example/x", &Rule::Accept),
            ("other.example/x", &Rule::Reject),
        ] {
            assert_eq!(&rule(text, image), wanted, "{image}");
        }
        assert_eq!(rule("", "reg.example/x"), Rule::Accept);
    }

    #[test]
    fn what_is_not_understood_is_no_policy() {
        for (text, line) in [
            ("a accept\nreg.example", 2),
            ("a deny", 1),
            ("a accept reject", 1),
            ("a key.pem", 1),
            ("a/ accept\na reject", 2),
        ] {
            let error = Policy::parse(text).unwrap_err();
            assert!(
                error.starts_with(&format!("line {line}: ")),
                "{text}: {error}"
            );
        }
    }
}
