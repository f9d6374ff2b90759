// SPDX-License-Identifier: GPL-2.0

//! `/etc/ovbd/NAME.conf`: what `ovbd up NAME` takes where the command line has no layers.
//!
//! A line has a word and, where the word wants one, its value: `layer` and a layer, or a long option of `ovbd up`
//! without its dashes.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use ovbd_layers::error::{Error, Result};

/// Where the files are.
pub const FOLDER: &str = "etc/ovbd";

/// Options that are for one call: they overwrite something, or do nothing.
const NOT_IN_A_FILE: [&str; 4] = ["wipe-cow", "dry-run", "config", "force"];

/// The file for the stack `name`, of the system whose `/` is `root`.
pub fn path(root: &Path, name: &str) -> PathBuf {
    root.join(FOLDER).join(format!("{name}.conf"))
}

/// The names of all files that are layers of stacks of the system whose `/` is `root`, up or not.
///
/// # Errors
///
/// A file that cannot be read or understood: what it needs is not known then.
pub fn layer_files(root: &Path) -> Result<Vec<OsString>> {
    let folder = root.join(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| Error::io(&folder, "list", e))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(&folder, "list", e))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "conf")
        {
            let layers = Config::read(&path)?.layers.into_iter();
            names
                .extend(layers.filter_map(|layer| Some(Path::new(&layer).file_name()?.to_owned())));
        }
    }
    Ok(names)
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Options, as on the command line.
    pub options: Vec<OsString>,
    /// Layers, bottom first.
    pub layers: Vec<OsString>,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// It cannot be read, has no layer, or has an option that a file may not have.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|e| Error::io(path, "read", e))?;
        let config = Self::parse(&bytes).map_err(|what| Error::new(path, what))?;
        match config.layers.is_empty() {
            true => Err(Error::new(path, "names no layer")),
            false => Ok(config),
        }
    }

    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut config = Self::default();
        for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let end = line.iter().position(u8::is_ascii_whitespace);
            let (word, value) = line.split_at(end.unwrap_or(line.len()));
            let value = value.trim_ascii_start();
            let fail = |what: &str| Err(format!("line {}: {what}", number + 1));
            let Some(word) = std::str::from_utf8(word)
                .ok()
                .filter(|word| is_option(word))
            else {
                return fail("not \"layer\" or a long option of ovbd up without its dashes");
            };
            match word {
                "layer" if value.is_empty() => return fail("layer of what name?"),
                "layer" if value.starts_with(b"-") => {
                    return fail("the name of a layer cannot begin with -")
                }
                "layer" => config.layers.push(OsString::from_vec(value.to_vec())),
                _ if NOT_IN_A_FILE.contains(&word) => {
                    return fail(&format!("{word} is for the command line only"))
                }
                _ if value.is_empty() => config.options.push(format!("--{word}").into()),
                _ => {
                    let mut option = OsString::from(format!("--{word}="));
                    option.push(OsString::from_vec(value.to_vec()));
                    config.options.push(option);
                }
            }
        }
        Ok(config)
    }

    /// The text of a file that says this.
    ///
    /// # Errors
    ///
    /// A name that does not fit into a line; the error is about `path`.
    pub fn text(&self, path: &Path) -> Result<Vec<u8>> {
        let mut text = b"# What \"ovbd up\" makes of this: see ovbd.conf(5).\n".to_vec();
        let mut line = |word: &[u8], value: &[u8]| {
            if value.contains(&b'\n') || value.trim_ascii() != value {
                let what = "would need a name with a line break, or a blank at its end";
                return Err(Error::new(path, what));
            }
            text.extend_from_slice(word);
            if !value.is_empty() {
                text.push(b' ');
                text.extend_from_slice(value);
            }
            text.push(b'\n');
            Ok(())
        };
        for layer in &self.layers {
            line(b"layer", layer.as_bytes())?;
        }
        for option in &self.options {
            let option = option.as_bytes();
            let option = option.strip_prefix(b"--").unwrap_or(option);
            match option.iter().position(|byte| *byte == b'=') {
                Some(at) => line(&option[..at], &option[at + 1..])?,
                None => line(option, b"")?,
            }
        }
        Ok(text)
    }
}

fn is_option(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_lowercase() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let config = Config {
            options: vec!["--writable".into(), "--cow=/dev/a=b c".into()],
            layers: vec!["/a b/c".into(), "h.x:5000/a:b".into(), "/#".into()],
        };
        let text = config.text(Path::new("x")).unwrap();
        assert_eq!(Config::parse(&text), Ok(config));
        for bad in ["/a\nb", "/a "] {
            let config = Config {
                layers: vec![bad.into()],
                ..Config::default()
            };
            assert!(config.text(Path::new("x")).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn files_of_all_stacks() {
        let root = tempfile::tempdir().unwrap();
        assert!(layer_files(root.path()).unwrap().is_empty());
        let folder = root.path().join(FOLDER);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("a.conf"), "layer /s/one\nlayer h.x/a:b\n").unwrap();
        fs::write(folder.join("b.conf"), "layer /s/two\n").unwrap();
        fs::write(folder.join("b.conf~"), "wrong\n").unwrap();
        let mut found = layer_files(root.path()).unwrap();
        found.sort();
        assert_eq!(found, ["a:b", "one", "two"]);
        fs::write(folder.join("c.conf"), "layer\n").unwrap();
        assert!(layer_files(root.path()).is_err());
    }

    #[test]
    fn what_a_file_may_say() {
        let text = b"\n # x\n\tlayer  /a\t\nsize 5G\r\n layer b c\nwritable";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.layers, ["/a", "b c"]);
        assert_eq!(config.options, ["--size=5G", "--writable"]);
        for (text, line) in [
            ("layer a\nwipe-cow", 2),
            ("force", 1),
            ("--writable", 1),
            ("layer", 1),
            ("layer -x", 1),
            ("cow=/a", 1),
            ("\u{fc} a", 1),
        ] {
            let error = Config::parse(text.as_bytes()).unwrap_err();
            assert!(
                error.starts_with(&format!("line {line}: ")),
                "{text}: {error}"
            );
        }
    }
}
