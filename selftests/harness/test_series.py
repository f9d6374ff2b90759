# SPDX-License-Identifier: GPL-2.0
"""Tests of what makes sources of the kernel out of those here."""

import unittest

import series

SOURCE = """\
// SPDX-License-Identifier: GPL-2.0

//! About.

// Only a part is used.
#![allow(dead_code, unused_imports)]

use crate::bindings;
use kernel::{
    error::from_result,
    prelude::*, //
};

/// The first.
#[inline]
pub fn first() -> Result {
    from_result(|| Ok(()))
}

/// The second.
pub fn second() -> u32 {
    #[cfg(kernel_since_7_3)]
    {
        bindings::new()
    }
    #[cfg(not(kernel_since_7_3))]
    {
        bindings::old()
    }
}
"""


class SeriesTest(unittest.TestCase):
    def test_an_item_goes_with_its_documentation_and_nothing_else(self):
        text = series.without_item(SOURCE, "pub fn first(")
        self.assertNotIn("first", text)
        self.assertNotIn("inline", text)
        self.assertIn("};\n\n/// The second.\npub fn second", text)
        with self.assertRaises(ValueError):
            series.without_item(SOURCE, "pub fn third(")

    def test_imports_that_nothing_uses_any_more_go(self):
        text = series.without_idle_imports(series.without_item(SOURCE, "pub fn first("), SOURCE)
        self.assertNotIn("from_result", text)
        self.assertIn("prelude::*", text)
        self.assertIn("use crate::bindings;", text)

    def test_one_version_remains(self):
        self.assertIn("new()", series.for_version(SOURCE, (7, 3)))
        self.assertNotIn("old()", series.for_version(SOURCE, (7, 3)))
        self.assertIn("old()", series.for_version(SOURCE, (7, 2)))
        self.assertNotIn("new()", series.for_version(SOURCE, (7, 2)))
        self.assertNotIn("cfg", series.for_version(SOURCE, (7, 2)))

    def test_sources_of_the_crate(self):
        text = series.crate_form(SOURCE, (7, 3))
        self.assertNotIn("allow", text)
        self.assertNotIn("Only a part", text)
        self.assertIn("use crate::{\n    error::from_result", text)

    def test_sources_of_a_target(self):
        text = series.target_form('use kernel::prelude::*;\n\n#[allow(unsafe_code)]\n'
                                  '#[path = "../rust/device_mapper/mod.rs"]\npub mod device_mapper;\n'
                                  '#[path = "../rust/image/mod.rs"]\npub mod image;\n', (7, 3))
        self.assertEqual(text, 'use kernel::{\n    prelude::*,\n    device_mapper, //\n};\n\n'
                               '#[path = "../image/mod.rs"]\npub mod image;\n')

    def test_helpers_keep_their_alignment(self):
        self.assertEqual(
            series.helper_form("void rust_helper_advance(const struct bio *bio,\n\t\t\t   struct bvec_iter *iter, "
                               "unsigned int bytes)\n{\n\tadvance();\n}\n"),
            "__rust_helper void rust_helper_advance(const struct bio *bio, struct bvec_iter *iter,\n"
            "\t\t\t\t       unsigned int bytes)\n{\n\tadvance();\n}\n")
