# SPDX-License-Identifier: GPL-2.0
"""What reads, activation and memory cost as layers grow, for everything that can stack them.

The figures of a row: `random`, 4 KiB direct reads; `sequential`, 1 MiB direct reads, for each MiB; `odd`, 4 KiB
direct reads that start at an odd sector; `jobs`, 4 KiB random reads by two threads; `first`, the first read after
activation; `activation` and, in bytes, `memory`.
"""

import pathlib
import time

import layered
from measure import drop_caches, per_read, random_reads, require_content, row, sequential_reads, skipped
from test_script import CommandFailed

SUITE = "stacks"
# Lists of free pages and caches of the kernel grow and shrink by some MiB meanwhile: less than this is not shown.
MEMORY_RESOLUTION = 4 << 20
# Activations that count, after one to warm up.
ACTIVATIONS = 3
# A device with larger blocks, or a server that is gone, must not end the whole run.
TROUBLE = (CommandFailed, OSError)


def free_bytes():
    """The memory that is free when the page cache is not counted.

    What was freed comes back after a while, and the kernel's count of it is exact about once a second. In a guest
    whose clock jumps where nothing is to be done, waiting for that takes no time.
    """
    drop_caches()
    time.sleep(2.5)
    lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemFree"].split()[0]) << 10


def optional(function, *arguments, **options):
    """A figure, or None where the device cannot serve such reads."""
    try:
        return function(*arguments, **options)
    except CommandFailed:
        return None


def reads(device):
    """The figures that one activation is enough for."""
    return {
        "random": random_reads(device, "--direct"),
        "sequential": sequential_reads(device, "--direct"),
        "odd": optional(random_reads, device, "--direct", "--offset=512"),
        "jobs": random_reads(device, "--direct", "--jobs=2"),
    }


def measure(data, name, competitor, count):
    """The row of one competitor with so many layers."""
    figures = {"first": [], "activation": [], "memory": []}
    with competitor(data, count) as activate:
        for number in range(1 + ACTIVATIONS):
            free, start = free_bytes(), time.perf_counter_ns()
            with activate() as device:
                activation = time.perf_counter_ns() - start
                first = per_read(device, "--direct", "--count=1", count=1, warm=0)
                if number:
                    figures["first"] += first
                    figures["activation"].append(activation)
                    figures["memory"].append(free - free_bytes())
                if number == ACTIVATIONS:
                    require_content(device)
                    figures |= reads(device)
    if min(figures["memory"]) < MEMORY_RESOLUTION:
        figures["memory"] = None
    row(SUITE, name, layers=count, **figures)


def main(chosen):
    data = layered.content()
    for name in filter(chosen, layered.COMPETITORS):
        competitor, counts = layered.COMPETITORS[name]
        for count in counts:
            try:
                measure(data, name, competitor, count)
            except TROUBLE as error:
                skipped(SUITE, name, error, layers=count)
