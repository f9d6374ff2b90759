# SPDX-License-Identifier: GPL-2.0
"""The twin of dm-linear in Rust: its module, devices of it, and what is below them."""

import atexit
import mmap
import os

from dm_ioctl import Mapped
from test_script import MODULES, SCRATCH, run

MODULE = MODULES / "selftests/dm-linear-twin/dm-rust-linear.ko"


def is_loaded():
    with open("/proc/modules") as modules:
        return any(line.startswith("dm_rust_linear ") for line in modules)


def load(*parameters):
    """Loads the module, and those that it needs."""
    for name in ("dm-mod", *run("modinfo", "--field", "depends", MODULE).strip().split(",")):
        if name:
            run("modprobe", name)
    run("insmod", MODULE, *parameters)


def unload():
    run("rmmod", "dm_rust_linear")


# After all devices, which are removed by what is registered later.
atexit.register(lambda: is_loaded() and unload())


def loop(devices, content, *options):
    """A writable loop device with some content; returns its node and the file below it."""
    run("modprobe", "loop")
    path = SCRATCH / f"lower{os.urandom(4).hex()}"
    path.write_bytes(content)
    devices.undo(os.unlink, path)
    node = run("losetup", "--find", "--show", *options, path).strip()
    devices.undo(run, "losetup", "--detach", node)
    return node, path


def twin(table, name="t-rust"):
    """A writable device of one or more lines of a table."""
    return Mapped(name, table, readonly=False)


def write_direct(device, data, piece):
    """Writes all of a device with O_DIRECT, in pieces."""
    descriptor = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            with memoryview(buffer) as view:
                for at in range(0, len(data), piece):
                    with view[at:at + piece] as part:
                        if os.pwrite(descriptor, part, at) != len(part):
                            raise OSError(f"{device}: a short write at byte {at}")
    finally:
        os.close(descriptor)
