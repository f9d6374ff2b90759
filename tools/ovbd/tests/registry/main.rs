// SPDX-License-Identifier: GPL-2.0

//! Images between files, store and registry, by the command: what goes there comes back, also by way of other tools, and
//! what is no image of block layers is refused by name.

#[path = "../../../oci/tests/common/mod.rs"]
mod registry;

#[path = "../../../layers/tests/common/mod.rs"]
mod layers;

mod convert;
mod hostile;
mod images;
mod secrets;
mod store;
mod turbo;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use layers::{change, programs, raw_image};
use serde_json::Value;

/// A folder with a store, in which the command runs.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn run(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ovbd"))
            .args(line.split_whitespace())
            .current_dir(self.path())
            .env("XDG_RUNTIME_DIR", self.path())
            .env("HOME", self.path())
            .env_remove("SOURCE_DATE_EPOCH")
            .output()
            .unwrap()
    }

    /// What a command prints that must succeed.
    fn good(&self, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that must fail.
    fn bad(&self, line: &str) -> String {
        let output = self.run(line);
        assert_eq!(output.status.code(), Some(1), "{line}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.good(line)).unwrap()
    }

    /// Two layers, two.raw being what both are together.
    fn two_layers(&self) {
        raw_image(&self.path().join("one.raw"), 3 << 20, 1);
        fs::copy(self.path().join("one.raw"), self.path().join("two.raw")).unwrap();
        change(&self.path().join("two.raw"), 2);
        self.good("build -o one.layer one.raw");
        self.good("build --base one.layer --tar -o two.layer two.raw");
    }

    fn is_two(&self, layers: &str) {
        self.good(&format!("export -f --store s {layers} -o out.raw"));
        assert!(
            fs::read(self.path().join("out.raw")).unwrap()
                == fs::read(self.path().join("two.raw")).unwrap()
        );
    }
}
