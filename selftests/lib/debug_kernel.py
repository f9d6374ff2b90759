# SPDX-License-Identifier: GPL-2.0
"""The debug kernel's means to make it fail and to see what it loses: fail-nth, the fault attributes, kmemleak."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

DEBUG = pathlib.Path("/sys/kernel/debug")
# kmemleak reports what is older than 5 seconds.
LEAK_AGE = 6


def require(*names):
    """Skips the whole script where the kernel has no debugfs file or directory of these names."""
    missing = [name for name in names if not (DEBUG / name).exists()]
    if missing:
        print(f"1..0 # SKIP this kernel has no {' '.join(missing)}: make selftests KERNEL=debug has")
        sys.exit(0)


def attribute(fault, **values):
    """Sets fault attributes: `attribute("failslab", probability=10)`."""
    for name, value in values.items():
        (DEBUG / fault / name.replace("_", "-")).write_text(str(value))


def quiet_faults():
    """All allocations of the kernel for itself may fail, without a stack in the log for each."""
    attribute("failslab", ignore_gfp_wait="N", verbose=0)
    # Pages of user memory are left alone: the test itself needs them.
    attribute("fail_page_alloc", ignore_gfp_wait="N", ignore_gfp_highmem="Y", min_order=0, verbose=0)


class Nth:
    """Makes the n-th allocation of this thread fail."""

    def __init__(self):
        self._file = os.open("/proc/thread-self/fail-nth", os.O_RDWR)

    def during(self, number, function, *arguments):
        """Calls a function; returns whether an allocation failed, and the result or the exception."""
        os.pwrite(self._file, str(number).encode(), 0)
        try:
            result = function(*arguments)
        except (OSError, MemoryError) as error:
            result = error
        left = int(os.pread(self._file, 32, 0).split()[0])
        os.pwrite(self._file, b"0", 0)
        return left == 0, result

    def walk(self, prepare, function, after, limit=4000):
        """Has the 1st, 2nd, ... allocation of `function(prepare())` fail until it makes no more; hands each result to
        `after`. Returns how many failed."""
        for number in range(1, limit):
            failed, result = self.during(number, function, prepare())
            after(result)
            if not failed:
                return number - 1
        raise OSError(f"still allocating after {limit} allocations")


@contextlib.contextmanager
def no_leaks(tap, what):
    """Passes where nothing that the body allocates in the kernel is lost."""
    (DEBUG / "kmemleak").write_text("clear")
    yield
    # What was freed by RCU or in a worker is gone by then, and what is lost is old enough.
    for _ in range(2):
        time.sleep(LEAK_AGE)
        (DEBUG / "kmemleak").write_text("scan")
    leaks = (DEBUG / "kmemleak").read_text()
    tap.result(not leaks, f"{what}: nothing is lost", leaks)


def unload(tap, *modules):
    """Passes where the modules, which nothing uses any more, unload."""
    for name in modules:
        result = subprocess.run(["rmmod", name], stderr=subprocess.PIPE, text=True)
        tap.result(result.returncode == 0, f"{name} unloads", result.stderr)
