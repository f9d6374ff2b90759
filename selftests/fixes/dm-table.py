#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A device that targets of one table open in different modes stays open for each of them. All of the targets are the
kernel's own: without upstream/0001-dm-table-keep-a-dm_dev-while-targets-use-it.patch KASAN reports a use after free, and
device mapper a device that it does not know."""

import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, read_direct
from test_script import SCRATCH, Tap, load

SECTORS = 2048


def tables(origin, store):
    """Tables and what they are about."""
    # dm-snapshot opens its origin for reading only, dm-linear opens it for writing too where the table is writable.
    narrow = f"snapshot {origin} {store} N 8"
    wide = f"8 linear {origin}"
    yield "upgraded", f"0 {SECTORS} {narrow}\n{SECTORS} {wide} 0"
    yield "upgraded, and used twice", f"0 {SECTORS} {narrow}\n{SECTORS} {wide} 0\n{SECTORS + 8} {wide} 8"
    yield "wide from the beginning", f"0 {wide} 0\n8 {SECTORS - 8} {narrow}"


def held(device):
    """Whether somebody has claimed the device."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))
    except OSError:
        return True
    return False


def use(mapped, content):
    whole = mapped.status(dm_ioctl.TABLE)
    assert "snapshot" in whole and "linear" in whole, whole
    for line in whole.splitlines():
        start, length, kind, *_, last = line.split()
        # dm-snapshot does not move what it maps.
        at = int(last if kind == "linear" else start) * 512
        got = read_direct(mapped.node, int(start) * 512, int(length) * 512)
        assert got == content[at:at + int(length) * 512], f"{line}: other bytes"


tap = Tap()
load("loop")
content = random.Random(18).randbytes(SECTORS * 512)
path = SCRATCH / "content"
path.write_bytes(content)
log = dm_ioctl.KernelLog()
with Devices() as devices:
    origin, store = devices.loop(path), devices.loop(path)
    for what, table in tables(origin, store):
        log.new()
        with dm_ioctl.Mapped("modes", table, readonly=False) as mapped:
            tap.attempt(f"{what}: works", use, mapped, content)
            # The table that is loaded shares what it opens with the one that is live.
            mapped.reload(table)
            tap.attempt(f"{what}: works after a reload", use, mapped, content)
            tap.result(held(origin), f"{what}: the device is held")
        tap.result(not held(origin), f"{what}: the device is given back")
        said = log.new()
        tap.result("device-mapper" not in said, f"{what}: device mapper has nothing to say", said)
tap.finish()
