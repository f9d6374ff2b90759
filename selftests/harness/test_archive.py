# SPDX-License-Identifier: GPL-2.0
"""Tests of the choice of kernels: what archives really held, and what they will hold one day."""

import unittest

from archive import CLOUD, GENERAL, Archive
from cache import Failure


class FakeArchive(Archive):
    """An archive of the packages given, by name, with their versions."""

    def __init__(self, held, flavour=CLOUD):
        self.held = held
        self.flavour = flavour

    def names(self, prefix):
        return [name for name in self.held if name.startswith(prefix)]

    def versions(self, package):
        return self.held.get(package, set())


def kernels(*releases, flavour=CLOUD):
    """Packages of the releases, as `7.2.12` and with what is missing of them, if anything."""
    held = {"linux-headers-6.12.9+deb13-cloud-amd64": {"6.12.9-1"}, "linux-headers-cloud-amd64": {"7.2.12-1"}}
    for release, missing in releases:
        for built in ("amd64", "cloud-amd64", "rt-amd64"):
            for part in ("image", "headers"):
                if part != missing:
                    held[f"linux-{part}-{release}+deb13-{built}"] = {f"{release}-1"}
        if missing != "source":
            held.setdefault(f"linux-source-{release.rsplit('.', 1)[0]}", set()).add(f"{release}-1")
    return FakeArchive(held, flavour)


class ArchiveTest(unittest.TestCase):
    def test_newest_and_oldest(self):
        archive = kernels(("7.2.9", None), ("7.2.12", None), ("7.10.1", None), ("7.3.4", None))
        self.assertEqual(archive.newest().name, "7.10.1+deb13-cloud-amd64")
        release, shortfall = archive.oldest()
        self.assertEqual((release.name, release.version), ("7.2.12+deb13-cloud-amd64", "7.2.12-1"))
        self.assertIsNone(shortfall)

    def test_incomplete_releases_are_passed_over(self):
        archive = kernels(("7.2.9", None), ("7.2.12", "image"), ("7.3.4", None), ("7.3.5", "source"))
        self.assertEqual(archive.newest().name, "7.3.4+deb13-cloud-amd64")
        release, shortfall = archive.oldest()
        self.assertEqual(release.name, "7.2.9+deb13-cloud-amd64")
        self.assertIsNone(shortfall)

    def test_another_series_stands_in_with_the_reason(self):
        release, shortfall = kernels(("7.2.12", "source"), ("7.3.4", None), ("7.4.1", None)).oldest()
        self.assertEqual(release.name, "7.3.4+deb13-cloud-amd64")
        self.assertIn("no complete Linux 7.2", shortfall)
        self.assertIn("7.2.12+deb13-cloud-amd64: no source", shortfall)

    def test_each_flavour_is_chosen_alone(self):
        archive = kernels(("7.2.12", None), ("7.3.4", None), flavour=GENERAL)
        self.assertEqual(archive.newest().name, "7.3.4+deb13-amd64")

    def test_nothing_complete(self):
        with self.assertRaisesRegex(Failure, "7.2.12.deb13-cloud-amd64: no image"):
            kernels(("7.2.12", "image")).oldest()
