// SPDX-License-Identifier: GPL-2.0

//! Any bytes as the index of a writable layer, and as its data.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_cases::fuzz::Fuzzer;
use std::sync::LazyLock;

static FUZZER: LazyLock<Fuzzer> = LazyLock::new(|| Fuzzer::new().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| FUZZER.pair(data, data).expect("the files are written"));
