#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A million segments in 250 layers: the table loads, its memory stays in bounds, and reads and lookups at random
sectors find what belongs there. The time to load is reported, not judged."""

import os
import random
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices, read_direct
from test_script import SCRATCH, Tap, load

LAYERS = 250
EACH = 4000
SEGMENTS = LAYERS * EACH
LENGTH = 8
SECTORS = SEGMENTS * LENGTH
MEMORY = 24 << 20


def write_layer(path, number, samples, generator, content):
    """Layer `number` holds every 250th block; its data is a hole but for the samples."""
    pieces = []
    for block in samples:
        if block % LAYERS == number:
            content[block] = generator.randbytes(LENGTH * 512)
            pieces.append((8 + block // LAYERS * LENGTH, content[block]))
    index = lsmt_writer.uniform_index(EACH, LENGTH, number * LENGTH, LAYERS * LENGTH, 8)
    return lsmt_writer.write_sparse(path, SECTORS, EACH * LENGTH, index, pieces)


tap = Tap()
generator = random.Random(8)
load("loop", "dm-overlaybd")
samples = generator.sample(range(SEGMENTS), 1000)
content = {}
with Devices() as devices:
    words = []
    for number in range(LAYERS):
        path = SCRATCH / f"layer{number}"
        size = write_layer(path, number, samples, generator, content)
        words += [devices.loop(path), str(size)]
    line = f"0 {SECTORS} overlaybd {LAYERS} {' '.join(words)}"
    start = time.monotonic()
    with dm_ioctl.Mapped("million", line) as mapped:
        seconds = time.monotonic() - start
        fields = [int(word) for word in mapped.status().split()[3:]]
        print(f"# {SEGMENTS} segments in {LAYERS} layers: {seconds:.2f} s to load, {fields[3]} bytes")
        tap.equal(fields[:3], [LAYERS, SEGMENTS, SECTORS], "status: layers, segments, mapped sectors")
        tap.result(fields[3] <= MEMORY, f"memory is at most {MEMORY} bytes", fields[3])
        tap.equal(set(fields[4:]), {EACH * LENGTH}, "status: every layer owns its share")
        wrong = [block for block, data in content.items() if read_direct(mapped.node, block * 4096, 4096) != data]
        tap.equal(wrong, [], f"reads of {len(content)} random blocks")
        wrong = []
        for _ in range(1000):
            sector = generator.randrange(SECTORS)
            block, inside = divmod(sector, LENGTH)
            number, place = block % LAYERS, 8 + block // LAYERS * LENGTH + inside
            got = mapped.message(f"lookup {sector}").split()
            if (int(got[0]), int(got[2]), int(got[3])) != (number, place, LENGTH - inside):
                wrong.append(sector)
        tap.equal(wrong, [], "lookups of 1000 random sectors")
tap.finish()
