// SPDX-License-Identifier: GPL-2.0

//! Any bytes as the data and the index of a writable layer.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_cases::fuzz::Fuzzer;
use std::sync::LazyLock;

static FUZZER: LazyLock<Fuzzer> = LazyLock::new(|| Fuzzer::new().expect("a temporary folder"));

// The length of the data file, the data file, the index file.
fuzz_target!(|input: &[u8]| {
    if let Some((length, files)) = input.split_first_chunk() {
        let at = files.len().min(u32::from_le_bytes(*length) as usize);
        let (data, index) = files.split_at(at);
        FUZZER.pair(data, index).expect("the files are written");
    }
});
