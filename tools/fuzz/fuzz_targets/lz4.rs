// SPDX-License-Identifier: GPL-2.0

//! Any bytes as an LZ4 block, through our decoders and those of others, next to memory that cannot be accessed.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use ovbd_cases::{
    fuzz::mutate,
    lz4::{mutate_input, Checker, Input},
};
use std::cell::RefCell;

thread_local! {
    static CHECKER: RefCell<Checker> = RefCell::new(Checker::new().expect("there is memory"));
}

fuzz_target!(|data: &[u8]| {
    if let Some(input) = Input::from_bytes(data) {
        CHECKER.with_borrow_mut(|checker| checker.check(&input).expect("the decoders agree"));
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(
        data,
        size,
        max_size,
        seed,
        libfuzzer_sys::fuzzer_mutate,
        mutate_input,
    )
});
