# SPDX-License-Identifier: GPL-2.0
"""What reads, activation and memory cost as layers grow, for everything that can stack them.

The figures of a row: `random`, 4 KiB direct reads; `sequential`, 1 MiB direct reads, for each MiB; `odd`, 4 KiB
direct reads that start at an odd sector; `jobs`, 4 KiB random reads by two threads; `first`, the first read after
activation; `activation` and, in bytes, `memory`.
"""

import layered
from measure import per_read, random_reads, row, sequential_reads, skipped
from devices import CommandFailed

SUITE = "stacks"
# A device with larger blocks, or a server that is gone, must not end the whole run.
TROUBLE = (CommandFailed, OSError)


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


def measure(data, name, bring_up, count):
    """The row of one competitor with so many layers, which are brought up twice."""
    figures = {"first": [], "activation": [], "memory": []}
    for again in (False, True):
        timed = layered.Timed()
        with bring_up(data, count, timed) as device:
            figures["activation"].append(timed.nanoseconds)
            figures["memory"].append(timed.bytes)
            figures["first"] += per_read(device, "--direct", "--count=1", count=1, warm=0)
            if again:
                figures |= reads(device)
    row(SUITE, name, layers=count, **figures)


def main(chosen):
    data = layered.content()
    for name in filter(chosen, layered.COMPETITORS):
        bring_up, counts = layered.COMPETITORS[name]
        for count in counts:
            try:
                measure(data, name, bring_up, count)
            except TROUBLE as error:
                skipped(SUITE, f"{name}, {count} layers", error)
