# SPDX-License-Identifier: GPL-2.0
"""Loop and mapped devices that are always removed, and reads of block devices."""

import atexit
import errno
import fcntl
import hashlib
import mmap
import os
import pathlib
import struct
import subprocess
import tempfile

import dm_ioctl
from test_script import SCRATCH, CommandFailed, run

# Not waiting for udev saves seconds under emulation; devtmpfs has the nodes at once.
DMSETUP = ["dmsetup", "--noudevsync", "--noudevrules"]

# linux/loop.h: struct loop_config holds the file, the block size and a loop_info64, of which only the offset, the
# limit and the flags are set here.
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LOOP_CLR_FD = 0x4C82, 0x4C0A, 0x4C01
LO_FLAGS_READ_ONLY = 1
LOOP_CONFIG = struct.Struct("=II24xQQ12xI176x64x")


def configure_free_loop(config):
    """Gives a file to the first free loop device; returns the device, or None if another process was faster."""
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        device = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
    finally:
        os.close(control)
    loop = os.open(device, os.O_RDONLY)
    try:
        fcntl.ioctl(loop, LOOP_CONFIGURE, config)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return None
    finally:
        os.close(loop)
    return device


def detach(device):
    """Detaches a loop device from its file."""
    loop = os.open(device, os.O_RDONLY)
    try:
        fcntl.ioctl(loop, LOOP_CLR_FD)
    finally:
        os.close(loop)


class Devices:
    """Loop and mapped devices of one scope, removed in reverse order when it is left."""

    def __init__(self):
        self._undo = []
        atexit.register(self.close)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()

    def close(self):
        while self._undo:
            command, *arguments = self._undo.pop()
            try:
                command(*arguments)
            except (CommandFailed, OSError) as error:
                print(f"# {error}", flush=True)

    def undo(self, command, *arguments):
        """Calls a function when the scope is left."""
        self._undo.append([command, *arguments])

    def loop(self, path, offset=0, size=0, block_size=0):
        """A read-only loop device over `size` bytes of a file from `offset` on, 0 for all.

        By ioctl: stacks of 255 layers would take minutes with a process each under emulation.
        """
        file = os.open(path, os.O_RDONLY)
        try:
            config = LOOP_CONFIG.pack(file, block_size, offset, size, LO_FLAGS_READ_ONLY)
            while (device := configure_free_loop(config)) is None:
                pass
        finally:
            os.close(file)
        self._undo.append([detach, device])
        return device

    def map(self, name, table, readonly=True):
        """A mapped device; returns its node."""
        try:
            run(*DMSETUP, "create", name, *(["--readonly"] if readonly else []), input=table)
        except CommandFailed:
            subprocess.run([*DMSETUP, "remove", name], stderr=subprocess.DEVNULL)
            raise
        self._undo.append([run, *DMSETUP, "remove", "--retry", name])
        return "/dev/" + run("dmsetup", "info", "--columns", "--noheadings", "-o", "blkdevname", name).strip()

    def mapped(self, name, table):
        """As `map`, by ioctl; returns a `dm_ioctl.Mapped`."""
        device = dm_ioctl.Mapped(name, table)
        self._undo.append([device.remove])
        return device

    def mount(self, device, directory, *options):
        """Mounts a device read-only on a directory that is made where it is missing."""
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        run("mount", "--options", ",".join(["ro", *options]), device, directory)
        self._undo.append([run, "umount", directory])
        return pathlib.Path(directory)


def stack_table(devices, blobs, length, **loop):
    """The table line for a stack of blobs, bottom first, each in a file of its own behind a loop device."""
    words = []
    for blob in blobs:
        with tempfile.NamedTemporaryFile(dir=SCRATCH) as file:
            file.write(blob)
            file.flush()
            words += [devices.loop(file.name, **loop), str(len(blob))]
    return f"0 {length} overlaybd {len(blobs)} {' '.join(words)}"


def sectors(device):
    """The size of a block device in 512-byte sectors."""
    return int(run("blockdev", "--getsz", device))


def read_direct(device, offset, length):
    """Reads with O_DIRECT; `offset` and `length` are multiples of the logical block size."""
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        # An anonymous mapping is page-aligned, as direct I/O wants its buffer.
        with mmap.mmap(-1, max(length, mmap.PAGESIZE)) as buffer:
            view = memoryview(buffer)[:length]
            try:
                done = 0
                while done < length:
                    count = os.preadv(descriptor, [view[done:]], offset + done)
                    if count == 0:
                        raise OSError(f"{device} ends at byte {offset + done}")
                    done += count
                return bytes(view)
            finally:
                view.release()
    finally:
        os.close(descriptor)


def sha256(path, length=None):
    """The SHA-256 of a file or block device (of its first `length` bytes)."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while length is None or length > 0:
            chunk = file.read(1 << 20 if length is None else min(1 << 20, length))
            if not chunk:
                break
            digest.update(chunk)
            if length is not None:
                length -= len(chunk)
    return digest.hexdigest()
