# SPDX-License-Identifier: GPL-2.0
"""Debian packages of this checkout, for the kernels that it is tested with and that of machines that are no clouds."""

import os
import shutil
import subprocess

import build as make
import kernel as kernels
from cache import SOURCE, Failure, fresh_directory, step

DEBS = SOURCE / "build/debs"
TREE = SOURCE / "build/deb/dm-overlaybd"
# What debian/rules takes of the checkout, besides debian/.
PARTS = ["Kbuild", "LICENSES", "Makefile", "README.md", "dm-overlaybd", "dm-zfile", "docs", "rust", "scripts", "tools"]


def cached_kernels():
    """The kernels that are tested with, the newest first."""
    newest, oldest = kernels.ensure(), kernels.ensure_oldest()
    return [newest] + [oldest] * (oldest.release != newest.release)


def all_kernels():
    """The kernels that there are packages for: those and that of machines that are no clouds."""
    newest, *older = cached_kernels()
    return [newest, kernels.ensure_general(), *older]


def build(of, debs=DEBS, tree=TREE):
    """Builds all packages, with modules for the kernels `of`, the newest of each flavour first, into `debs`. The tree
    refers to the checkout, so that what is compiled there serves."""
    if make.make("ovbd") or make.make("man"):
        raise Failure("ovbd did not compile")
    tree.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tree / "debian", ignore_errors=True)
    shutil.copytree(SOURCE / "debian", tree / "debian")
    for name in PARTS:
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(SOURCE / name)
    flavours = set()
    for kernel in of:
        flavour = kernel.release.split("-", 1)[1]
        subprocess.run([tree / "debian/add-kernel", *["--newest"] * (flavour not in flavours), kernel.release,
                        kernel.version, kernel.build, *kernel.make_arguments()], check=True)
        flavours.add(flavour)
    for path in tree.parent.glob("*.*"):
        if path.is_file():
            path.unlink()
    step("building Debian packages", ["dpkg-buildpackage", "--build=binary", "--unsigned-changes", "--no-pre-clean",
                                       "--no-check-builddeps"],
         tree.parent / "build.log", f"All of it is in {tree.parent / 'build.log'}.", cwd=tree,
         env=os.environ | {"DEB_BUILD_OPTIONS": f"noautodbgsym parallel={os.cpu_count()}", "OVBD_BUILT": "1"})
    fresh_directory(debs)
    for path in sorted(tree.parent.glob("*.deb")):
        path.rename(debs / path.name)
    return debs


def differing(of, debs):
    """The names of packages that come out otherwise when they are built again, in another place and with modules that
    are compiled once more."""
    again = build(of, SOURCE / "build/debs-again", SOURCE / "build/deb-again/dm-overlaybd")
    paths = sorted(debs.glob("*.deb"))
    other = sorted(again.glob("*.deb"))
    if [path.name for path in paths] != [path.name for path in other]:
        return [path.name for path in [*paths, *other]]
    return [one.name for one, two in zip(paths, other) if one.read_bytes() != two.read_bytes()]
