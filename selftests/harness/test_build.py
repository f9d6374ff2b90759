# SPDX-License-Identifier: GPL-2.0
"""Tests of what is copied for kernels that have a tree of their own for the modules."""

import pathlib
import tempfile
import unittest
from unittest import mock

import build


class Copy(unittest.TestCase):
    def test_what_was_generated_stays(self):
        with tempfile.TemporaryDirectory() as folder:
            source, copy = pathlib.Path(folder, "source"), pathlib.Path(folder, "copy")
            for name in build.PARTS:
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_text("") if name == "Kbuild" else (source / name).mkdir()
            for name in ("mod.rs", "bindings_generated.rs", "mod.o"):
                (source / "rust" / name).write_text(name)
            (copy / "rust").mkdir(parents=True)
            (copy / "rust/bindings_generated.rs").write_text("of this kernel")
            with mock.patch.object(build, "SOURCE", source):
                build._copy_to(copy)
            self.assertEqual({path.name for path in (copy / "rust").iterdir()}, {"mod.rs", "bindings_generated.rs"})
            self.assertEqual((copy / "rust/bindings_generated.rs").read_text(), "of this kernel")


if __name__ == "__main__":
    unittest.main()
