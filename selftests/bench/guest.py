# SPDX-License-Identifier: GPL-2.0
"""Runs parts of the benchmark inside the guest, in one boot.

The arguments are the names of parts, each of which may be followed by a slash and a pattern that selects some of its
rows: `zfile/lz4-4k*`.
"""

import contextlib
import fnmatch
import importlib
import pathlib
import subprocess
import sys
import time

import measure
from test_script import run

# RAM disks take memory for what is written to them only. dm-vdo wants 4829 MiB for its least volume.
DISKS, DISK_BYTES = 251, 4900 << 20


@contextlib.contextmanager
def disks():
    """RAM disks for one part. Afterwards their memory is free for the next: where memory is short, the kernel drops
    programs, and to get them back from the host takes a time that is no count of instructions."""
    run("modprobe", "brd", f"rd_nr={DISKS}", f"rd_size={DISK_BYTES >> 10}")
    yield
    run("rmmod", "brd")


def main():
    # Nothing else may run at times that differ from one boot to the next.
    if pathlib.Path("/run/udev/control").exists():
        run("udevadm", "control", "--stop-exec-queue")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60%", "tmpfs", "/tmp"], check=True)
    run("modprobe", "dm-mod")
    measure.report(kernel=measure.os.uname().release)
    for words in sys.argv[1:]:
        name, _, pattern = words.partition("/")
        start = time.monotonic()
        with disks():
            importlib.import_module(name).main(lambda row: fnmatch.fnmatch(row, pattern or "*"))
        measure.report(part=name, guest_seconds=round(time.monotonic() - start, 1))


main()
