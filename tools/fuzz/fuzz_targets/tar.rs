// SPDX-License-Identifier: GPL-2.0

//! Any bytes as a tar in which the content of files is looked for.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_cases::tars::check;

fuzz_target!(|data: &[u8]| check(data));
