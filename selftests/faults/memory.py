#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tables are loaded and read while no memory can be had, or none that is contiguous: through dm-zfile over dm-overlaybd
over dm-zfile, reads end and are right. How often there are reads below says in what steps."""

import contextlib
import mmap
import os
import pathlib
import sys
import threading

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import zfile_writer
from block_devices import Devices
from debug_kernel import attribute, no_leaks, quiet_faults, require, unload
from test_script import OVBD, SCRATCH, Tap, load, run

BYTES, BLOCK = 1 << 20, 4096
LARGE_BLOCK = 16 << 10


def stack(devices, algorithm):
    """A ZFile of the content in an image of which the one layer is compressed; returns the content and the devices,
    top first."""
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
    return content, top, middle, bottom


@contextlib.contextmanager
def allocations_fail():
    """What this thread does meanwhile is what faults are injected into."""
    fail = os.open("/proc/thread-self/make-it-fail", os.O_WRONLY)
    os.pwrite(fail, b"1", 0)
    try:
        yield
    finally:
        os.pwrite(fail, b"0", 0)
        os.close(fail)


def load_in_fragmented_memory(tap, devices, algorithm):
    """A device whose blocks want 32 KiB at once is made where there are no more than four pages in a row."""
    content = zfile_writer.content(BYTES, LARGE_BLOCK, seed=8)
    blob = zfile_writer.build(content, algorithm=algorithm, block=LARGE_BLOCK)
    file = SCRATCH / f"{algorithm}.large"
    file.write_bytes(blob + bytes(-len(blob) % 512))
    table = f"0 {BYTES // 512} zfile {devices.loop(file)} {len(blob)}"
    attribute("fail_page_alloc", min_order=3, probability=100)
    try:
        with allocations_fail():
            large = devices.mapped("large", table)
    except OSError as error:
        tap.result(False, f"{algorithm}, fragmented memory: a table is loaded", error)
        return
    finally:
        attribute("fail_page_alloc", min_order=0, probability=0)
    tap.equal(pathlib.Path(large.node).read_bytes(), content, f"{algorithm}, fragmented memory: a table is loaded")


def reads_of(device):
    """How many reads the device has had."""
    name = os.path.basename(os.path.realpath(device.node))
    return int(pathlib.Path(f"/sys/block/{name}/stat").read_text().split()[0])


def piece_of(device):
    """How many bytes the device reads at once."""
    name = os.path.basename(os.path.realpath(device.node))
    return int(pathlib.Path(f"/sys/block/{name}/queue/optimal_io_size").read_text())


def read_all(node, content, length, wrong):
    """Reads everything with O_DIRECT, where allocations fail only during the reads themselves."""
    descriptor = os.open(node, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, length) as buffer, memoryview(buffer) as view:
        for at in range(0, BYTES, length):
            # The pages are there when they are to be filled.
            view[:] = bytes(length)
            try:
                with allocations_fail():
                    count = os.preadv(descriptor, [view], at)
            except OSError as error:
                count = error
            if count != length or view != content[at:at + length]:
                wrong.append((at, count))
    os.close(descriptor)


def read_without_memory(tap, what, content, top, length):
    """Two threads read everything, and no allocation succeeds that they make on the way."""
    wrong = []
    threads = [threading.Thread(target=read_all, args=(top.node, content, length, wrong)) for _ in range(2)]
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
            load_in_fragmented_memory(tap, devices, algorithm)
            content, top, middle, bottom = stack(devices, algorithm)
            attribute("fail_page_alloc", min_order=4, probability=100)
            before, whole = reads_of(middle), reads_of(bottom)
            read_without_memory(tap, f"{algorithm}, fragmented memory", content, top, BYTES)
            attribute("fail_page_alloc", min_order=0, probability=0)
            tap.equal(reads_of(middle) - before, 2 * BYTES // piece_of(top),
                      f"{algorithm}, fragmented memory: large reads are in whole pieces")
            whole = reads_of(bottom) - whole
        unload(tap, "dm-overlaybd", "dm-zfile")
        load("dm-zfile", "dm-overlaybd")
        with Devices() as devices:
            content, top, _, bottom = stack(devices, algorithm)
            # The kernel itself needs a slab object for a large read.
            attribute("fail_page_alloc", probability=100)
            # The module may have kept a buffer from when the stack was made: enough for both as long as they take turns.
            for _ in range(20):
                before = reads_of(bottom)
                read_without_memory(tap, f"{algorithm}, no pages", content, top, BYTES)
                steps = reads_of(bottom) - before
                if steps > whole:
                    break
            attribute("failslab", probability=100)
            read_without_memory(tap, f"{algorithm}, no memory", content, top, BLOCK)
            for fault in ("failslab", "fail_page_alloc"):
                attribute(fault, probability=0)
            tap.result(steps > whole, f"{algorithm}, no pages: large reads are in smaller steps", f"{steps} not {whole}")
        unload(tap, "dm-overlaybd", "dm-zfile")
tap.finish()
