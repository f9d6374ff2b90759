// SPDX-License-Identifier: GPL-2.0

//! How memory is allocated whose size a table or an image decides.

use super::bindings;
use core::mem::transmute;
use kernel::{
    alloc::Flags,
    prelude::*, //
};

// The kernel crate has no name for this flag, and no other way to make one.
//
// SAFETY: `Flags` holds the bits as a `u32` and nothing else: it is as large, and the known flags
// have the same bits on both sides, which is checked below.
const __GFP_RETRY_MAYFAIL: Flags =
    unsafe { transmute::<u32, Flags>(bindings::__GFP_RETRY_MAYFAIL) };

const _: () = {
    const fn bits(flags: Flags) -> u32 {
        // SAFETY: Every value of 4 bytes is a `u32`, and the compiler checks that there are 4.
        unsafe { transmute::<Flags, u32>(flags) }
    }
    assert!(bits(GFP_KERNEL) == bindings::GFP_KERNEL);
    assert!(bits(__GFP_NOWARN) == bindings::__GFP_NOWARN);
};

/// Returns the flags for memory whose size a table or an image decides, for as long as the table is
/// loaded or being loaded.
///
/// It is charged to the control group of whoever loads the table. Where there is not enough memory
/// the allocation tries hard and then fails, without a warning; no process is killed for it.
pub fn gfp_table() -> Flags {
    GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN
}
