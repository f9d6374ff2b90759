#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""ext4, XFS, Btrfs and EROFS images, each a base and a difference made by `ovbd build`, are mounted from the target.
Every file has the checksum it was written with, and the device has the bytes of the image."""

import contextlib
import os
import random
import shutil
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, sha256
from test_script import OVBD, SCRATCH, CommandFailed, Tap, load, run

MIB = 1 << 20
# Size of the image, the command that makes the file system, and options for the read-only mount.
WRITABLE = {
    "ext4": (24 * MIB, ["mkfs.ext4", "-q", "-F", "-O", "^metadata_csum_seed"], []),
    "xfs": (320 * MIB, ["mkfs.xfs", "-q", "-f"], ["nouuid"]),
    "btrfs": (128 * MIB, ["mkfs.btrfs", "-q", "--nodiscard"], []),
}


def populate(top, generator, count):
    """Files of many sizes in a small tree."""
    for number in range(count):
        directory = top / f"directory{number % 5}" / "inner"
        directory.mkdir(parents=True, exist_ok=True)
        size = generator.choice([0, 1, 100, 4096, 5000, 70000, 300000])
        (directory / f"file{number}").write_bytes(generator.randbytes(size))
    (top / "link").unlink(missing_ok=True)
    (top / "link").symlink_to("directory0/inner/file0")


def change(top, generator):
    """Files removed, overwritten in part, grown and added."""
    files = sorted(path for path in top.rglob("file*") if path.is_file())
    for path in files[::4]:
        path.unlink()
    for path in files[1::4]:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(generator.randbytes(6000))
    (top / "added").mkdir()
    populate(top / "added", generator, 12)


def checksums(top):
    """The content of a tree: what every path below it is."""
    found = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        # What mkfs makes itself.
        if name == "lost+found":
            continue
        found[name] = os.readlink(path) if path.is_symlink() else "directory" if path.is_dir() else sha256(path)
    return found


@contextlib.contextmanager
def mounted(image):
    top = SCRATCH / "writable"
    top.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, top)
    try:
        yield top
    finally:
        run("umount", top)


def make_writable(kind, generator):
    """Two states of an image: paths, and the trees that they hold."""
    size, command, _ = WRITABLE[kind]
    images = [SCRATCH / f"{kind}{state}.img" for state in (0, 1)]
    with open(images[0], "wb") as file:
        file.truncate(size)
    run(*command, images[0])
    trees = []
    with mounted(images[0]) as top:
        populate(top, generator, 40)
        trees.append(checksums(top))
    run("cp", "--sparse=always", images[0], images[1])
    with mounted(images[1]) as top:
        change(top, generator)
        trees.append(checksums(top))
    return images, trees


def make_erofs(generator):
    """EROFS is never changed in place: the second image is made anew from the changed tree."""
    tree = SCRATCH / "tree"
    tree.mkdir()
    images, trees = [], []
    for state in (0, 1):
        populate(tree, generator, 40) if state == 0 else change(tree, generator)
        images.append(SCRATCH / f"erofs{state}.img")
        run("mkfs.erofs", "--quiet", images[-1], tree)
        trees.append(checksums(tree))
    size = max(image.stat().st_size for image in images)
    for image in images:
        os.truncate(image, size)
    shutil.rmtree(tree)
    return images, trees


def build(images):
    layers = [image.with_suffix(".lsmt") for image in images]
    run(OVBD, "build", "--format", "lsmt", "-o", layers[0], images[0])
    run(OVBD, "build", "--format", "lsmt", "--base", layers[0], "-o", layers[1], images[1])
    return layers


def known(kind):
    """Whether this kernel has the file system, itself or as a module."""
    subprocess.run(["modprobe", "--quiet", kind])
    return any(line.split()[-1] == kind for line in open("/proc/filesystems"))


def check(tap, kind, generator):
    images, trees = make_erofs(generator) if kind == "erofs" else make_writable(kind, generator)
    paths = build(images)
    options = WRITABLE[kind][2] if kind in WRITABLE else []
    with Devices() as devices:
        words = []
        for path in paths:
            words += [devices.loop(path), str(path.stat().st_size)]
        for state in (0, 1):
            table = f"0 {images[state].stat().st_size // 512} overlaybd {state + 1} {' '.join(words[:2 * state + 2])}"
            name = f"{kind}, {'base' if state == 0 else 'base and difference'}"
            with dm_ioctl.Mapped("filesystem", table) as mapped:
                process = subprocess.run(["cmp", mapped.node, images[state]], stdout=subprocess.PIPE, text=True)
                tap.result(process.returncode == 0, f"{name}: the device is the image", process.stdout)
                with Devices() as mounts:
                    top = mounts.mount(mapped.node, SCRATCH / "mnt", *options)
                    got = checksums(top)
                wrong = {path for path in got.keys() | trees[state].keys() if got.get(path) != trees[state].get(path)}
                tap.result(len(got) > 40 and not wrong, f"{name}: {len(got)} files, directories and links",
                           "\n".join(sorted(wrong)[:20]))
        smaller = paths[1].stat().st_size < paths[0].stat().st_size + 4 * MIB
        tap.result(smaller and len(trees[0].items() - trees[1].items()) > 5, f"{kind}: the states differ")
    for path in [*images, *paths]:
        path.unlink()


tap = Tap()
load("loop", "dm-overlaybd")
for position, kind in enumerate([*WRITABLE, "erofs"]):
    if not known(kind):
        tap.skip(kind, "this kernel does not have it")
        continue
    try:
        check(tap, kind, random.Random(position))
    except (CommandFailed, OSError) as error:
        tap.result(False, kind, error)
tap.finish()
