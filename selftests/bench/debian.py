# SPDX-License-Identifier: GPL-2.0
"""Work rather than reads: a small Debian root is mounted, read whole by tar, and a program in it started.

Everything starts from a cold cache; the programs that do the work are loaded before. `size`, in bytes, is what the
images take.
"""

import contextlib
import os
import pathlib
import subprocess
import time

from measure import DATA, drop_caches, ram_disk, row, skipped, write_image
import dm_ioctl
import zfile_writer
from block_devices import Devices
from test_script import CommandFailed, load

SUITE = "debian"
MOUNT = "/tmp/bench-mount"
PROGRAMS = {"start bash": ["/bin/bash", "-c", ":"], "start apt": ["/usr/bin/apt-get", "--version"]}


def sectors(name):
    return os.path.getsize(DATA / name) // 512


@contextlib.contextmanager
def plain(name):
    """An image itself on the RAM disk."""
    yield ram_disk(0), write_image(ram_disk(0), DATA / name)


@contextlib.contextmanager
def zfile(name):
    """The file system's image as a ZFile."""
    length = write_image(ram_disk(0), DATA / name)
    with dm_ioctl.Mapped("bench", f"0 {sectors('root.ext4')} zfile {ram_disk(0)} {length}") as device:
        yield device.node, length


@contextlib.contextmanager
def stack(kind):
    """The image as a stack of layers, which may be ZFiles."""
    paths = sorted(DATA.glob(f"root-*.{kind}"), key=lambda path: int(path.stem.split("-")[1]))
    with contextlib.ExitStack() as devices:
        table, total = f"0 {sectors('root.ext4')} overlaybd {len(paths)}", 0
        for number, path in enumerate(paths):
            disk = ram_disk(number)
            length = write_image(disk, path)
            total += length
            if kind == "zfile":
                inner = zfile_writer.original_bytes(path.read_bytes())
                mapped = dm_ioctl.Mapped(f"bench-{number}", f"0 {-(-inner // 512)} zfile {disk} {length}")
                disk, length = devices.enter_context(mapped).node, inner
            table += f" {disk} {length}"
        yield devices.enter_context(dm_ioctl.Mapped("bench", table)).node, total


FORMS = {
    "ext4 on the RAM disk": (plain, "root.ext4"),
    "ext4 on dm-zfile lz4 4k": (zfile, "root.zfile"),
    "ext4 on dm-overlaybd, 10 layers": (stack, "lsmt"),
    "ext4 on dm-overlaybd, 10 layers on dm-zfile": (stack, "zfile"),
    "squashfs lz4 128k": (plain, "root.squashfs"),
    "EROFS lz4 64k": (plain, "root.erofs"),
}


def timed(*command, **options):
    """Nanoseconds that a command takes."""
    start = time.perf_counter_ns()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter_ns() - start


def warm():
    """Drops all caches and loads the programs again that measure."""
    drop_caches()
    pathlib.Path("/tmp/bench-empty").mkdir(exist_ok=True)
    subprocess.run(["sh", "-c", "tar -C /tmp/bench-empty -cf - . | cat > /dev/null; mount --version; true"],
                   check=True, stdout=subprocess.DEVNULL)


def work(device):
    """All figures of one device, once."""
    figures = {}
    with Devices() as devices:
        warm()
        start = time.perf_counter_ns()
        devices.mount(device, MOUNT)
        figures["mount"] = time.perf_counter_ns() - start
        for what, command in PROGRAMS.items():
            warm()
            figures[what] = timed(*command, preexec_fn=lambda: os.chroot(MOUNT))
        warm()
        # tar does not read what it writes to /dev/null itself.
        figures["tar"] = timed("sh", "-c", f"tar -C {MOUNT} -cf - . | cat > /dev/null")
    return figures


def main(chosen):
    load("dm-zfile", "dm-overlaybd")
    for name in filter(chosen, FORMS):
        form, argument = FORMS[name]
        try:
            with form(argument) as (device, length):
                passes = [work(device) for _ in range(2)]
        except (CommandFailed, OSError, subprocess.CalledProcessError) as error:
            skipped(SUITE, name, error)
            continue
        figures = {what: [one[what] for one in passes] for what in passes[0]}
        row(SUITE, name, size=[length], **figures)
