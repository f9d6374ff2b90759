# SPDX-License-Identifier: GPL-2.0
"""What the build for DKMS says where it cannot build: of the kernel, its headers, its source and the compiler."""

import os
import pathlib
import subprocess
import tempfile
import unittest

from cache import SOURCE

RELEASE = "7.3.4+deb13-cloud-amd64"
VERSION = "7.3.4-1~bpo13+1"


class DkmsBuild(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.top = pathlib.Path(folder.name)
        self.headers = self.top / "headers"
        (self.headers / "include/generated").mkdir(parents=True)
        (self.top / "bin").mkdir()
        self.config("CONFIG_RUST=y", "CONFIG_GCC_VERSION=140200", 'CONFIG_RUSTC_VERSION_TEXT="rustc 1.0.0"')
        (self.headers / "include/generated/utsversion.h").write_text(
            f'#define UTS_VERSION "#1 SMP PREEMPT_DYNAMIC Debian {VERSION} (2026-11-15)"\n')
        self.source(f"echo '{VERSION}'")
        (self.top / "kernel-tree").symlink_to(SOURCE / "scripts/kernel-tree")

    def config(self, *lines):
        (self.headers / ".config").write_text("\n".join(lines) + "\n")

    def source(self, script):
        """What dpkg-query does for the package with the source."""
        query = self.top / "bin/dpkg-query"
        query.write_text(f"#!/bin/sh\n{script}\n")
        query.chmod(0o755)

    def says(self, *parts):
        environment = os.environ | {"PATH": f"{self.top}/bin:{os.environ['PATH']}",
                                    "DM_OVERLAYBD_CACHE": str(self.top / "cache")}
        result = subprocess.run([SOURCE / "debian/dkms/build", RELEASE, self.headers], cwd=self.top, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(result.returncode, 1, result.stdout)
        for part in parts:
            self.assertIn(part, result.stdout)
        return result.stdout

    def test_headers_are_missing(self):
        (self.headers / ".config").unlink()
        self.says(f"install linux-headers-{RELEASE}")

    def test_kernel_without_rust(self):
        self.config("# CONFIG_RUST is not set")
        self.says(f"Linux {RELEASE} is built without Rust")

    def test_not_debians(self):
        (self.headers / "include/generated/utsversion.h").write_text('#define UTS_VERSION "#1 SMP"\n')
        self.says("are not Debian's")

    def test_no_source(self):
        self.source("exit 1")
        self.says(f"apt install linux-source-7.3={VERSION}")

    def test_source_of_another_version(self):
        self.source("echo 7.3.5-1")
        self.says("linux-source-7.3 is 7.3.5-1", f"the kernel is {VERSION}")

    def test_another_compiler(self):
        self.says("the kernel was built with rustc 1.0.0", f"no build tree for Linux {RELEASE}")
        self.assertEqual(list((self.top / "cache").iterdir()), [])


if __name__ == "__main__":
    unittest.main()
