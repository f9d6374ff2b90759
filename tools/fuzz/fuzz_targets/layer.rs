// SPDX-License-Identifier: GPL-2.0

//! Any bytes as a layer, a ZFile, or either in a tar, through the library: verify, open and read.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use ovbd_cases::{
    fuzz::{mutate, Fuzzer},
    mutate::mutate_blob,
};
use std::sync::LazyLock;

static FUZZER: LazyLock<Fuzzer> = LazyLock::new(|| Fuzzer::new().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| FUZZER.blob(data).expect("the file is written"));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(
        data,
        size,
        max_size,
        seed,
        libfuzzer_sys::fuzzer_mutate,
        mutate_blob,
    )
});
