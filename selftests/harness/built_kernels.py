# SPDX-License-Identifier: GPL-2.0
"""Kernels that are built from the source of the stock kernel. Each is allnoconfig with fragments from selftests/config.

Leaves `<cache>/kernel/<release>/<name>/` with a build tree in it, and the modules that belong to it in
`<cache>/modules/`.
"""

import hashlib
import os
import re
import shutil
import subprocess

import kernel as kernels
import uml
import vm
from cache import CACHE, SOURCE, Failure, alone, delete, fresh_directory, step

FRAGMENTS = SOURCE / "selftests/config"
# Patches to the kernel's own code, in order.
FIXES = sorted((SOURCE / "upstream").glob("*.patch"))
# What Makefile.kcsan gives the compiler of C; and no runtime library, which the kernel is itself.
RACE_FLAGS = ["-Zsanitizer=thread", "-Zexternal-clangrt", "-Cllvm-args=-tsan-distinguish-volatile=1",
              "-Cllvm-args=-tsan-compound-read-before-write=1", "-Cllvm-args=-tsan-instrument-func-entry-exit=0"]
# After so many accesses KCSAN waits so many microseconds for another one to the same place. By its defaults, 4000 and
# 80, the two CPUs of an emulator are not found out within a test.
OFTEN = ["--append", "kcsan.skip_watch=200 kcsan.udelay_task=500 kcsan.udelay_interrupt=100"]
# rustc asks the description of the machine, which the kernel's build makes, whether there is such a sanitizer.
RACE_TARGET = "scripts/generate_rust_target < include/config/auto.conf | sed 's/\"kernel-address\"/\"thread\"/'"


class BuiltKernel:
    """A build tree. In what the kinds of kernel differ, their classes say."""

    # What KERNEL= calls it.
    name = None
    # Its fragments.
    config = []
    # How long it takes to build.
    duration = None
    # Variables for every make that uses its tree, and those for its modules alone.
    make = []
    module_make = []
    # Why it is not the kernel that was meant: it always is.
    shortfall = None
    # Headers in selftests/config that the compiler gets with a file of the kernel, by the name of that file's object.
    included = {}

    def __init__(self, stock):
        self.source = stock.source
        self.directory = stock.directory / self.name
        self.build = self.directory / "build"
        self.modules = SOURCE / "build" / self.name

    @property
    def release(self):
        """What `uname -r` says."""
        return (self.build / "include/config/kernel.release").read_text().strip()

    @property
    def installed(self):
        """The directory of its modules."""
        return kernels.MODULES / self.release

    def make_arguments(self):
        """The variables for every make that uses this tree."""
        return [f"-j{os.cpu_count()}", *self.make,
                *(f"CFLAGS_{name}=-include {self.directory}/{header}" for name, header in self.included.items())]

    def ensure(self):
        """Builds it where it is not cached or its configuration changed."""
        wanted = hashlib.sha256(self._inputs().encode())
        stamp = self.directory / "complete"
        with alone(self.name):
            if not (stamp.exists() and stamp.read_text() == wanted.hexdigest()):
                self._build()
                stamp.write_text(wanted.hexdigest())

    def _inputs(self):
        """What a build depends on besides the source."""
        headers = "".join((FRAGMENTS / name).read_text() for name in self.included.values())
        return self._fragments() + headers + "\n".join(self.make)

    def _fragments(self):
        return "".join((FRAGMENTS / f"{name}.config").read_text() for name in self.config)

    def _build(self):
        fresh_directory(self.directory)
        self.build.mkdir()
        for header in self.included.values():
            # A path that is the same for all checkouts.
            shutil.copy(FRAGMENTS / header, self.directory)
        fragment = self.directory / "fragment.config"
        fragment.write_text(self._fragments())
        make = ["make", "-C", str(self.source), f"O={self.build}", *self.make_arguments()]
        log = CACHE / "log" / f"{self.name}-kernel.log"
        step(f"configuring the {self.name} kernel", [*make, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig"], log,
             kernels.UPDATE)
        self._check_config()
        step(f"building the {self.name} kernel ({self.duration} on 2 cores)", make, log, kernels.UPDATE)
        self._install(make, log)

    def _install(self, make, log):
        """Puts its modules where modprobe finds them."""
        staging = self.directory / "staging"
        step("installing its modules", [*make, f"INSTALL_MOD_PATH={staging}", "modules_install"], log, kernels.UPDATE)
        delete(self.installed)
        shutil.move(staging / "lib/modules" / self.release, self.installed)

    def _check_config(self):
        """Stops where an option did not become what the fragment says, as it depends on something that is missing."""
        got = set((self.build / ".config").read_text().splitlines())
        missing = [line for line in self._fragments().splitlines()
                   if line.startswith("CONFIG_") and not line.endswith("=n") and line not in got]
        if missing:
            raise Failure(f"the {self.name} kernel cannot have {' '.join(missing)}")


class UserModeLinux(BuiltKernel):
    """A kernel that is a process, at the speed of the machine, and starts in a second: it needs neither KVM nor
    emulation."""

    # Modules lie far from the kernel, and its loader knows no global offset table.
    module_make = ["KRUSTFLAGS=-Crelocation-model=static -Ccode-model=large"]

    def __init__(self, stock):
        super().__init__(stock)
        self.program = self.build / "linux"

    def guest(self, command, console, silence):
        """A boot of this kernel that runs `command`."""
        return uml.Guest(self, command, console, silence)


class DebugKernel(UserModeLinux):
    """All checkers but one; what they cost does not matter where nothing is emulated."""

    name = "debug"
    config = ["common", "um", "debug"]
    duration = "about 8 minutes"
    # KASAN and Rust in one kernel need clang. lockdep selects frame pointers, which clang also gives to the naked
    # function in stub.c that must leave the stack alone: no process would return from its first signal. In the large
    # code model clang has sections of its own for data; User Mode Linux does not count those as the kernel's, and so
    # lockdep would give up at its first lock and kmemleak overlook what they point to.
    make = ["ARCH=um", "CC=clang-19", "HOSTCC=gcc-14",
            "KCFLAGS=-w -mlarge-data-threshold=4294967295",
            "CFLAGS_stub.o=-fno-PIC -fno-stack-protector -fno-stack-check -fomit-frame-pointer"]
    # What makes its stack traces cheap.
    included = {"stacktrace.o": "stacktrace.h"}


class FixedKernel(DebugKernel):
    """The debug kernel with the patches to the kernel's own code. A copy of its build tree is where patched files are
    compiled, which lie over those of the source only for that make."""

    name = "fixed"
    duration = "about 2 minutes"

    def __init__(self, stock):
        super().__init__(stock)
        self._debug = DebugKernel(stock)

    def make_arguments(self):
        return self._debug.make_arguments()

    def ensure(self):
        self._debug.ensure()
        super().ensure()

    def _inputs(self):
        return super()._inputs() + "".join(patch.read_text() for patch in FIXES)

    def _build(self):
        fresh_directory(self.directory)
        log = CACHE / "log" / f"{self.name}-kernel.log"
        step("copying the debug kernel", ["cp", "-a", str(self._debug.build), str(self.build)], log, kernels.UPDATE)
        patched = self.directory / "patched"
        names = {name for patch in FIXES for name in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)}
        for name in sorted(names):
            (patched / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, patched / name)
        for patch in FIXES:
            subprocess.run(["patch", "--quiet", "--strip=1", "--fuzz=0", "--directory", patched, "--input", patch],
                           check=True)
        mounts = [f"mount --bind {patched / name} {self.source / name}" for name in sorted(names)]
        step(f"building the {self.name} kernel ({self.duration} on 2 cores)",
             ["unshare", "--mount", "--propagation", "unchanged", "sh", "-ec", "\n".join([*mounts, 'exec "$@"']), "sh",
              "make", "-C", str(self.source), f"O={self.build}", *self.make_arguments()], log, kernels.UPDATE)


class NativeKernel(UserModeLinux):
    """No checkers: for the benchmark by the clock where KVM does not work."""

    name = "native"
    config = ["common", "um", "native"]
    duration = "about 4 minutes"
    make = ["ARCH=um", "CC=gcc-14", "HOSTCC=gcc-14"]


class KcsanKernel(BuiltKernel):
    """The race detector, KCSAN, which User Mode Linux cannot have: a kernel for the VM, for use on demand.

    The compiler tells KCSAN of the accesses to memory that the project's modules make, in C and in Rust: rustc has the
    pass for it as well, though the kernel does not use it. The rest of the kernel is left out. KCSAN waits at an access
    now and then, and sees by the value that somebody else has written meanwhile, whoever that was.
    """

    name = "kcsan"
    config = ["common", "kcsan"]
    duration = "about 10 minutes"
    make = ["ARCH=x86_64", "CC=gcc-14", "HOSTCC=gcc-14", "KCSAN_SANITIZE=n", f"filechk_rust_target={RACE_TARGET}"]
    module_make = ["KCSAN_SANITIZE=y", f"KRUSTFLAGS={' '.join(RACE_FLAGS)}"]

    @property
    def vmlinuz(self):
        """Where vng finds the modules that belong to it."""
        return self.installed / "vmlinuz"

    def guest(self, command, console, silence):
        """A boot of this kernel that runs `command`."""
        return vm.Guest(self, command, console, SOURCE, silence, emulated=[*vm.NO_MITIGATIONS, *OFTEN])

    def _build(self):
        super()._build()
        shutil.copy(self.build / "arch/x86/boot/bzImage", self.vmlinuz)


# By the name that KERNEL= has for them.
KINDS = {kind.name: kind for kind in (DebugKernel, FixedKernel, KcsanKernel, NativeKernel)}
