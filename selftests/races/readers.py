#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Two readers at once, in reads of all sizes, and one whose reads two CPUs share, while a third program asks for
status: for KCSAN to find what two CPUs do to each other. What is read, other tests compare."""

import os
import sys
import threading

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
import zfile_writer
from test_script import SOURCE, CommandFailed, Tap, load, run

BYTES = 4 << 20
READS = SOURCE / "tools/target/release/ovbd-reads"
SIZES = {512: 2000, 4096: 2000, 65536: 500, 1 << 20: 50}


def blob_on(disk, blob):
    """Writes an image to a RAM disk."""
    with open(disk, "r+b") as file:
        file.write(blob + bytes(-len(blob) % 512))
    return f"{disk} {len(blob)}"


def read_all(tap, what, device, message):
    """Reads of each size by two threads, large ones by one; between them, status in all forms and a message."""
    done = threading.Event()
    failed = []

    def ask():
        while not done.wait(0.05):
            try:
                device.status()
                run("dmsetup", "table", device.name)
                run("dmsetup", "message", device.name, "0", *message)
            except (CommandFailed, OSError) as error:
                failed.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for size, count in SIZES.items():
            tap.attempt(f"{what}: two threads, reads of {size} bytes", run, READS, "--direct", "--jobs=2",
                        f"--size={size}", f"--count={count}", "--passes=1", device.node)
        # Parts of these go to the other CPU.
        tap.attempt(f"{what}: one thread, large reads", run, READS, "--direct", "--size=1048576", "--count=200",
                    "--passes=1", device.node)
    finally:
        done.set()
        asking.join()
    tap.equal(failed, [], f"{what}: status meanwhile")


tap = Tap()
load("dm-zfile", "dm-overlaybd")
run("modprobe", "brd", "rd_nr=2", f"rd_size={2 * BYTES >> 10}")
sectors = BYTES // 512
for block in (4096, 65536):
    content = zfile_writer.content(BYTES, block, seed=block)
    blob = blob_on("/dev/ram0", zfile_writer.build(content, block=block))
    with dm_ioctl.Mapped("races", f"0 {sectors} zfile {blob}") as device:
        read_all(tap, f"dm-zfile, blocks of {block}", device, ["stats"])
stack = [blob_on(disk, lsmt_writer.layer([(start, 16, bytes(16 * 512)) for start in range(first, sectors, 64)],
                                         sectors))
         for disk, first in (("/dev/ram0", 0), ("/dev/ram1", 32))]
with dm_ioctl.Mapped("races", f"0 {sectors} overlaybd 2 {' '.join(stack)}") as device:
    read_all(tap, "dm-overlaybd", device, ["lookup", "40"])
run("rmmod", "brd")
tap.finish()
