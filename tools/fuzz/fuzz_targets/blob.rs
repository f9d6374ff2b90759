// SPDX-License-Identifier: GPL-2.0

//! Any bytes as a layer, a ZFile, or either in a tar.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_cases::fuzz::Fuzzer;
use std::sync::LazyLock;

static FUZZER: LazyLock<Fuzzer> = LazyLock::new(|| Fuzzer::new().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| FUZZER.blob(data).expect("the file is written"));
