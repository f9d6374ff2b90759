# SPDX-License-Identifier: GPL-2.0
"""The stock Debian kernel and a build tree for exactly that kernel.

The headers package carries no Rust metadata, so modules in Rust cannot be built from it alone. The matching
linux-source, prepared with the shipped .config and the same rustc, gives the same Rust crates; that is not taken
on trust: every Rust symbol that the shipped kernel exports must come out with the same mangled name, which holds
a hash of the compiler and of the crate's options.

Runs inside the toolchain root. Leaves `<cache>/modules/<release>/` (what the package installs in
/usr/lib/modules, with vmlinuz) and `<cache>/kernel/<release>/{source,build}`.
"""

import json
import os
import re
import shutil
import subprocess

import vm
from cache import CACHE, SOURCE, Failure, delete, exclusive, fresh_directory, share, step

KERNELS = CACHE / "kernel"
MODULES = CACHE / "modules"
CURRENT = KERNELS / "current.json"
FLAVOUR = "cloud-amd64"
# Debian enables CONFIG_RUST from this version on.
OLDEST = (7, 2)

UPDATE = "Run the command again, or `make kernel-update` to look for a newer kernel."


class Kernel:
    """A prepared kernel, identified by its release (`uname -r`) and Debian version."""

    name = "stock"
    # Where the modules of this checkout are built.
    modules = SOURCE

    def __init__(self, release, version):
        self.release = release
        self.version = version
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


def ensure(update=False):
    """The kernel to test with; prepares the newest complete one where none is cached or `update` is set."""
    share()
    if not update and (kernel := _cached()):
        return kernel
    with exclusive():
        # Another run may have done the work while this one waited.
        if not update and (kernel := _cached()):
            return kernel
        kernel = resolve()
        if not (kernel.directory / "complete").exists():
            _prepare(kernel)
        CURRENT.write_text(json.dumps({"release": kernel.release, "version": kernel.version}))
    return kernel


def _cached():
    """The kernel that the last run used, or None."""
    if not CURRENT.exists():
        return None
    kernel = Kernel(**json.loads(CURRENT.read_text()))
    return kernel if (kernel.directory / "complete").exists() else None


def _apt(*arguments):
    return subprocess.run(["apt-cache", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True).stdout


def _versions(package):
    """The versions of `package` that the archive holds."""
    return {line.split("|")[1].strip() for line in _apt("madison", package).splitlines()}


def resolve():
    """The newest release whose image, headers and source are all in the archive in one version."""
    step("updating the package lists", ["apt-get", "update", "-o", "APT::Update::Error-Mode=any"],
         CACHE / "log" / "apt-update.log", "The Debian mirror must be reachable; see OVBD_MIRROR in the README.")
    pattern = re.compile(rf"linux-headers-((\d+)\.(\d+)(?:\.(\d+))?\S*-{FLAVOUR})")
    found = []
    for name in _apt("pkgnames", "linux-headers-").split():
        match = pattern.fullmatch(name)
        if match and (int(match[2]), int(match[3])) >= OLDEST:
            found.append((int(match[2]), int(match[3]), int(match[4] or 0), match[1]))
    reasons = []
    for major, minor, _, release in sorted(found, reverse=True):
        image = _versions(f"linux-image-{release}")
        version = (_versions(f"linux-headers-{release}") & image & _versions(f"linux-source-{major}.{minor}"))
        if version:
            return Kernel(release, max(version))
        reasons.append(f"{release}: no {'image' if not image else 'source of the same version'}")
    raise Failure(
        f"no Debian kernel {OLDEST[0]}.{OLDEST[1]} or newer ({FLAVOUR}) is complete in the configured archives"
        + "".join(f"\n  {reason}" for reason in reasons)
        + "\nOn a Debian host its apt sources need the backports; OVBD_ROOT=always uses a root that has them."
    )


def _prepare(kernel):
    work = fresh_directory(kernel.directory)
    packages = work / "packages"
    packages.mkdir()
    major_minor = re.match(r"\d+\.\d+", kernel.release)[0]
    # The image is one package or split into several, depending on the Debian release.
    names = [f"linux-{part}-{kernel.release}" for part in ("image", "binary", "modules", "base", "headers")]
    wanted = [name for name in names if kernel.version in _versions(name)] + [f"linux-source-{major_minor}"]
    step(
        f"downloading Debian's kernel {kernel.release} with its source (about 220 MB)",
        ["apt-get", "download", "-o", "APT::Sandbox::User=root", *(f"{name}={kernel.version}" for name in wanted)],
        CACHE / "log" / "kernel-download.log",
        "The Debian mirror must be reachable. " + UPDATE,
        cwd=packages,
    )
    step(
        "unpacking it",
        ["sh", "-ec",
         "for deb in packages/linux-[!s]*.deb; do dpkg-deb -x $deb shipped; done\n"
         "dpkg-deb --fsys-tarfile packages/linux-source-*.deb | tar -x --wildcards --strip-components=3 '*.tar.xz'\n"
         "mkdir source build\n"
         "tar -x --strip-components=1 -C source -f linux-source-*.tar.xz\n"
         "rm -r packages linux-source-*.tar.xz"],
        CACHE / "log" / "kernel-unpack.log",
        UPDATE,
        cwd=work,
    )
    shipped = work / "shipped"
    headers = shipped / "usr/src" / f"linux-headers-{kernel.release}"
    config = (headers / ".config").read_text()
    if "CONFIG_RUST=y" not in config:
        raise Failure(f"Debian's kernel {kernel.release} is built without CONFIG_RUST: it cannot load Rust modules")
    for name in (".config", "Module.symvers"):
        shutil.copy(headers / name, kernel.build)
    make = ["make", "-C", str(kernel.source), f"O={kernel.build}", *kernel.make_arguments()]
    step(
        "preparing the build tree (modules_prepare, about 80 s on 2 cores)",
        ["sh", "-ec", '"$@" olddefconfig && "$@" modules_prepare', "sh", *make],
        CACHE / "log" / "kernel-prepare.log",
        UPDATE,
    )
    count = _compare_rust_symbols(kernel)
    print(f"    {count} exported Rust symbols equal those of the shipped kernel", flush=True)

    images = shipped / "usr/lib/modules" / kernel.release
    subprocess.run(["depmod", "-b", str(shipped / "usr"), kernel.release], check=True)
    MODULES.mkdir(exist_ok=True)
    delete(MODULES / kernel.release)
    shutil.move(images, MODULES / kernel.release)
    delete(shipped)
    (work / "complete").touch()


def _compare_rust_symbols(kernel):
    """Stops where the prepared crates are not those of the shipped kernel; returns the number of symbols."""
    shipped = set()
    for line in (kernel.build / "Module.symvers").read_text().splitlines():
        name = line.split("\t")[1]
        if name.startswith(("_R", "rust_helper_")):
            shipped.add(name)
    ours = set()
    for path in (kernel.build / "rust").glob("exports_*_generated.h"):
        ours |= set(re.findall(r"EXPORT_SYMBOL_RUST_GPL\((\S+)\);", path.read_text()))
    missing = shipped - ours
    if missing or not shipped:
        rustc = subprocess.run(["rustc", "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
        built = re.search(r'CONFIG_RUSTC_VERSION_TEXT="(.*)"', (kernel.build / ".config").read_text())
        raise Failure(
            f"{len(missing)} of {len(shipped)} Rust symbols of the shipped kernel {kernel.release} differ from those "
            f"built here, so its loader would refuse the modules.\n  this rustc:     {rustc}\n"
            f"  kernel's rustc: {built[1] if built else 'unknown'}\n"
            "The toolchain root is out of step with the kernel: `make distclean-cache` and run again."
        )
    return len(shipped)
