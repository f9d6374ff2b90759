# SPDX-License-Identifier: GPL-2.0
"""The debug kernel: User Mode Linux from the source of the stock kernel, with the checkers of
selftests/config/debug.config. It runs as a process, at the speed of the machine, needs neither KVM nor emulation,
and starts in a second; so what a sanitizer costs does not matter.

Leaves `<cache>/kernel/<release>/debug/` with a build tree in it, and the modules that belong to it in
`<cache>/modules/`.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess

import kernel as kernels
import uml
from cache import CACHE, SOURCE, delete, fresh_directory, step

CONFIG = SOURCE / "selftests/config/debug.config"
# What makes its stack traces cheap.
STACKTRACE = SOURCE / "selftests/config/stacktrace.h"
# KASAN and Rust in one kernel need clang. lockdep selects frame pointers, which clang also gives to the naked function
# in stub.c that must leave the stack alone: no process would return from its first signal. In the large code model
# clang has sections of its own for data; User Mode Linux does not count those as the kernel's, and so lockdep would
# give up at its first lock and kmemleak overlook what they point to.
MAKE = ["ARCH=um", "CC=clang-19", "HOSTCC=gcc-14",
        "KCFLAGS=-w -mlarge-data-threshold=4294967295",
        "CFLAGS_stub.o=-fno-PIC -fno-stack-protector -fno-stack-check -fomit-frame-pointer"]
# Modules lie far from the kernel, and its loader knows no global offset table.
MODULE_FLAGS = "KRUSTFLAGS=-Crelocation-model=static -Ccode-model=large"
# What Kbuild takes of the checkout; the objects for this kernel stay apart from those for the stock kernel.
PARTS = ["Kbuild", "rust", "dm-overlaybd", "dm-zfile", "selftests/dm-linear-twin", "selftests/dm-zfile-parts",
         "selftests/dm-kunit"]


class DebugKernel:
    """A build tree of User Mode Linux, and the way to start it."""

    name = "debug"

    def __init__(self, stock):
        self.source = stock.source
        self.directory = stock.directory / "debug"
        self.build = self.directory / "build"
        self.program = self.build / "linux"
        self.modules = SOURCE / "build" / "debug"

    @property
    def release(self):
        """What `uname -r` says."""
        return (self.build / "include/config/kernel.release").read_text().strip()

    def make_arguments(self):
        """The variables for every make that uses this tree."""
        return [f"-j{os.cpu_count()}", *MAKE, f"CFLAGS_stacktrace.o=-include {self.directory}/{STACKTRACE.name}"]

    def guest(self, command, console, silence):
        """A boot of this kernel that runs `command`."""
        return uml.Guest(self, command, console, silence)


def ensure(stock):
    """The debug kernel of the stock kernel's source, built where it is not cached or its configuration changed."""
    kernel = DebugKernel(stock)
    wanted = hashlib.sha256(CONFIG.read_bytes() + STACKTRACE.read_bytes() + "\n".join(MAKE).encode()).hexdigest()
    stamp = kernel.directory / "complete"
    with _alone():
        if not (stamp.exists() and stamp.read_text() == wanted):
            _build(kernel)
            stamp.write_text(wanted)
    return kernel


@contextlib.contextmanager
def _alone():
    """One run at a time builds it, while others use the rest of the cache."""
    with open(CACHE / "debug.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(kernel):
    fresh_directory(kernel.directory)
    kernel.build.mkdir()
    # A path that is the same for all checkouts.
    shutil.copy(STACKTRACE, kernel.directory)
    make = ["make", "-C", str(kernel.source), f"O={kernel.build}", *kernel.make_arguments()]
    log = CACHE / "log" / "debug-kernel.log"
    step("configuring the debug kernel", [*make, f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"], log,
         kernels.UPDATE)
    _check_config(kernel)
    step("building the debug kernel (about 8 minutes on 2 cores)", make, log, kernels.UPDATE)
    staging = kernel.directory / "staging"
    step("installing its modules", [*make, f"INSTALL_MOD_PATH={staging}", "modules_install"], log, kernels.UPDATE)
    delete(kernels.MODULES / kernel.release)
    shutil.move(staging / "lib/modules" / kernel.release, kernels.MODULES / kernel.release)


def _check_config(kernel):
    """Stops where an option did not become what the fragment says, as it depends on something that is missing."""
    got = set((kernel.build / ".config").read_text().splitlines())
    missing = [line for line in CONFIG.read_text().splitlines()
               if line.startswith("CONFIG_") and not line.endswith("=n") and line not in got]
    if missing:
        raise kernels.Failure(f"the debug kernel cannot have {' '.join(missing)}")


def build_modules(kernel, patch=None):
    """Builds the modules of this checkout for the debug kernel, in a copy, to which `patch` may be applied; returns the
    exit status."""
    kernel.modules.mkdir(parents=True, exist_ok=True)
    subprocess.run(["rsync", "--archive", "--relative", "--delete", "--include=*/", "--include=*.rs", "--include=*.c",
                    "--include=*.h", "--include=Kbuild", "--include=bindgen_parameters", "--exclude=*_generated.rs",
                    "--exclude=*", *PARTS, f"{kernel.modules}/"], cwd=SOURCE, check=True)
    if patch:
        apply = ["patch", "--strip=1", "--fuzz=0", "--directory", kernel.modules, "--input", patch]
        if status := subprocess.run(apply).returncode:
            return status
    return subprocess.run(["make", "--no-print-directory", "-C", str(kernel.build), f"M={kernel.modules}",
                           *kernel.make_arguments(), MODULE_FLAGS, "DM_SELFTESTS=1", "modules"]).returncode
