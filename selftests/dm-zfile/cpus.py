#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Pieces of a large read go to another CPU where that one is free, and none waits for a CPU that has more urgent work:
the trace of the workqueues says on which CPUs the target's workers ran."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import threading

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import zfile_writer
from block_devices import read_direct
from test_script import CommandFailed, Tap, load, run

BYTES = 4 << 20
LARGE, PIECE = 1 << 20, 128 << 10
PIECES = BYTES // PIECE
TRACING = pathlib.Path("/sys/kernel/tracing")
EVENT = TRACING / "events/workqueue/workqueue_execute_start"
TRIGGER = "hist:keys=common_cpu,function.sym"
RAN = re.compile(r"common_cpu: +(\d+), function: .*dm_zfile.*hitcount: +(\d+)")
# More urgent than the target's workers, whatever their priority.
SPIN = ["taskset", "--cpu-list", "1", "chrt", "--fifo", "50", "sh", "-c", "echo; while :; do :; done"]
SECOND_CPU = pathlib.Path("/sys/devices/system/cpu/cpu1/online")
NULL_BLK = pathlib.Path("/sys/kernel/config/nullb/nullb-cpus")


def workers(tap, node, content, length, what="reads"):
    """Reads all in pieces of `length` bytes on CPU 0; returns how often workers ran, by CPU."""
    (EVENT / "trigger").write_text(TRIGGER)
    os.sched_setaffinity(0, {0})
    read = b"".join(read_direct(node, at, length) for at in range(0, BYTES, length))
    os.sched_setaffinity(0, set(range(os.cpu_count())))
    ran = {int(cpu): int(count) for cpu, count in RAN.findall((EVENT / "hist").read_text())}
    (EVENT / "trigger").write_text("!" + TRIGGER)
    tap.result(read == content, f"{what} of {length} bytes are right")
    return ran


@contextlib.contextmanager
def urgent_program():
    """Keeps the second CPU busy with a program that no worker can push aside."""
    with subprocess.Popen(SPIN, stdout=subprocess.PIPE) as spinning:
        spinning.stdout.readline()
        try:
            yield
        finally:
            spinning.kill()


@contextlib.contextmanager
def second_cpu_off():
    SECOND_CPU.write_text("0")
    try:
        yield
    finally:
        SECOND_CPU.write_text("1")


@contextlib.contextmanager
def device_with_interrupts():
    """A null_blk with memory, which completes a request by a timer, in an interrupt; yields its node."""
    NULL_BLK.mkdir()
    try:
        for name, value in {"size": 2 * BYTES >> 20, "memory_backed": 1, "irqmode": 2, "completion_nsec": 50000,
                            "power": 1}.items():
            (NULL_BLK / name).write_text(f"{value}\n")
        yield f"/dev/{NULL_BLK.name}"
    finally:
        NULL_BLK.rmdir()


def mapped_on(disk, blob, length=BYTES, cached=0):
    """A dm-zfile of `length` bytes over what is written to `disk`."""
    with open(disk, "r+b") as file:
        file.write(blob + bytes(-len(blob) % 512))
    return dm_ioctl.Mapped("cpus", f"0 {length // 512} zfile {disk} {len(blob)} 2 cache_blocks {cached}")


def missed_together(tap, content):
    """Two threads read the same parts of the same blocks at the same time: each block is decompressed once."""
    blocks = len(content) >> 16
    run("modprobe", "brd", "rd_nr=1", f"rd_size={2 * BYTES >> 10}")
    with mapped_on("/dev/ram0", zfile_writer.build(content, block=65536), len(content), blocks) as device:
        wrong = []

        def read():
            wrong.extend(at for at in range(0, len(content), 4096)
                         if read_direct(device.node, at, 4096) != content[at:at + 4096])

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tap.equal(wrong, [], "parts of blocks, read by two threads")
        tap.equal(int(device.status().split()[7]), blocks, "each block is decompressed once for both")
    run("rmmod", "brd")


def submitted_and_done(tap, content, blob):
    """A RAM disk has read when it was asked to: the task that reads does the work, and shares it."""
    run("modprobe", "brd", "rd_nr=1", f"rd_size={2 * BYTES >> 10}")
    with mapped_on("/dev/ram0", blob) as device:
        ran = workers(tap, device.node, content, LARGE)
        # How many depends on how much of a second processor the host gives the guest.
        tap.result(0 < ran.get(1, 0) < PIECES, "large reads: the other CPU works on some of the pieces", ran)
        tap.equal(workers(tap, device.node, content, PIECE), {}, "reads of a piece stay where they are")
        with urgent_program():
            ran = workers(tap, device.node, content, LARGE)
        tap.result(ran.get(1, 0) < PIECES // 4, "nor is another CPU waited for that has more urgent work", ran)
        with second_cpu_off():
            tap.equal(workers(tap, device.node, content, LARGE), {}, "so do large reads where there is no other CPU")
    run("rmmod", "brd")


def done_in_an_interrupt(tap, content, blob):
    """Workers do all the work; none of it may wait for a CPU that has no time."""
    with device_with_interrupts() as disk, mapped_on(disk, blob) as device:
        ran = workers(tap, device.node, content, LARGE, "with interrupts, reads")
        tap.equal(sum(ran.values()), PIECES, "with interrupts: workers finish all pieces")
        with urgent_program():
            ran = workers(tap, device.node, content, LARGE, "with interrupts and an urgent program, reads")
        tap.result(ran.get(1, 0) < PIECES // 4, "with interrupts: no CPU is waited for that has more urgent work", ran)


if os.cpu_count() < 2 or not SECOND_CPU.exists():
    print("1..0 # SKIP there is one CPU")
    sys.exit(0)
if "tracefs" not in pathlib.Path("/proc/filesystems").read_text():
    print("1..0 # SKIP this kernel traces nothing")
    sys.exit(0)
tap = Tap()
load("dm-zfile")
if not EVENT.exists():
    run("mount", "-t", "tracefs", "tracefs", TRACING)
content = zfile_writer.content(BYTES, 4096, seed=5)
blob = zfile_writer.build(content)
missed_together(tap, content[:1 << 20])
submitted_and_done(tap, content, blob)
try:
    run("modprobe", "null_blk", "nr_devices=0")
except CommandFailed as error:
    tap.skip("reads that complete in an interrupt", error)
else:
    done_in_an_interrupt(tap, content, blob)
tap.finish()
