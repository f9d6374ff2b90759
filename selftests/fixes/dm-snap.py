#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A snapshot that discards in its store: the store shrinks, what is discarded reads as zeros, and nothing else changes.
Without upstream/0002-dm-snapshot-give-the-discard-granularity-in-bytes.patch the kernel divides by zero when such a table
is loaded."""

import fcntl
import os
import pathlib
import random
import struct
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, read_direct
from test_script import SCRATCH, Tap, load, run

SECTORS = 8192
# linux/fs.h
BLKDISCARD = 0x1277


def discard(node, start, size):
    with open(node, "r+b", buffering=0) as device:
        fcntl.ioctl(device, BLKDISCARD, struct.pack("QQ", start, size))


def limit(name, mapped):
    number = os.stat(mapped.node).st_rdev
    return int(pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/{name}").read_text())


def use(tap, origin, store, chunk_sectors):
    table = f"0 {SECTORS} snapshot {origin} {store} P {chunk_sectors} 1 discard_zeroes_cow"
    chunk = chunk_sectors * 512
    with dm_ioctl.Mapped("discards", table, readonly=False) as mapped:
        tap.equal(limit("discard_granularity", mapped), chunk, f"chunks of {chunk}: the granularity")
        with open(mapped.node, "r+b", buffering=0) as device:
            device.write(b"n" * 4 * chunk)
            os.fsync(device)
        discard(mapped.node, chunk, 2 * chunk)
        got = read_direct(mapped.node, 0, 4 * chunk)
        tap.equal(got, b"n" * chunk + bytes(2 * chunk) + b"n" * chunk, f"chunks of {chunk}: two are discarded")
        with dm_ioctl.Mapped("above", f"0 {SECTORS} linear {mapped.node} 0", readonly=False) as above:
            tap.equal(limit("discard_granularity", above), chunk, f"chunks of {chunk}: the granularity above")
            discard(above.node, 0, SECTORS * 512)
            got = read_direct(above.node, 0, SECTORS * 512)
        # What is not in the store cannot be discarded there.
        tap.equal(got[:4 * chunk], bytes(4 * chunk), f"chunks of {chunk}: what was written is gone")
        tap.equal(got[4 * chunk:], content[4 * chunk:], f"chunks of {chunk}: the origin is not")
    tap.equal(read_direct(origin, 0, SECTORS * 512), content, f"chunks of {chunk}: the origin is as it was")


tap = Tap()
load("loop")
content = random.Random(22).randbytes(SECTORS * 512)
path = SCRATCH / "content"
path.write_bytes(content)
with Devices() as devices:
    for chunk_sectors in (8, 64, 512):
        store = SCRATCH / f"store{chunk_sectors}"
        with open(store, "wb") as file:
            file.truncate(16 << 20)
        writable = run("losetup", "--find", "--show", store).strip()
        use(tap, devices.loop(path), writable, chunk_sectors)
        run("losetup", "--detach", writable)
tap.finish()
