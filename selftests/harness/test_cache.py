# SPDX-License-Identifier: GPL-2.0
"""Tests of what must be where."""

import os
import tempfile
import unittest

import cache


class GuestsSee(unittest.TestCase):
    def test_hidden(self):
        for place in ("/tmp/checkout", "/var/tmp/x/checkout", "/run", "/usr/../tmp/checkout"):
            with self.assertRaisesRegex(cache.Failure, "^checkout /.* is in /.*: move it elsewhere$"):
                cache.check_guests_see(checkout=place)

    def test_link(self):
        with tempfile.TemporaryDirectory(dir=cache.SOURCE) as folder:
            link = f"{folder}/link"
            os.symlink("/tmp", link)
            with self.assertRaises(cache.Failure):
                cache.check_guests_see(cache=f"{link}/cache")

    def test_seen(self):
        cache.check_guests_see(checkout="/srv/tmp/checkout", cache="/var/cache/dm-overlaybd", CASES="/tmpfiles")


if __name__ == "__main__":
    unittest.main()
