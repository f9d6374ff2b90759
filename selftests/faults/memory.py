#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads while no memory can be had, or none that is contiguous, through dm-zfile over dm-overlaybd over dm-zfile: they
end and are right. How often the upper dm-zfile reads from below says in what steps."""

import os
import pathlib
import sys
import threading

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import zfile_writer
from block_devices import Devices, read_direct
from debug_kernel import attribute, no_leaks, quiet_faults, require, unload
from test_script import OVBD, SCRATCH, Tap, load, run

BYTES, BLOCK = 1 << 20, 4096
PIECE = 128 << 10


def stack(devices, algorithm):
    """A ZFile of the content in an image of which the one layer is compressed; returns the content, the upper target
    and what is below it."""
    content = zfile_writer.content(BYTES, BLOCK, seed=7)
    blob = zfile_writer.build(content, algorithm=algorithm, block=BLOCK)
    image, layer = SCRATCH / f"{algorithm}.img", SCRATCH / f"{algorithm}.layer"
    image.write_bytes(blob + bytes(-len(blob) % 4096))
    layer.unlink(missing_ok=True)
    run(OVBD, "build", "--format", "zfile", "--algo", algorithm, "-o", layer, image)
    size = layer.stat().st_size
    inner = zfile_writer.original_bytes(layer.read_bytes())
    with open(layer, "ab") as file:
        file.write(bytes(-size % 512))
    bottom = devices.mapped("bottom", f"0 {-(-inner // 512)} zfile {devices.loop(layer)} {size}")
    middle = devices.mapped("middle", f"0 {image.stat().st_size // 512} overlaybd 1 {bottom.node} {inner}")
    top = devices.mapped("top", f"0 {BYTES // 512} zfile {middle.node} {len(blob)} 2 cache_blocks 0")
    return content, top, middle


def reads_of(device):
    """How many reads the device has had."""
    name = os.path.basename(os.path.realpath(device.node))
    return int(pathlib.Path(f"/sys/block/{name}/stat").read_text().split()[0])


def read_without_memory(tap, what, content, top, length):
    """Two threads read everything, and no allocation that they make succeeds."""
    wrong = []

    def read():
        pathlib.Path("/proc/thread-self/make-it-fail").write_text("1")
        try:
            wrong.extend(at for at in range(0, BYTES, length)
                         if read_direct(top.node, at, length) != content[at:at + length])
        except (OSError, MemoryError) as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tap.equal(wrong, [], f"{what}: reads of {length} bytes")


require("failslab", "fail_page_alloc", "kmemleak")
tap = Tap()
quiet_faults()
for fault in ("failslab", "fail_page_alloc"):
    attribute(fault, task_filter="Y", times=-1)
for algorithm in ("lz4", "zstd"):
    # Modules that have no buffers yet.
    load("loop", "dm-zfile", "dm-overlaybd")
    with no_leaks(tap, algorithm):
        with Devices() as devices:
            content, top, middle = stack(devices, algorithm)
            attribute("fail_page_alloc", min_order=4, probability=100)
            before = reads_of(middle)
            read_without_memory(tap, f"{algorithm}, fragmented memory", content, top, BYTES)
            attribute("fail_page_alloc", min_order=0, probability=0)
            tap.equal(reads_of(middle) - before, 2 * BYTES // PIECE,
                      f"{algorithm}, fragmented memory: large reads are in whole pieces")
        unload(tap, "dm-overlaybd", "dm-zfile")
        load("dm-zfile", "dm-overlaybd")
        with Devices() as devices:
            content, top, middle = stack(devices, algorithm)
            for fault in ("failslab", "fail_page_alloc"):
                attribute(fault, probability=100)
            before = reads_of(middle)
            read_without_memory(tap, f"{algorithm}, no memory", content, top, BYTES)
            steps = reads_of(middle) - before
            read_without_memory(tap, f"{algorithm}, no memory", content, top, 4096)
            for fault in ("failslab", "fail_page_alloc"):
                attribute(fault, probability=0)
            tap.result(steps > 2 * BYTES // PIECE, f"{algorithm}, no memory: large reads are in smaller steps", steps)
        unload(tap, "dm-overlaybd", "dm-zfile")
tap.finish()
