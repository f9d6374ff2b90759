#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What a device costs: its memory, whatever the algorithm, without a thread of its own; and the reads below it are
those of the cgroup that reads."""

import os
import pathlib
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import zfile_writer
from block_devices import Devices, read_direct
from test_script import SCRATCH, Tap, load

COUNT = 32
# Bytes that a device over a small file may take beside what any mapped device takes.
LIMIT = 48 << 10
BYTES = 256 << 10
GROUP = pathlib.Path("/sys/fs/cgroup/ovbd-costs")


def kernel_bytes():
    """Memory that the kernel has allocated for itself, without what it can give back."""
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    values = dict(line.split(":") for line in open("/proc/meminfo"))
    return sum(int(values[name].split()[0]) << 10 for name in ("Slab", "VmallocUsed", "Percpu", "KernelStack"))


def threads():
    """The names of the kernel's threads that are the target's."""
    names = [path.read_text().strip() for path in pathlib.Path("/proc").glob("[0-9]*/comm")]
    return sorted(name for name in names if "zfile" in name)


def cost(table):
    """Bytes that each of many devices with this table takes, and the threads that come with the last of them."""
    with Devices() as first:
        # What the module has for all devices is there before, and what the kernel allocates once.
        first.mapped("first", table)
        before, few = kernel_bytes(), threads()
        with Devices() as devices:
            for number in range(COUNT):
                devices.mapped(f"cost{number}", table)
            return (kernel_bytes() - before) // COUNT, len(threads()) - len(few)


def memory(tap, devices):
    content = zfile_writer.content(BYTES, 4096, seed=3)
    loops = {}
    for algorithm in ("lz4", "zstd"):
        blob = zfile_writer.build(content, algorithm=algorithm)
        path = SCRATCH / algorithm
        path.write_bytes(blob + bytes(-len(blob) % 512))
        loops[algorithm] = devices.loop(path), len(blob)
    tables = {algorithm: f"0 {BYTES // 512} zfile {loop} {size}" for algorithm, (loop, size) in loops.items()}
    # The kernel keeps some of what is freed: what is measured comes after devices of the same kind.
    cost(tables["lz4"])
    plain, _ = cost(f"0 8 linear {loops['lz4'][0]} 0")
    print(f"# a dm-linear takes {plain >> 10} KiB", flush=True)
    for algorithm, table in tables.items():
        each, more = cost(table)
        print(f"# a dm-zfile with {algorithm} takes {each >> 10} KiB, {each - plain >> 10} KiB more", flush=True)
        tap.result(each - plain <= LIMIT, f"{algorithm}: a device takes at most {LIMIT >> 10} KiB of its own", each)
        tap.equal(more, 0, f"{algorithm}: a device has no thread of its own")
    return loops["lz4"], content


def accounting(tap, devices, loop, size, content):
    """The reads of the loop device are charged to who reads the dm-zfile."""
    try:
        pathlib.Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+io")
        GROUP.mkdir(exist_ok=True)
    except OSError as error:
        tap.skip("the reads below are charged to the reader", f"no controller of I/O: {error}")
        return
    mapped = devices.mapped("charged", f"0 {BYTES // 512} zfile {loop} {size}")
    child = os.fork()
    if child == 0:
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
        os._exit(0 if read_direct(mapped.node, 0, BYTES) == content else 1)
    tap.equal(os.waitpid(child, 0)[1], 0, "reads in a cgroup are right")
    number = os.stat(loop).st_rdev
    wanted = f"{os.major(number)}:{os.minor(number)} "
    lines = [line for line in (GROUP / "io.stat").read_text().splitlines() if line.startswith(wanted)]
    read = [int(word.split("=")[1]) for line in lines for word in line.split() if word.startswith("rbytes=")]
    tap.result(len(read) == 1 and read[0] >= size // 2, "the reads below are charged to the reader", lines)
    GROUP.rmdir()


if pathlib.Path("/sys/kernel/debug/kmemleak").exists():
    print("1..0 # SKIP all memory has a shadow in this kernel")
    sys.exit(0)
tap = Tap()
load("loop", "dm-zfile")
with Devices() as devices:
    (loop, size), content = memory(tap, devices)
    accounting(tap, devices, loop, size, content)
tap.finish()
