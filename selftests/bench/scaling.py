# SPDX-License-Identifier: GPL-2.0
"""How much faster dm-zfile reads with two CPUs than with one, by wall clock: the host boots this with each, in turns.

The figures are nanoseconds for each MiB with `one` CPU or `two`: for two programs that read at the same time, and for
one, parts of whose requests the target hands to another CPU. What disturbs a run makes it slower, so the best of some
counts; of the boots, the one in the middle. What the CPUs do for programs that decompress, and for reads that only
copy, is there to compare with; so is what a read costs its program where the device does nothing but fill the memory,
as that is not shared with another CPU.
"""

import os
import subprocess
import time

from measure import DATA, READS, per_mebibyte, ram_disk, row, write_image
import dm_ioctl
from test_script import OVBD, load

SUITE = "scaling"
MEBIBYTES = 64
CPUS = {1: "one", 2: "two"}
ROUNDS = 6
# Two programs read the device so often that how long they take to start does not matter.
PASSES = 4
IN_ORDER = ["--direct", "--order=sequential", f"--length={MEBIBYTES << 20}"]


def measure(name, time_one):
    """The row of what `time_one` measures."""
    row(SUITE, name, **{CPUS[os.cpu_count()]: [min(time_one() for _ in range(ROUNDS))]})


def two_programs(mebibytes, *command):
    """What two programs take that do the same, of so many MiB each."""
    start = time.monotonic_ns()
    programs = [subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for _ in range(2)]
    assert not any([program.wait() for program in programs])
    return (time.monotonic_ns() - start) / (2 * mebibytes)


def two_readers(device):
    count = PASSES * MEBIBYTES
    return two_programs(count, READS, *IN_ORDER, "--size=1048576", f"--count={count}", "--passes=1", device)


def one_reader(device, size):
    return per_mebibyte(device, *IN_ORDER, f"--size={size << 20}", count=1, warm=0)[0]


def main(chosen):
    write_image(ram_disk(1), DATA / "data")
    measure("raw, two programs, 1 MiB reads", lambda: two_readers(ram_disk(1)))
    with dm_ioctl.Mapped("bench", f"0 {MEBIBYTES << 11} zero") as device:
        measure("dm-zero, one program, 1 MiB reads", lambda: one_reader(device.node, 1))
    load("dm-zfile")
    for name in filter(chosen, ("lz4-4k", "zstd-64k")):
        path, what = DATA / f"{name}.zfile", name.replace("-", " ")
        measure(f"ovbd verify {what}, two programs",
                lambda: two_programs(MEBIBYTES, OVBD, "verify", "--threads=1", path))
        length = write_image(ram_disk(0), path)
        with dm_ioctl.Mapped("bench", f"0 {MEBIBYTES << 11} zfile {ram_disk(0)} {length}") as device:
            measure(f"dm-zfile {what}, two programs, 1 MiB reads", lambda: two_readers(device.node))
            for size in (1, 8):
                measure(f"dm-zfile {what}, one program, {size} MiB reads", lambda: one_reader(device.node, size))
