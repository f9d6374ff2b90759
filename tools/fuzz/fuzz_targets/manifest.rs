// SPDX-License-Identifier: GPL-2.0

//! Documents and names of images, as a registry or a layout of somebody else gives them. Errors are fine, panics are bugs.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_cases::documents::check;

fuzz_target!(|data: &[u8]| {
    check(data);
});
