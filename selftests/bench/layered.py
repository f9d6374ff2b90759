# SPDX-License-Identifier: GPL-2.0
"""Stacks of layers, made for each competitor from the same content on RAM disks.

The content is cut into segments of 64 KiB, the smallest unit of dm-thin and the usual one of qcow2, and layer number
n of N holds every Nth segment from the nth on. So every stack reads as the same bytes, and all layers are needed.
"""

import contextlib
import pathlib
import signal
import struct
import subprocess
import time

from measure import DATA, ram_disk
import dm
import layers
from devices import Devices, load, run

SEGMENT = 64 << 10
SECTORS = SEGMENT // 512
# LVM's own choice for the number of sectors below which a pool calls for more: none here.
NO_LOW_WATER_MARK = 0


def content():
    return (DATA / "data").read_bytes()


def share(data, number, count):
    """The segments that layer `number` of `count` holds: pairs of the segment's number and its bytes."""
    return [(at // SEGMENT, data[at:at + SEGMENT]) for at in range(number * SEGMENT, len(data), count * SEGMENT)]


class Timed:
    """How long it took to bring a stack up, and how much memory the kernel then had less."""

    def __init__(self):
        self.nanoseconds = self.bytes = 0

    @contextlib.contextmanager
    def measure(self):
        before = free_bytes()
        start = time.perf_counter_ns()
        yield
        self.nanoseconds = time.perf_counter_ns() - start
        self.bytes = before - free_bytes()


def free_bytes():
    """What the kernel could still give away; page cache counts, as it can be dropped."""
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemFree"].split()[0]) << 10


@contextlib.contextmanager
def linear(data, _count, timed):
    """No layers at all: what any of them can reach at best."""
    write_all(ram_disk(0), [(0, data)])
    with timed.measure():
        device = dm.Mapped("bench", f"0 {len(data) // 512} linear {ram_disk(0)} 0")
    with device:
        yield device.node


@contextlib.contextmanager
def overlaybd(data, count, timed):
    """dm-overlaybd over one RAM disk for each layer."""
    load("dm-overlaybd")
    table = f"0 {len(data) // 512} overlaybd {count}"
    for number in range(count):
        # An LSMT segment holds 16,383 sectors at most, so neighbours stay apart.
        segments = [(at * SECTORS, SECTORS, bytes_) for at, bytes_ in share(data, number, count)]
        blob = layers.layer(segments, len(data) // 512)
        write_all(ram_disk(number), [(0, blob)])
        table += f" {ram_disk(number)} {len(blob)}"
    with timed.measure():
        device = dm.Mapped("bench", table)
    with device:
        yield device.node


def cow_store(segments):
    """A persistent exception store of dm-snapshot: a header, one area of exceptions, and their chunks."""
    header = struct.pack("<IIII", 0x70416E53, 1, 1, SECTORS)
    area = b"".join(struct.pack("<QQ", segment, 2 + place) for place, (segment, _) in enumerate(segments))
    return b"".join([header.ljust(SEGMENT, b"\0"), area.ljust(SEGMENT, b"\0"), *(data for _, data in segments),
                     bytes(SEGMENT)])


@contextlib.contextmanager
def snapshot(data, count, timed):
    """Snapshots of snapshots: each has the one below as its origin."""
    run("modprobe", "dm-snapshot")
    for number in range(1, count + 1):
        write_all(ram_disk(number), [(0, cow_store(share(data, number - 1, count)))])
    with contextlib.ExitStack() as stack:
        below = ram_disk(0)
        with timed.measure():
            for number in range(1, count + 1):
                table = f"0 {len(data) // 512} snapshot {below} {ram_disk(number)} P {SECTORS}"
                below = stack.enter_context(dm.Mapped(f"bench-{number}", table, readonly=False)).node
        yield below


@contextlib.contextmanager
def thin(data, count, timed):
    """A thin volume that is a snapshot of a snapshot of …, each with its share of writes."""
    run("modprobe", "dm-thin-pool")
    write_all(ram_disk(0), [(0, bytes(1 << 20))])
    size = len(data) // 512
    with contextlib.ExitStack() as stack:
        pool_table = f"0 {size + 64 * SECTORS} thin-pool {ram_disk(0)} {ram_disk(1)} {SECTORS} {NO_LOW_WATER_MARK}"
        pool = stack.enter_context(dm.Mapped("bench-pool", pool_table, readonly=False))
        pool.message("create_thin 0")
        for number in range(count):
            if number:
                pool.message(f"create_snap {number} {number - 1}")
            with dm.Mapped("bench-thin", f"0 {size} thin {pool.node} {number}", readonly=False) as volume:
                write_all(volume.node, [(at * SEGMENT, bytes_) for at, bytes_ in share(data, number, count)])
        with timed.measure():
            device = dm.Mapped("bench-thin", f"0 {size} thin {pool.node} {count - 1}", readonly=False)
        with device:
            yield device.node


@contextlib.contextmanager
def qcow2(data, count, timed):
    """A chain of qcow2 files on ext4 on the RAM disk, served by qemu-nbd."""
    run("modprobe", "nbd", "nbds_max=1")
    with Devices() as devices:
        run("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0", "-O", "^has_journal", ram_disk(0))
        pathlib.Path("/tmp/bench-mount").mkdir(exist_ok=True)
        run("mount", ram_disk(0), "/tmp/bench-mount")
        devices.undo(run, "umount", "/tmp/bench-mount")
        for number in range(count):
            run("cp", DATA / f"qcow2-{count}" / f"{number}.qcow2", "/tmp/bench-mount/")
        run("sync")
        with timed.measure():
            server = subprocess.Popen(["qemu-nbd", "--read-only", "--connect=/dev/nbd0", "--cache=none", "--aio=native",
                                       "--format=qcow2", f"/tmp/bench-mount/{count - 1}.qcow2"],
                                      stdout=subprocess.DEVNULL)
            # The size appears when the connection stands.
            while pathlib.Path("/sys/block/nbd0/size").read_text().strip() == "0":
                if server.poll() is not None:
                    raise OSError(f"qemu-nbd ended with status {server.returncode}")
                time.sleep(0.01)
        try:
            yield "/dev/nbd0"
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def write_all(device, pieces):
    """Writes pairs of offset and bytes through the page cache, to the end of a sector."""
    with open(device, "r+b", buffering=0) as file:
        for offset, data in pieces:
            file.seek(offset)
            view = memoryview(data + bytes(-len(data) % 512))
            while view:
                view = view[file.write(view):]
        file.flush()
        subprocess.run(["blockdev", "--flushbufs", device], check=True)


COMPETITORS = {"dm-linear": (linear, [None]), "dm-overlaybd": (overlaybd, [1, 10, 64, 250]),
               "dm-snapshot": (snapshot, [1, 8, 32]), "dm-thin": (thin, [1, 8, 64]),
               "qcow2 (qemu-nbd)": (qcow2, [1, 8, 64])}
