#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Layers on devices with different logical block sizes: the mapped device has the largest, and a layer whose segments
are no multiples of its device's blocks is refused."""

import errno
import os
import pathlib
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices, read_direct, stack_table
from test_script import Tap, load

SECTORS = 2048


def block_size(mapped):
    return int(pathlib.Path(f"/sys/block/dm-{mapped.minor}/queue/logical_block_size").read_text())


def check(tap, what, line, model):
    with dm_ioctl.Mapped("blocks", line) as mapped:
        tap.equal(block_size(mapped), 4096, f"{what}: the device has blocks of 4096 bytes")
        tap.result(read_direct(mapped.node, 0, SECTORS * 512) == model.content, f"{what}: content")
        good = all(read_direct(mapped.node, at, 4096) == model.read(at, 4096) for at in range(0, SECTORS * 512, 4096))
        tap.result(good, f"{what}: each block")
        try:
            read_direct(mapped.node, 512, 512)
        except OSError as error:
            tap.equal(error.errno, errno.EINVAL, f"{what}: smaller reads are refused")
        else:
            tap.result(False, f"{what}: smaller reads are refused")
        with open(mapped.node, "rb") as file:
            file.seek(777)
            tap.result(file.read(100000) == model.read(777, 100000), f"{what}: buffered reads at any byte")


tap = Tap()
generator = random.Random(7)
load("loop", "dm-overlaybd")
log = dm_ioctl.KernelLog()
aligned = lsmt_writer.random_stack(generator, SECTORS, 2, unit=8)
odd = lsmt_writer.random_stack(generator, SECTORS, 1)
with Devices() as devices:
    def words(stack, size):
        blobs = [lsmt_writer.layer(segments, SECTORS) for segments in stack]
        return stack_table(devices, blobs, SECTORS, block_size=size).split()[4:]

    large, small = words(aligned, 4096), words(odd, 512)
    check(tap, "aligned layers on 4096", f"0 {SECTORS} overlaybd 2 {' '.join(large)}",
          lsmt_writer.Model(aligned, SECTORS))
    check(tap, "odd layer on 512 below", f"0 {SECTORS} overlaybd 3 {' '.join(small + large)}",
          lsmt_writer.Model(odd + aligned, SECTORS))
    with dm_ioctl.Mapped("small", f"0 {SECTORS} overlaybd 1 {' '.join(small)}") as mapped:
        tap.equal(block_size(mapped), 512, "a layer on 512 alone: the device has blocks of 512 bytes")

    reason = "Segments are not aligned to the logical blocks of the layer device"
    # Above the others its segments cut theirs at any sector.
    dm_ioctl.table_refused(tap, log, "an odd layer on 512 above", f"0 {SECTORS} overlaybd 3 {' '.join(large + small)}",
                           "layer 1", reason)

    # The device is longer than the layer, to a whole number of blocks.
    for what, start, sectors in [("a start", 3, 8), ("an end", 8, 13), ("a short segment", 16, 1)]:
        blob = lsmt_writer.layer([(start, sectors, generator.randbytes(sectors * 512))], SECTORS)
        line = stack_table(devices, [blob + bytes(-len(blob) % 4096)], SECTORS, block_size=4096)
        line = line.rsplit(" ", 1)[0] + f" {len(blob)}"
        dm_ioctl.table_refused(tap, log, f"{what} that is not aligned", line, "layer 0", reason)
    # The length of the data is a multiple of a block; where it goes is not.
    pieces = [(3, 8, generator.randbytes(4096))]
    line = stack_table(devices, [lsmt_writer.layer(pieces, SECTORS)], SECTORS, block_size=4096)
    dm_ioctl.table_refused(tap, log, "whole blocks at an odd place", line, "layer 0", reason)
tap.finish()
