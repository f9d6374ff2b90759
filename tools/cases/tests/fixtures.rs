// SPDX-License-Identifier: GPL-2.0

//! Every case that the original library wrote.
//!
//! They are looked for in the folder that `OVBD_FIXTURES` names, else in `shared/fixtures` beside the
//! repository; without either the test says so and does nothing.

use std::{env, path::PathBuf};

#[test]
fn fixtures() {
    let folder = env::var_os("OVBD_FIXTURES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures"),
        PathBuf::from,
    );
    if !folder.exists() {
        eprintln!("no fixtures at {}", folder.display());
        return;
    }
    let cases = ovbd_cases::find(&folder).expect("the folder can be listed");
    assert!(!cases.is_empty(), "no cases in {}", folder.display());
    let different: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let how = ovbd_cases::run(case).err()?;
            Some(format!("{}: {how}", case.display()))
        })
        .collect();
    assert!(
        different.is_empty(),
        "{} of {} cases differ:\n{}",
        different.len(),
        cases.len(),
        different.join("\n")
    );
}
