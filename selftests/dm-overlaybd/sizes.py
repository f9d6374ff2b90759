#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Layers of different virtual sizes: the topmost size that is not 0 is that of the stack, and it alone cuts. What a
smaller layer in between hides by its size shows again under a larger one, whether the layers below are separate or were
merged into one, whose entries then lie beyond its own size."""

import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices, read_direct, stack_table
from test_script import Tap, load

LARGE, SMALL = 4096, 1000
# Sizes of the layers, bottom first, and the size that the stack has.
SIZES = {
    "a layer with entries beyond its size": ([SMALL], SMALL),
    "a smaller layer on top": ([LARGE, SMALL], SMALL),
    "a larger layer on top of a smaller one": ([LARGE, SMALL, LARGE], LARGE),
    "a larger layer on top of one with entries beyond its size": ([SMALL, LARGE], LARGE),
    "a layer without a size on top": ([LARGE, SMALL, 0], SMALL),
    "only layers without a size over one": ([LARGE, 0, 0], LARGE),
}


def check(tap, devices, what, stack, sizes, size, model):
    line = stack_table(devices, [lsmt_writer.layer(*pair) for pair in zip(stack, sizes)], size)
    wanted = model.read(0, size * 512)
    with dm_ioctl.Mapped("sizes", line) as mapped:
        tap.result(read_direct(mapped.node, 0, len(wanted)) == wanted, f"{what}: content")
        owned = [sum(source[0] == number for source in model.source[:size]) for number in range(len(stack))]
        tap.equal([int(word) for word in mapped.status().split()[7:]], owned, f"{what}: sectors of each layer")
        if size == SMALL:
            tap.equal(mapped.message(f"lookup {size - 1}").split()[-1], "1", f"{what}: an entry is cut at the end")
    words = line.split(" ", 2)[2]
    dm_ioctl.table_refused(tap, log, f"{what}: a sector more", f"0 {size + 1} {words}",
                     f"the table has {size + 1} sectors, the stack {size}")


tap = Tap()
generator = random.Random(16)
load("loop", "dm-overlaybd")
log = dm_ioctl.KernelLog()
for what, (sizes, size) in SIZES.items():
    stack = lsmt_writer.random_stack(generator, LARGE, len(sizes))
    # Entries on both sides of the smaller size and across it, with nothing above them there.
    stack[0] = [(at, 100, generator.randbytes(100 * 512)) for at in range(0, LARGE - 100, 110)]
    for above in stack[1:]:
        above[:] = [segment for segment in above if segment[0] > SMALL + 200 or segment[0] + segment[1] < SMALL - 200]
    with Devices() as devices:
        check(tap, devices, what, stack, sizes, size, lsmt_writer.Model(stack, LARGE))
tap.finish()
