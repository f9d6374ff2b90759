// SPDX-License-Identifier: GPL-2.0

//! Any bytes as a ZFile whose digests are right.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_cases::fuzz::{repair, Fuzzer};
use std::sync::LazyLock;

static FUZZER: LazyLock<Fuzzer> = LazyLock::new(|| Fuzzer::new().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| {
    let mut data = data.to_vec();
    repair(&mut data);
    FUZZER.blob(&data).expect("the file is written");
});
