# SPDX-License-Identifier: GPL-2.0
"""Runs parts of the benchmark inside the guest, in one boot.

The arguments are the names of parts, each of which may be followed by a slash and a pattern that selects some of its
rows: `zfile/lz4-4k*`.
"""

import fnmatch
import importlib
import subprocess
import sys
import time

import measure
from devices import run

# RAM disks take memory for what is written to them only. dm-vdo wants 4829 MiB for its least volume.
DISKS, DISK_BYTES = 251, 4900 << 20


def main():
    # Nothing else may run at times that differ from one boot to the next.
    run("udevadm", "control", "--stop-exec-queue")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60%", "tmpfs", "/tmp"], check=True)
    run("modprobe", "dm-mod")
    run("modprobe", "brd", f"rd_nr={DISKS}", f"rd_size={DISK_BYTES >> 10}")
    measure.report(kernel=measure.os.uname().release)
    for words in sys.argv[1:]:
        name, _, pattern = words.partition("/")
        start = time.monotonic()
        importlib.import_module(name).main(lambda row: fnmatch.fnmatch(row, pattern or "*"))
        measure.report(part=name, guest_seconds=round(time.monotonic() - start, 1))


main()
