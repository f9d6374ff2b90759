#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Direct access to layers in persistent memory: EROFS, ext4 and XFS are mounted with dax, and every file, read, mapped
and executed, is what was written, while the page cache holds none of it. What happens to a device while files of it are
mapped."""

import mmap
import os
import random
import shutil
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, sha256
from pmem import Missing, Pmem, cached, has_dax
from test_script import OVBD, SCRATCH, CommandFailed, Tap, load, run

MIB = 1 << 20
# Size of the image, the command that makes the file system, and options for the mount.
WRITABLE = {
    "ext4": (64 * MIB, ["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^has_journal"], ["dax=always"]),
    "xfs": (320 * MIB, ["mkfs.xfs", "-q", "-f"], ["dax=always", "nouuid"]),
}
EROFS = ["mkfs.erofs", "--quiet", "-b", "4096", "-E", "noinline_data"]
PROGRAM = "/bin/true"


def populate(top, generator, count):
    for number in range(count):
        directory = top / f"directory{number % 3}"
        directory.mkdir(exist_ok=True)
        size = generator.choice([1, 4096, 5000, 70000, 300000])
        (directory / f"file{number}").write_bytes(generator.randbytes(size))
    shutil.copy(PROGRAM, top / "program")


def change(top, generator):
    files = sorted(top.rglob("file*"))
    for path in files[::3]:
        path.unlink()
    for path in files[1::3]:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(generator.randbytes(9000))
    populate(top / "directory0", generator, 6)


def checksums(top):
    return {str(path.relative_to(top)): sha256(path) for path in sorted(top.rglob("*")) if path.is_file()}


def mapped_checksums(top):
    """The same, by way of mappings."""
    found = {}
    for path in sorted(top.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                copy = SCRATCH / "copy"
                copy.write_bytes(memory[:])
            found[str(path.relative_to(top))] = sha256(copy)
    return found


def make_images(kind, generator):
    """Two states of a file system: the images, and the files in them."""
    images, trees = [SCRATCH / f"{kind}{state}.img" for state in (0, 1)], []
    if kind == "erofs":
        tree = SCRATCH / "tree"
        tree.mkdir()
        for state, act in ((0, lambda: populate(tree, generator, 15)), (1, lambda: change(tree, generator))):
            act()
            run(*EROFS, images[state], tree)
            trees.append(checksums(tree))
        shutil.rmtree(tree)
        size = max(-(-image.stat().st_size // 4096) * 4096 for image in images)
        for image in images:
            os.truncate(image, size)
        return images, trees
    size, command, _ = WRITABLE[kind]
    images[0].touch()
    os.truncate(images[0], size)
    run(*command, images[0])
    for state, act in ((0, lambda top: populate(top, generator, 15)), (1, lambda top: change(top, generator))):
        if state:
            run("cp", "--sparse=always", images[0], images[1])
        top = SCRATCH / "writable"
        top.mkdir(exist_ok=True)
        run("mount", "-o", "loop", images[state], top)
        try:
            act(top)
            trees.append(checksums(top))
        finally:
            run("umount", top)
    return images, trees


def build(*arguments):
    run(OVBD, "build", "--format", "lsmt", *arguments)


def check_tree(tap, name, device, options, wanted):
    """Mounts a device and compares each of its files."""
    with Devices() as mounts:
        top = mounts.mount(device, SCRATCH / "mnt", *options)
        before = cached()
        tap.result(all(has_dax(top / path) for path in wanted), f"{name}: statx says so of every file")
        tap.equal(checksums(top), wanted, f"{name}: {len(wanted)} files, read")
        tap.equal(mapped_checksums(top), wanted, f"{name}: {len(wanted)} files, mapped")
        tap.result(subprocess.run([top / "program"]).returncode == 0, f"{name}: a program runs")
        grown = cached() - before
        total = sum((top / path).stat().st_size for path in wanted)
        tap.result(grown < total // 2, f"{name}: the page cache has not grown by the files",
                   f"{grown} bytes, the files have {total}")


def check_kind(tap, kind, memory, generator):
    images, trees = make_images(kind, generator)
    options = WRITABLE[kind][2] if kind in WRITABLE else ["dax=always"]
    size = images[0].stat().st_size
    layers = [image.with_suffix(".lsmt") for image in images]
    build("-o", layers[0], images[0])
    build("--base", layers[0], "-o", layers[1], images[1])
    words = []
    for layer in layers:
        words += [memory.put(layer), str(layer.stat().st_size)]
    zeros = memory.zeros(size)
    for state in (0, 1):
        table = f"0 {size // 512} overlaybd {state + 1} {' '.join(words[:2 * state + 2])} 3 dax zeros {zeros}"
        with dm_ioctl.Mapped("direct", table) as mapped:
            name = f"{kind}, {'base' if state == 0 else 'base and difference'}"
            process = subprocess.run(["cmp", mapped.node, images[state]], stdout=subprocess.PIPE, text=True)
            tap.result(process.returncode == 0, f"{name}: the device is the image", process.stdout)
            check_tree(tap, name, mapped.node, options, trees[state])
    memory.forget()
    for path in [*images, *layers]:
        path.unlink()


tap = Tap()
load("loop", "dm-overlaybd")
try:
    memory = Pmem()
except Missing as why:
    tap.skip("direct access", why)
    tap.finish()
for position, kind in enumerate([*WRITABLE, "erofs"]):
    subprocess.run(["modprobe", "--quiet", kind])
    try:
        check_kind(tap, kind, memory, random.Random(position))
    except (CommandFailed, OSError) as error:
        tap.result(False, kind, error)
tap.finish()
