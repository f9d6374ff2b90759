# SPDX-License-Identifier: GPL-2.0
"""Stacks of layers, made for each competitor from the same content on RAM disks.

The content is cut into segments of 64 KiB, the smallest unit of dm-thin and the usual one of qcow2, and layer number
n of N holds every Nth segment from the nth on. So every stack reads as the same bytes, and all layers are needed.
"""

import contextlib
import os
import pathlib
import struct
import subprocess
import tempfile
import time

from measure import DATA, ram_disk
import dm_ioctl
import lsmt_writer
from block_devices import Devices
from test_script import load, run

SEGMENT = 64 << 10
SECTORS = SEGMENT // 512
# LVM's own choice for the number of sectors below which a pool calls for more: none here.
NO_LOW_WATER_MARK = 0


def content():
    return (DATA / "data").read_bytes()


def share(data, number, count):
    """The segments that layer `number` of `count` holds: pairs of the segment's number and its bytes."""
    return [(at // SEGMENT, data[at:at + SEGMENT]) for at in range(number * SEGMENT, len(data), count * SEGMENT)]


@contextlib.contextmanager
def linear(data, _count):
    """No layers at all: what any of them can reach at best."""
    write_all(ram_disk(0), [(0, data)])
    yield lambda: mapped(f"0 {len(data) // 512} linear {ram_disk(0)} 0")


@contextlib.contextmanager
def overlaybd(data, count):
    """dm-overlaybd over one RAM disk for each layer."""
    load("dm-overlaybd")
    table = f"0 {len(data) // 512} overlaybd {count}"
    for number in range(count):
        # An LSMT segment holds 16,383 sectors at most, so neighbours stay apart.
        segments = [(at * SECTORS, SECTORS, bytes_) for at, bytes_ in share(data, number, count)]
        blob = lsmt_writer.layer(segments, len(data) // 512)
        write_all(ram_disk(number), [(0, blob)])
        table += f" {ram_disk(number)} {len(blob)}"
    yield lambda: mapped(table)


@contextlib.contextmanager
def mapped(table, readonly=True):
    with dm_ioctl.Mapped("bench", table, readonly) as device:
        yield device.node


def cow_store(segments):
    """A persistent exception store of dm-snapshot: a header, one area of exceptions, and their chunks."""
    header = struct.pack("<IIII", 0x70416E53, 1, 1, SECTORS)
    area = b"".join(struct.pack("<QQ", segment, 2 + place) for place, (segment, _) in enumerate(segments))
    return b"".join([header.ljust(SEGMENT, b"\0"), area.ljust(SEGMENT, b"\0"), *(data for _, data in segments),
                     bytes(SEGMENT)])


@contextlib.contextmanager
def snapshot(data, count):
    """Snapshots of snapshots: each has the one below as its origin."""
    run("modprobe", "dm-snapshot")
    for number in range(1, count + 1):
        write_all(ram_disk(number), [(0, cow_store(share(data, number - 1, count)))])

    @contextlib.contextmanager
    def activate():
        with contextlib.ExitStack() as stack:
            below = ram_disk(0)
            for number in range(1, count + 1):
                table = f"0 {len(data) // 512} snapshot {below} {ram_disk(number)} P {SECTORS}"
                below = stack.enter_context(dm_ioctl.Mapped(f"bench-{number}", table, readonly=False)).node
            yield below

    yield activate


@contextlib.contextmanager
def thin(data, count):
    """A thin volume that is a snapshot of a snapshot and so on, each with its share of writes."""
    run("modprobe", "dm-thin-pool")
    write_all(ram_disk(0), [(0, bytes(1 << 20))])
    size = len(data) // 512
    pool_table = f"0 {size + 64 * SECTORS} thin-pool {ram_disk(0)} {ram_disk(1)} {SECTORS} {NO_LOW_WATER_MARK}"
    with dm_ioctl.Mapped("bench-pool", pool_table, readonly=False) as pool:
        pool.message("create_thin 0")
        for number in range(count):
            if number:
                pool.message(f"create_snap {number} {number - 1}")
            with mapped(f"0 {size} thin {pool.node} {number}", readonly=False) as volume:
                write_all(volume, [(at * SEGMENT, bytes_) for at, bytes_ in share(data, number, count)])
    # Activation is that of the pool and of the topmost volume.

    @contextlib.contextmanager
    def activate():
        with (dm_ioctl.Mapped("bench-pool", pool_table, readonly=False) as pool,
              mapped(f"0 {size} thin {pool.node} {count - 1}", readonly=False) as volume):
            yield volume

    yield activate


@contextlib.contextmanager
def chain(count):
    """A chain of qcow2 files on ext4 on the RAM disk; gives the topmost."""
    directory = pathlib.Path("/tmp/bench-mount")
    with Devices() as devices:
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0", "-O", "^has_journal", ram_disk(0), "256m")
        directory.mkdir(exist_ok=True)
        run("mount", ram_disk(0), directory)
        devices.undo(run, "umount", directory)
        for number in range(count):
            run("cp", DATA / f"qcow2-{count}" / f"{number}.qcow2", directory)
        run("sync")
        yield directory / f"{count - 1}.qcow2"


@contextlib.contextmanager
def server(*command):
    """A process that serves a device for as long as it lives, and a function that says why it has ended."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=said)

        def why():
            said.seek(0)
            return f"{command[0]} ended: {said.read().strip() or process.returncode}"

        try:
            yield process, why
        finally:
            process.terminate()
            process.wait()


def wait(server, ready):
    """Waits until `ready` returns something, and returns that."""
    process, why = server
    while not (result := ready()):
        if process.poll() is not None:
            raise OSError(why())
        time.sleep(0.001)
    return result


@contextlib.contextmanager
def nbd(_data, count):
    """The chain behind qemu-nbd."""
    run("modprobe", "nbd", "nbds_max=1")
    size = pathlib.Path("/sys/block/nbd0/size")
    with chain(count) as top:

        @contextlib.contextmanager
        def activate():
            # Without --verbose it would continue in a process of its own.
            with server("qemu-nbd", "--verbose", "--read-only", "--connect=/dev/nbd0", "--cache=none", "--aio=native",
                        "--format=qcow2", "--persistent", top) as serving:
                wait(serving, lambda: size.read_text().strip() != "0")
                yield "/dev/nbd0"
                run("qemu-nbd", "--disconnect", "/dev/nbd0")

        yield activate


@contextlib.contextmanager
def vduse(_data, count):
    """The chain behind qemu-storage-daemon, whose device needs no socket."""
    for name in ("vduse", "virtio-vdpa", "virtio-blk"):
        run("modprobe", name)
    control, bus = pathlib.Path("/dev/vduse/bench"), pathlib.Path("/sys/bus/vdpa/devices/bench")
    with chain(count) as top:
        file = f"file.driver=file,file.filename={top},file.aio=native,file.cache.direct=on,cache.direct=on"

        @contextlib.contextmanager
        def activate():
            with server("qemu-storage-daemon", "--blockdev", f"driver=qcow2,node-name=top,read-only=on,{file}",
                        "--export", "type=vduse-blk,id=bench,name=bench,node-name=top") as serving:
                wait(serving, control.exists)
                run("vdpa", "dev", "add", "name", "bench", "mgmtdev", "vduse")
                try:
                    disk = wait(serving, lambda: next(bus.glob("virtio*/block/*"), None))
                    yield f"/dev/{disk.name}"
                finally:
                    run("vdpa", "dev", "del", "bench")

        yield activate


def write_all(device, pieces):
    """Writes pairs of offset and bytes through the page cache, to the end of a sector."""
    with open(device, "r+b", buffering=0) as file:
        for offset, data in pieces:
            file.seek(offset)
            view = memoryview(data + bytes(-len(data) % 512))
            while view:
                view = view[file.write(view):]
        os.fsync(file.fileno())


COMPETITORS = {"dm-linear": (linear, [None]), "dm-overlaybd": (overlaybd, [1, 10, 64, 250]),
               "dm-snapshot": (snapshot, [1, 8, 32]), "dm-thin": (thin, [1, 8, 64]),
               "qcow2, qemu-nbd": (nbd, [1, 8, 64]), "qcow2, vduse": (vduse, [1, 8, 64])}
