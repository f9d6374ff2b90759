# SPDX-License-Identifier: GPL-2.0
"""Reads of all shapes for the tests of read-only targets, fio that verifies, and the writes that must fail."""

import errno
import fcntl
import mmap
import os
import struct

import dm_ioctl
from block_devices import read_direct

BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F


class Reader:
    """Reads a device through one buffer that is never allocated anew."""

    def __init__(self, device, flags=os.O_DIRECT):
        self._descriptor = os.open(device, os.O_RDONLY | flags)
        self._buffer = mmap.mmap(-1, 4 << 20)
        self._view = memoryview(self._buffer)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        os.close(self._descriptor)

    def read(self, offset, length, shift=0, pieces=1, flags=0):
        """The bytes, read into `pieces` places of the buffer, each `shift` bytes behind the beginning of a page."""
        each = length // pieces
        room = -(-(each + shift) // mmap.PAGESIZE) * mmap.PAGESIZE
        views = [self._view[at * room + shift:at * room + shift + each] for at in range(pieces)]
        count = os.preadv(self._descriptor, views, offset, flags)
        assert count == each * pieces, f"{count} bytes of {each * pieces} at {offset}"
        return b"".join(views)

    def error(self, offset, length):
        """The error number of a read, 0 for none."""
        try:
            self.read(offset, length)
        except OSError as error:
            return error.errno
        return 0


def fio(*arguments):
    return ["fio", "--name=t", "--verify=crc32c", "--verify_interval=4096", "--verify_fatal=1", "--thread", *arguments]


def refuses(number, function, *arguments):
    """Passes where the call fails with one of the errors."""
    try:
        function(*arguments)
    except OSError as error:
        assert error.errno in number, f"errno {error.errno}"
        return
    raise AssertionError("it succeeded")


def check_writes(tap, line, content):
    """Writes, discards and zeroing of a device made from the table `line` fail and change nothing of `content`."""
    with dm_ioctl.Mapped("writes", line) as mapped:
        device = os.open(mapped.node, os.O_RDWR | os.O_DIRECT)
        tap.attempt("a read-only device cannot be written", refuses, (errno.EPERM,), os.pwrite, device,
                    mmap.mmap(-1, 4096), 0)
        os.close(device)
    # Device mapper sends on what is written to a device above, whatever the one below is.
    linear = f"0 {line.split()[1]} linear"
    with (dm_ioctl.Mapped("below", line) as below,
          dm_ioctl.Mapped("writes", f"{linear} {below.node} 0", readonly=False) as mapped):
        device = os.open(mapped.node, os.O_RDWR | os.O_DIRECT)
        try:
            for what, first in [("data", 0), ("the end", len(content) - 4096)]:
                tap.attempt(f"write to {what}: fails", refuses, (errno.EIO,), os.pwrite, device, mmap.mmap(-1, 4096),
                            first)
            span = struct.pack("=QQ", 0, 65536)
            tap.attempt("discard: fails", refuses, (errno.EOPNOTSUPP,), fcntl.ioctl, device, BLKDISCARD, span)
            tap.attempt("zeroing: fails", refuses, (errno.EIO, errno.EOPNOTSUPP), fcntl.ioctl, device, BLKZEROOUT, span)
            tap.attempt("flush: does no harm", os.fsync, device)
        finally:
            os.close(device)
        tap.result(read_direct(mapped.node, 0, len(content)) == content, "the content after that is the same")
