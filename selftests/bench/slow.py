# SPDX-License-Identifier: GPL-2.0
"""Reading through dm-zfile from a device that is slow: where fewer bytes are fetched, decompression pays.

The device is null_blk with memory behind it, which serves no more than so many bytes in a second. The figures:
`sequential` and `buffered`, 1 MiB reads with and without O_DIRECT, for each MiB; `stored`, the bytes on the device.
"""

import contextlib
import pathlib

from measure import DATA, MEBIBYTE, per_mebibyte, require_content, row, skipped, write_image
import dm_ioctl
from test_script import CommandFailed, load, run

SUITE = "slow"
LENGTH = 64 * MEBIBYTE
# A memory card, or one of many users of a network volume. The guest's processor is slow too: an instruction each
# nanosecond, where a real one does three.
MEGABYTES_PER_SECOND = 20
# Also the name of the disk.
CONFIG = pathlib.Path("/sys/kernel/config/nullb/slow")


@contextlib.contextmanager
def slow_device():
    """A device that holds what is written to it; gives its node."""
    run("modprobe", "null_blk", "nr_devices=0")
    if not CONFIG.parent.exists():
        run("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
    CONFIG.mkdir()
    try:
        for name, value in (("memory_backed", 1), ("size", LENGTH // MEBIBYTE + 1), ("mbps", MEGABYTES_PER_SECOND),
                            ("power", 1)):
            (CONFIG / name).write_text(str(value))
        yield f"/dev/{CONFIG.name}"
    finally:
        CONFIG.rmdir()


def reads(device):
    require_content(device)
    words = [f"--length={LENGTH}", f"--size={MEBIBYTE}", "--order=sequential", f"--count={LENGTH // MEBIBYTE}"]
    return {"sequential": per_mebibyte(device, *words, "--direct"), "buffered": per_mebibyte(device, *words)}


def main(chosen):
    load("dm-zfile")
    try:
        with slow_device() as disk:
            stored = write_image(disk, DATA / "data")
            row(SUITE, "raw", **reads(disk), stored=[stored])
            for name in filter(chosen, ("lz4-4k", "lz4-64k", "zstd-64k")):
                stored = write_image(disk, DATA / f"{name}.zfile")
                with dm_ioctl.Mapped("bench", f"0 {LENGTH // 512} zfile {disk} {stored}") as device:
                    row(SUITE, f"dm-zfile {name.replace('-', ' ')}", **reads(device.node), stored=[stored])
    except (CommandFailed, OSError) as error:
        skipped(SUITE, "null_blk", error)
