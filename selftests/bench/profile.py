# SPDX-License-Identifier: GPL-2.0
"""Where the instructions of a workload go, function by function (`make profile W=<workload>`).

The clock counts instructions, so perf's clock event samples every so many of them. Code that runs with interrupts
disabled is sampled where they are enabled again.
"""

import os
import pathlib
import re
import time

from measure import DATA, READS, per_mebibyte, per_read, ram_disk, report, write_image
import dm_ioctl
import segments
from test_script import load, run

PERIOD = 100003
SAMPLES = 8000
RANDOM = ["--direct", "--order=random", "--size=4096"]
SEQUENTIAL = ["--direct", "--order=sequential", "--size=1048576"]
SECTORS = (64 << 20) // 512
ACTIVATION = "overlaybd-activation"


def linear(disk):
    write_image(disk, DATA / "data")
    return f"0 {SECTORS} linear {disk} 0"


def zfile(name):
    def table(disk):
        return f"0 {SECTORS} zfile {disk} {write_image(disk, DATA / name)}"
    return table


WORKLOADS = {f"{target}-{order}": (table, arguments)
             for target, table in (("linear", linear),
                                   *((name.removesuffix(".zfile"), zfile(name))
                                     for name in ("lz4-4k.zfile", "lz4-64k.zfile", "zstd-4k.zfile", "zstd-64k.zfile")))
             for order, arguments in (("random", RANDOM), ("sequential", SEQUENTIAL))}


def functions_of(*command):
    """Where the instructions of a command go: per cent, function and module."""
    data = pathlib.Path("/tmp/perf.data")
    run("perf", "record", "--quiet", "--event=cpu-clock", f"--count={PERIOD}", f"--output={data}", "--", *command)
    text = run("perf", "report", f"--input={data}", "--stdio", "--stdio-color=never", "--no-children",
               "--sort=symbol,dso", "--percent-limit=0.3", stdin=open(os.devnull))
    functions = []
    for line in run("c++filt", "--format=rust", input=text).splitlines():
        if match := re.match(r"\s*([0-9.]+)%\s+\[([k.])\]\s+(.+?)\s\s+(\S+)\s*$", line):
            # Without the hashes of Rust's crates.
            functions.append([float(match[1]), re.sub(r"\[[0-9a-f]{12,16}\]", "", match[3]), match[4]])
    return functions


def profile_reads(name):
    table, arguments = WORKLOADS[name]
    with dm_ioctl.Mapped("bench", table(ram_disk(0))) as device:
        figure, unit = (per_read, "read") if arguments is RANDOM else (per_mebibyte, "MiB")
        alone = figure(device.node, *arguments, "--count=64", count=1)[0]
        reads = max(64, int(SAMPLES * PERIOD / alone))
        alone = figure(device.node, *arguments, f"--count={reads}", count=1)[0]
        functions = functions_of(READS, *arguments, f"--count={reads}", "--passes=1", device.node)
    report(profile=name, unit=unit, instructions=round(alone), functions=functions)


def profile_activation():
    """250 layers with a million segments, as a table is loaded."""
    table = segments.spread_table()
    command = ["dmsetup", "create", "--readonly", "--noudevsync", "bench", "--table", table]
    start = time.perf_counter_ns()
    with dm_ioctl.Mapped("bench", table):
        alone = time.perf_counter_ns() - start
    functions = functions_of(*command)
    run("dmsetup", "remove", "--noudevsync", "bench")
    report(profile=ACTIVATION, unit="activation", instructions=alone, functions=functions)


def main(chosen):
    load("dm-zfile", "dm-overlaybd")
    pathlib.Path("/proc/sys/kernel/perf_event_max_sample_rate").write_text("200000")
    # No throttling; the rate cannot be changed any more afterwards.
    pathlib.Path("/proc/sys/kernel/perf_cpu_time_max_percent").write_text("0")
    pathlib.Path("/proc/sys/kernel/kptr_restrict").write_text("0")
    for name in filter(chosen, WORKLOADS):
        profile_reads(name)
    if chosen(ACTIVATION):
        profile_activation()
