# SPDX-License-Identifier: GPL-2.0
"""What the parts of the benchmark share inside the guest: RAM disks, reads, and the figures on their way out.

A row has a name and figures; a figure is a list of equal measurements, in nanoseconds for one read or one MiB. In a
guest whose clock counts instructions that is instructions, and all measurements must be the same.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from test_script import SOURCE, run

READS = SOURCE / "tools/target/release/ovbd-reads"
DATA = SOURCE / "build/bench/data"
MEBIBYTE = 1 << 20
# A pass takes at most this long, in which the interrupts of the clock are many; the random reads in it are limited.
PASS_NANOSECONDS = 200e6
LEAST, MOST = 256, 16384
# To drop a page from the cache takes longer than to read it again.
MOST_COLD = 2048


def report(**fields):
    """Hands one line to the host."""
    print(json.dumps(fields), flush=True)


def row(suite, name, layers=None, **figures):
    """A row of the table; a figure that is None was not measured."""
    report(suite=suite, row=name, layers=layers, figures={what: values for what, values in figures.items() if values})


def skipped(suite, name, why, layers=None):
    """A row that this kernel or its userspace cannot have."""
    report(suite=suite, row=name, layers=layers, skipped=str(why))


def passes(file, *arguments, count=2, warm=1):
    """Passes of ovbd-reads over a file; those that come first, to warm up what is allocated once, do not count."""
    lines = run(READS, *arguments, f"--passes={warm + count}", file).splitlines()
    return [json.loads(line) for line in lines[warm:]]


def power_of_two(number):
    """The largest that is not above the number: what a trial says may vary a little, the reads to make must not."""
    return 1 << max(0, int(number).bit_length() - 1)


def per_read(file, *arguments, **options):
    """Nanoseconds for each read of each pass."""
    return [one["nanoseconds"] / one["reads"] for one in passes(file, *arguments, **options)]


def per_mebibyte(file, *arguments, **options):
    """Nanoseconds for each MiB of each pass."""
    return [one["nanoseconds"] * MEBIBYTE / one["bytes"] for one in passes(file, *arguments, **options)]


def random_reads(file, *arguments):
    """4 KiB reads at random; a short trial says how many are enough, and warms up."""
    words = ["--size=4096", "--order=random", *arguments]
    trial = per_read(file, *words, "--count=64", count=1)[0]
    most = MOST_COLD if "--cold" in arguments else MOST
    count = max(LEAST, min(most, power_of_two(PASS_NANOSECONDS / trial)))
    return per_read(file, *words, f"--count={count}", warm=0)


def sequential_reads(file, *arguments, size=MEBIBYTE):
    """1 MiB reads in order over all of the file, with O_DIRECT as often as it takes."""
    words = [f"--size={size}", "--order=sequential", *arguments]
    trial, = passes(file, *words, count=1)
    rounds = power_of_two(PASS_NANOSECONDS / trial["nanoseconds"]) if "--direct" in arguments else 1
    return per_mebibyte(file, *words, f"--count={rounds * trial['reads']}", warm=0)


def require_content(file):
    """Stops where a device or file does not read as the content that all have: its speed would mean nothing."""
    with open(DATA / "data", "rb") as wanted, open(file, "rb", buffering=0) as got:
        while data := wanted.read(MEBIBYTE):
            if got.read(MEBIBYTE) != data:
                raise OSError(f"{file} has other content in the MiB before byte {wanted.tell()}")


def drop_caches():
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def ram_disk(number):
    return f"/dev/ram{number}"


def write_image(device, path):
    """Copies an image to the start of a device, and returns its length."""
    with open(path, "rb") as source, open(device, "r+b", buffering=0) as target:
        while data := source.read(MEBIBYTE):
            # A device takes whole sectors.
            target.write(data + bytes(-len(data) % 4096))
        os.fsync(target.fileno())
    return os.path.getsize(path)
