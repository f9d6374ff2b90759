# SPDX-License-Identifier: GPL-2.0
"""Debian's stock kernels, and a build tree for exactly each.

`scripts/kernel-tree` makes the build tree out of the headers and the source package, and compares the Rust symbols that
the kernel exports with those that come out. That shows that compiler and crates are the same. Of the configuration and
of C types the symbols say nothing: those are the shipped .config and headers themselves, and modules carry what the
loader (BTF) and they (UTS_VERSION, see rust/bindings/helpers.c) compare where they are loaded.

Runs inside the toolchain root. Leaves `<cache>/modules/<release>/` (what the package installs in
/usr/lib/modules, with vmlinuz) and `<cache>/kernel/<release>/{headers,build}`, and for the newest kernel `source`.
"""

import json
import os
import shutil
import subprocess

import vm
from archive import GENERAL, Archive
from cache import CACHE, SOURCE, alone, delete, exclusive, fresh_directory, share, step

KERNELS = CACHE / "kernel"
MODULES = CACHE / "modules"
# Counts up when a tree that was prepared before does not serve any more.
LAYOUT = 2

UPDATE = "Run the command again, or `make kernel-update` to look for newer kernels."


class Kernel:
    """The newest stock kernel."""

    name = "stock"
    # Where the modules of this checkout are built.
    modules = SOURCE
    # Variables for its modules alone.
    module_make = []
    # Whether the whole source is kept, of which other kernels are built.
    whole_source = True
    # The file that names it.
    record = "current.json"

    def __init__(self, release, version, shortfall=None):
        self.release = release
        self.version = version
        # Why it is not the kernel that was meant, if so.
        self.shortfall = shortfall
        self.directory = KERNELS / release
        self.source = self.directory / "source"
        self.build = self.directory / "build"
        self.vmlinuz = MODULES / release / "vmlinuz"

    def make_arguments(self):
        """The variables with which Debian builds this kernel, for every make that uses its tree."""
        return [f"-j{os.cpu_count()}", f"KERNELRELEASE={self.release}", "CC=x86_64-linux-gnu-gcc-14",
                "HOSTCC=x86_64-linux-gnu-gcc-14"]

    def guest(self, command, console, silence, cpus=2):
        """A boot of this kernel that runs `command`."""
        return vm.Guest(self, command, console, SOURCE, silence, emulated=vm.NO_MITIGATIONS, cpus=cpus)

    def is_complete(self):
        """Whether it is prepared, in this version, with all that this checkout wants of it."""
        stamp = self.directory / "complete"
        layout, _, version = stamp.read_text().partition(" ") if stamp.exists() else ("", "", "")
        return (version == self.version and int(layout) >= LAYOUT
                and (self.source.exists() or not self.whole_source))

    @classmethod
    def chosen(cls):
        """The one that the last run used, or None."""
        record = KERNELS / cls.record
        if not record.exists():
            return None
        kernel = cls(**json.loads(record.read_text()))
        return kernel if kernel.is_complete() else None

    def choose(self):
        """Makes it the one that the next run uses."""
        about = {"release": self.release, "version": self.version}
        if self.shortfall:
            about["shortfall"] = self.shortfall
        (KERNELS / self.record).write_text(json.dumps(about))


class OldestKernel(Kernel):
    """The newest stock kernel of the oldest supported series, to see that the modules build for it and work there."""

    name = "oldest"
    modules = SOURCE / "build/oldest"
    whole_source = False
    record = "oldest.json"


class GeneralKernel(Kernel):
    """The newest stock kernel that is not for clouds alone. Packages have modules for it; nothing runs it."""

    name = "general"
    whole_source = False
    record = "general.json"


def ensure(update=False):
    """The kernel to test with; prepares the newest complete one where none is cached or `update` is set."""
    share()
    if not update and (kernel := Kernel.chosen()):
        return kernel
    with exclusive():
        # Another run may have done the work while this one waited.
        if not update and (kernel := Kernel.chosen()):
            return kernel
        archive = Archive()
        release = archive.newest()
        kernel = Kernel(release.name, release.version)
        _prepare(kernel, archive, release)
    return kernel


def ensure_oldest(update=False):
    """The kernel of the oldest supported series; prepares it where none is cached or `update` is set."""
    return _ensure_beside(OldestKernel, Archive, Archive.oldest, update)


def ensure_general():
    """The kernel for machines that are no clouds; prepares the newest where none is cached."""
    return _ensure_beside(GeneralKernel, lambda: Archive(GENERAL), lambda archive: (archive.newest(), None))


def _ensure_beside(kind, open_archive, find, update=False):
    """A kernel besides the newest; `find` returns the release and its shortfall."""
    with alone(kind.name):
        if not update and (kernel := kind.chosen()):
            return kernel
        archive = open_archive()
        release, shortfall = find(archive)
        kernel = kind(release.name, release.version, shortfall)
        _prepare(kernel, archive, release)
    return kernel


def _prepare(kernel, archive, release):
    if not kernel.is_complete():
        _make(kernel, archive, release)
    kernel.choose()


def _make(kernel, archive, release):
    work = fresh_directory(kernel.directory)
    packages = work / "packages"
    packages.mkdir()
    step(
        f"downloading Debian's kernel {kernel.release} with its source (about 220 MB)",
        ["apt-get", "download", "-o", "APT::Sandbox::User=root", *archive.packages(release)],
        CACHE / "log" / f"{kernel.name}-download.log",
        "The Debian mirror must be reachable. " + UPDATE,
        cwd=packages,
    )
    step(
        "unpacking it",
        ["sh", "-ec",
         "for deb in packages/linux-[!s]*.deb; do dpkg-deb -x $deb shipped; done\n"
         "dpkg-deb --fsys-tarfile packages/linux-source-*.deb | tar -x --wildcards --strip-components=3 '*.tar.xz'\n"
         + ("mkdir source\ntar -x --strip-components=1 -C source -f linux-source-*.tar.xz\n" * kernel.whole_source)],
        CACHE / "log" / f"{kernel.name}-unpack.log",
        UPDATE,
        cwd=work,
    )
    shipped = work / "shipped"
    headers = shipped / "usr/src" / f"linux-headers-{kernel.release}"
    tarball, = work.glob("linux-source-*.tar.xz")
    step(
        "preparing the build tree (about 80 s on 2 cores)",
        [SOURCE / "scripts/kernel-tree", headers, tarball, work, *kernel.make_arguments()],
        CACHE / "log" / f"{kernel.name}-prepare.log",
        "The toolchain root may be out of step with the kernel: `make distclean-cache` and run again.",
    )
    images = shipped / "usr/lib/modules" / kernel.release
    subprocess.run(["depmod", "-b", str(shipped / "usr"), kernel.release], check=True)
    MODULES.mkdir(exist_ok=True)
    delete(MODULES / kernel.release)
    shutil.move(images, MODULES / kernel.release)
    for path in (shipped, packages, tarball):
        delete(path)
    (work / "complete").write_text(f"{LAYOUT} {kernel.version}")
