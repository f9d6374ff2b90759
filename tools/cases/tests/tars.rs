// SPDX-License-Identifier: GPL-2.0

//! Damaged tars, the same ones each time.

use ovbd_cases::tars::{check, damaged};

#[test]
fn what_is_found_is_what_was_looked_for() {
    for number in 0..3000 {
        let tar = damaged(number);
        let checked = std::panic::catch_unwind(|| check(&tar));
        assert!(checked.is_ok(), "tar {number}");
    }
}
