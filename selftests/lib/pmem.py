# SPDX-License-Identifier: GPL-2.0
"""Persistent memory of the guest, which the harness asks for on the kernel's command line, in partitions; and what file
systems say of direct access to it."""

import atexit
import ctypes
import fcntl
import os
import pathlib
import struct
import time

from test_script import CommandFailed, run

HUGE = 2 << 20
DISK = "/dev/pmem0"
# linux/blkpg.h
BLKPG, ADD, DELETE = 0x1269, 1, 2
PARTITION = struct.Struct("=qqi64s64s4x")
# linux/stat.h
AT_FDCWD, STATX_ATTR_DAX = -100, 0x00200000


class Missing(Exception):
    """This guest has no persistent memory; the text says what it lacks."""


def wait_for(path):
    """Waits until a device is there; returns whether it is."""
    for _ in range(100):
        if os.path.exists(path):
            return True
        time.sleep(0.1)
    return False


def _partition(operation, number, start=0, length=0):
    data = ctypes.create_string_buffer(PARTITION.pack(start, length, number, b"", b""))
    argument = struct.pack("=iiiiQ", operation, 0, PARTITION.size, 0, ctypes.addressof(data))
    disk = os.open(DISK, os.O_RDONLY)
    try:
        fcntl.ioctl(disk, BLKPG, argument)
    finally:
        os.close(disk)


class Pmem:
    """The memory, cut into partitions one after the other."""

    def __init__(self):
        try:
            for module in ("nd_pmem", "nd_e820"):
                run("modprobe", module)
        except CommandFailed as error:
            raise Missing(error) from error
        if not wait_for(DISK):
            raise Missing(f"no {DISK} (memmap= on the kernel's command line)")
        self.bytes = int(run("blockdev", "--getsize64", DISK))
        # The end of the last partition, and the number of all that there were.
        self._end = self._count = 0
        self._nodes = {}
        atexit.register(self.forget)

    def part(self, length, align=HUGE):
        """A partition of at least so many bytes, of which nobody knows what is in it."""
        length = -(-length // align) * align
        assert self._end + length <= self.bytes, f"{DISK} is too small"
        self._count += 1
        _partition(ADD, self._count, self._end, length)
        node = f"{DISK}p{self._count}"
        self._nodes[node] = self._count
        self._end += length
        wait_for(node)
        return node

    def put(self, content):
        """A partition that begins with bytes, or with those of a file."""
        if isinstance(content, (str, pathlib.Path)):
            content = pathlib.Path(content).read_bytes()
        node = self.part(len(content))
        with open(node, "r+b") as file:
            file.write(content)
        return node

    def zeros(self, length):
        """A partition of zeros."""
        node = self.part(length)
        with open(node, "r+b") as file:
            while length > 0:
                length -= file.write(bytes(min(length, 8 * HUGE)))
        return node

    def forget(self):
        """Removes all partitions."""
        for node, number in self._nodes.items():
            try:
                _partition(DELETE, number)
            except OSError as error:
                print(f"# {node}: {error}", flush=True)
        self._nodes = {}
        self._end = 0


def required(tap):
    """The memory; where the guest has none, the test says so and is over."""
    try:
        return Pmem()
    except Missing as why:
        tap.skip("direct access", why)
        tap.finish()


def has_dax(path):
    """Whether the file at `path` is accessed directly, as statx says."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(AT_FDCWD, os.fsencode(path), 0, 0x7FF, buffer):
        raise OSError(ctypes.get_errno(), f"statx {path}")
    attributes, mask = struct.unpack_from("=8xQ", buffer)[0], struct.unpack_from("=56xQ", buffer)[0]
    return bool(attributes & mask & STATX_ATTR_DAX)


def cached():
    """Bytes of memory that hold what block devices and files have."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("Cached", "Buffers")) * 1024
