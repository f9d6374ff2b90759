#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Direct access through the twin of dm-linear: what is read from the memory is what is on the device, at any place of a
table; its memory is claimed; and a device gets it by another table, and never loses it."""

import errno
import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import linear_twin
from block_devices import Devices
from pmem import HUGE, has_dax, required
from test_script import SCRATCH, Tap, load, run

MIB = 1 << 20


def image():
    """An EROFS with one file; returns the path and what the file holds."""
    content = random.Random(1).randbytes(3 * MIB + 100)
    tree, path = SCRATCH / "tree", SCRATCH / "image"
    tree.mkdir()
    (tree / "file").write_bytes(content)
    run("mkfs.erofs", "--quiet", "-b", "4096", "-E", "noinline_data", path, tree)
    os.truncate(path, 4 * MIB)
    return path, content


def refused(tap, what, table, wanted):
    try:
        dm_ioctl.Mapped("refused", table).remove()
        tap.result(False, what, "the table was accepted")
    except dm_ioctl.Refused as error:
        tap.equal(error.errno, wanted, what)


def reload_fails(tap, what, mapped, table):
    try:
        mapped.reload(table)
        tap.result(False, what, "the table was accepted")
    except OSError as error:
        tap.equal(error.errno, errno.EINVAL, what)


tap = Tap()
memory = required(tap)
linear_twin.load()
load("loop")
run("modprobe", "erofs")
path, content = image()
node, sectors = memory.put(path), path.stat().st_size // 512
half = sectors // 16 * 8
whole = f"0 {sectors} rust-linear {node} 0 1 dax"
split = f"0 {half} rust-linear {node} 0\n{half} {sectors - half} linear {node} {half}"
with Devices() as devices:
    for what, table in (("one target", whole),
                        ("two targets", f"0 {half} linear {node} 0\n{half} {sectors - half} rust-linear {node} {half} 1 dax")):
        with dm_ioctl.Mapped("twin", table) as mapped, Devices() as mounts:
            top = mounts.mount(mapped.node, SCRATCH / "mnt", "dax=always")
            tap.result(has_dax(top / "file"), f"{what}: statx says so")
            tap.result((top / "file").read_bytes() == content, f"{what}: the file is right")
            other = f"0 {sectors} rust-linear {node} 0 1 dax"
            refused(tap, f"{what}: another device cannot have the memory", other, errno.EBUSY)
            with dm_ioctl.Mapped("blocks", f"0 {sectors} rust-linear {node} 0") as blocks:
                tap.result(True, f"{what}: without the option it can be there too")
            mapped.reload(table)
            tap.result((top / "file").read_bytes() == content, f"{what}: the same table again, while it is mounted")
            reload_fails(tap, f"{what}: no table without it can follow", mapped, f"0 {sectors} rust-linear {node} 0")
        with dm_ioctl.Mapped("next", whole):
            tap.result(True, f"{what}: the next device has the memory once the first is gone")
    refused(tap, "twice in one table", f"0 {half} rust-linear {node} 0 1 dax\n{half} {half} rust-linear {node} {half} 1 dax",
            errno.EEXIST)
    refused(tap, "a device without it", f"0 {sectors} rust-linear {devices.loop(path)} 0 1 dax", errno.ENXIO)
    with dm_ioctl.Mapped("blocks", split) as mapped:
        with Devices() as mounts:
            top = mounts.mount(mapped.node, SCRATCH / "mnt", "dax=always")
            tap.result(not has_dax(top / "file"), "one target without it: the device has none")
            tap.result((top / "file").read_bytes() == content, "one target without it: the file is right")
        mapped.reload(whole)
        with Devices() as mounts:
            top = mounts.mount(mapped.node, SCRATCH / "mnt", "dax=always")
            tap.result(has_dax(top / "file"), "a device without it gets it by its next table")
    odd = memory.part(HUGE + 512, 512)
    refused(tap, "a partition that does not end with a page", f"0 8 rust-linear {odd} 0 1 dax", errno.ENXIO)
memory.forget()
linear_twin.unload()
tap.finish()
