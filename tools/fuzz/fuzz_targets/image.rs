// SPDX-License-Identifier: GPL-2.0

//! Any bytes through the formats, the merge and the index that the kernel's targets share, in memory.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use ovbd_cases::{fuzz::mutate, memory::parse, mutate::mutate_blob};

fuzz_target!(|data: &[u8]| parse(data));

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
