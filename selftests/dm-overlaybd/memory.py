#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What loading a table takes of the memory: it is charged to whoever loads, follows from the entries that cover
something and not from what trailers say, and where the limit does not allow it the table is refused and nobody is
killed."""

import errno
import os
import pathlib
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices
from test_script import SCRATCH, Tap, load

GROUPS = pathlib.Path("/sys/fs/cgroup")
MIB = 1 << 20
# As many entries as a layer may have, in whole batches of padding.
ENTRIES = 1_000_000 // 256 * 256
# The documented bounds: indexes as they are read, what is kept of an entry that covers something, and what such an
# entry takes at most while the table is loaded.
INDEXES, KEPT, LOADING = 16 * MIB, 16, 64
# The process that loads, headers and trailers, and the last part of the growing index.
OTHER = 5 * MIB


class Group:
    """A control group with a limit, in which a process loads a table."""

    def __init__(self, limit):
        self._path = GROUPS / "ovbd-table"
        self._path.mkdir()
        self._write("memory.max", limit)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        dm_ioctl.remove("limited")
        self._path.rmdir()

    def _write(self, name, value):
        (self._path / name).write_text(str(value))

    def number(self, name):
        return int((self._path / f"memory.{name}").read_text())

    def killed(self):
        events = dict(line.split() for line in (self._path / "memory.events").read_text().splitlines())
        return int(events["oom_kill"])

    def load(self, line):
        """Loads the table; returns the error number, 0 for none, or None where the process was killed."""
        child = os.fork()
        if child == 0:
            try:
                self._write("cgroup.procs", os.getpid())
                dm_ioctl.Mapped("limited", line)
                os._exit(0)
            except OSError as error:
                os._exit(error.errno)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status if status >= 0 else None


def with_limit(tap, what, line, limit, wanted):
    with Group(limit) as group:
        error = group.load(line)
        print(f"# {what}: {group.number('peak') >> 10} KiB of {limit >> 10} at the peak, "
              f"{group.number('current') >> 10} KiB kept")
        tap.equal((error, group.killed()), (wanted, 0), what)
        return group.number("current")


def write_layer(name, index, sectors, data_sectors):
    path = SCRATCH / name
    return path, lsmt_writer.write_sparse(path, sectors, data_sectors, index)


tap = Tap()
try:
    (GROUPS / "cgroup.subtree_control").write_text("+memory")
except OSError as error:
    print(f"1..0 # SKIP no memory controller: {error}")
    sys.exit(0)
load("loop", "dm-overlaybd")
with Devices() as devices:
    path, size = write_layer("padded", lsmt_writer.entry(0, 8, 8) + lsmt_writer.PADDING * (ENTRIES - 1), 8, 8)
    count = 8
    line = f"0 8 overlaybd {count}" + f" {devices.loop(path)} {size}" * count
    with_limit(tap, f"{count} layers with {ENTRIES - 1} entries of padding each", line, INDEXES + OTHER, 0)

    # Segments of one sector, and what shows through their gaps: as many merged segments as there can be.
    comb = lsmt_writer.uniform_index(ENTRIES, 1, 1, 2, 8)
    sectors = 2 * ENTRIES + 1
    below = b"".join(lsmt_writer.entry(at, min(16383, sectors - at), 8, zeroed=True) for at in range(0, sectors, 16383))
    below += lsmt_writer.PADDING * (-(len(below) // 16) % 256)
    words = []
    for name, index, data in (("below", below, 8), ("comb", comb, ENTRIES)):
        path, size = write_layer(name, index, sectors, data)
        words.append(f"{devices.loop(path)} {size}")
    line = f"0 {sectors} overlaybd 2 {' '.join(words)}"
    most = INDEXES + LOADING * ENTRIES + OTHER
    kept = with_limit(tap, f"{2 * ENTRIES + 1} merged segments", line, most, 0)
    tap.result(kept >= 2 * KEPT * ENTRIES, "the merged index is charged to the group that loaded it", kept)
    with_limit(tap, "a limit that the indexes do not fit into", line, INDEXES + OTHER, errno.ENOMEM)
    with_limit(tap, "a limit that the merged index does not fit into", line, INDEXES + KEPT * ENTRIES + OTHER,
               errno.ENOMEM)
    with Group(most) as group:
        tap.equal(group.load(line), 0, "the same table loads with more")
tap.finish()
