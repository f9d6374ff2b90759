# SPDX-License-Identifier: GPL-2.0
"""Runs the project's Makefile and Kbuild, for everything that needs what they make."""

import subprocess

from cache import SOURCE


def make(*targets, **variables):
    """Runs targets of the project's Makefile, which may come back here and then need the inherited lock."""
    arguments = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "--no-print-directory", *arguments, *targets]
    return subprocess.run(command, cwd=SOURCE, close_fds=False).returncode


def kbuild(kernel, *arguments, source=SOURCE):
    """Runs Kbuild for the modules of this checkout, or of another, in the tree of `kernel`."""
    command = ["make", "--no-print-directory", "-C", str(kernel.build), f"M={source}", *kernel.make_arguments(),
               *arguments]
    return subprocess.run(command).returncode


def modules(kernel):
    """Builds the targets and the modules that only tests use."""
    return kbuild(kernel, "DM_SELFTESTS=1", "modules")


def clippy(kernel):
    """Kernel clippy. It compiles in place of rustc, so a build that follows compiles again."""
    return kbuild(kernel, "DM_SELFTESTS=1", "CLIPPY=1", "KRUSTFLAGS=-Dwarnings", "modules")
