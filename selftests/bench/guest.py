# SPDX-License-Identifier: GPL-2.0
"""Runs parts of the benchmark inside the guest, in one boot.

The arguments are the names of parts, each of which may be followed by a slash and a pattern that selects some of its
rows: `zfile/lz4-4k*`.
"""

import fcntl
import fnmatch
import importlib
import struct
import subprocess
import sys
import time

import measure
from devices import run

# RAM disks take memory for what is written to them only. dm-vdo wants 4829 MiB for its least volume.
DISKS, DISK_BYTES = 251, 4900 << 20
# linux/fs.h
BLKDISCARD = 0x1277


def empty_disks():
    """Gives back the memory of what an earlier part has written. Where memory is short, the kernel drops programs, and
    to get them back from the host takes a time that is no count of instructions."""
    for number in range(DISKS):
        with open(measure.ram_disk(number), "r+b", buffering=0) as disk:
            fcntl.ioctl(disk, BLKDISCARD, struct.pack("=QQ", 0, DISK_BYTES))


def main():
    # Nothing else may run at times that differ from one boot to the next.
    run("udevadm", "control", "--stop-exec-queue")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60%", "tmpfs", "/tmp"], check=True)
    run("modprobe", "dm-mod")
    run("modprobe", "brd", f"rd_nr={DISKS}", f"rd_size={DISK_BYTES >> 10}")
    measure.report(kernel=measure.os.uname().release)
    for words in sys.argv[1:]:
        name, _, pattern = words.partition("/")
        empty_disks()
        start = time.monotonic()
        importlib.import_module(name).main(lambda row: fnmatch.fnmatch(row, pattern or "*"))
        measure.report(part=name, guest_seconds=round(time.monotonic() - start, 1))


main()
