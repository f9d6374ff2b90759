#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Parts of a large read go to another CPU where that one is free, and nowhere else: the trace of the workqueues says
on which CPUs the target's workers ran. What a CPU was offered and cannot begin is taken back."""

import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import zfile_writer
from block_devices import read_direct
from test_script import Tap, load, run

BYTES = 4 << 20
LARGE, PIECE = 1 << 20, 128 << 10
TRACING = pathlib.Path("/sys/kernel/tracing")
EVENT = TRACING / "events/workqueue/workqueue_execute_start"
TRIGGER = "hist:keys=common_cpu,function.sym"
RAN = re.compile(r"common_cpu: +(\d+), function: .*dm_zfile.*hitcount: +(\d+)")
# More urgent than the target's workers, whatever their priority.
SPIN = ["taskset", "--cpu-list", "1", "chrt", "--fifo", "50", "sh", "-c", "echo; while :; do :; done"]
SECOND_CPU = pathlib.Path("/sys/devices/system/cpu/cpu1/online")


def workers(tap, node, content, length):
    """Reads all in pieces of `length` bytes on CPU 0; returns how often workers ran, by CPU."""
    (EVENT / "trigger").write_text(TRIGGER)
    os.sched_setaffinity(0, {0})
    read = b"".join(read_direct(node, at, length) for at in range(0, BYTES, length))
    os.sched_setaffinity(0, set(range(os.cpu_count())))
    ran = {int(cpu): int(count) for cpu, count in RAN.findall((EVENT / "hist").read_text())}
    (EVENT / "trigger").write_text("!" + TRIGGER)
    tap.result(read == content, f"reads of {length} bytes are right")
    return ran


if os.cpu_count() < 2 or not SECOND_CPU.exists():
    print("1..0 # SKIP there is one CPU")
    sys.exit(0)
if "tracefs" not in pathlib.Path("/proc/filesystems").read_text():
    print("1..0 # SKIP this kernel traces nothing")
    sys.exit(0)
tap = Tap()
load("dm-zfile")
run("modprobe", "brd", "rd_nr=1", f"rd_size={2 * BYTES >> 10}")
if not EVENT.exists():
    run("mount", "-t", "tracefs", "tracefs", TRACING)
content = zfile_writer.content(BYTES, 4096, seed=5)
blob = zfile_writer.build(content)
with open("/dev/ram0", "r+b") as disk:
    disk.write(blob)
with dm_ioctl.Mapped("cpus", f"0 {BYTES // 512} zfile /dev/ram0 {len(blob)} 2 cache_blocks 0") as device:
    ran = workers(tap, device.node, content, LARGE)
    tap.result(set(ran) == {1} and BYTES // PIECE // 4 < ran[1] < BYTES // PIECE,
               "large reads: the other CPU works on some of the pieces", ran)
    tap.equal(workers(tap, device.node, content, PIECE), {}, "reads of a piece stay where they are")
    with subprocess.Popen(SPIN, stdout=subprocess.PIPE) as spinning:
        spinning.stdout.readline()
        try:
            ran = workers(tap, device.node, content, LARGE)
        finally:
            spinning.kill()
    # The scheduler leaves some time even to those who are less urgent.
    tap.result(ran.get(1, 0) < BYTES // PIECE // 4, "nor is another CPU waited for that has more urgent work", ran)
    SECOND_CPU.write_text("0")
    try:
        tap.equal(workers(tap, device.node, content, LARGE), {}, "so do large reads where there is no other CPU")
    finally:
        SECOND_CPU.write_text("1")
run("rmmod", "brd")
tap.finish()
