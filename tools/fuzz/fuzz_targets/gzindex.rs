// SPDX-License-Identifier: GPL-2.0

//! Any bytes as a gzip file and an index of the places in it at which one can begin.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_cases::gzip_indexes::Checker;
use std::sync::LazyLock;

static CHECKER: LazyLock<Checker> = LazyLock::new(|| Checker::new().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| CHECKER.check(data).expect("the files are written"));
