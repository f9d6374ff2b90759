# SPDX-License-Identifier: GPL-2.0
"""How much faster dm-zfile reads with two CPUs than with one, by wall clock.

The figures are bytes for each second: `one` CPU and `two`, for two threads with 1 MiB reads, and for one thread with
8 MiB reads, whose parts the target hands to other CPUs. The runs alternate and the best of them counts, as whatever
disturbs a run makes it slower. What two CPUs of the guest do for programs that compute or decompress, and for reads
that only copy, is there to compare with.
"""

import hashlib
import pathlib
import subprocess
import threading
import time

from measure import DATA, MEBIBYTE, passes, ram_disk, row, skipped, write_image
import dm
from devices import OVBD, load

SUITE = "scaling"
SECTORS = (64 << 20) // 512
ROUNDS = 20
HASHED = 15
SECOND_CPU = pathlib.Path("/sys/devices/system/cpu/cpu1/online")
READERS = {"two threads, 1 MiB reads": ["--jobs=2", "--size=1048576"],
           "one thread, 8 MiB reads": ["--jobs=1", "--size=8388608"]}


def bytes_each_second(device, *arguments):
    one, = passes(device, "--direct", "--order=sequential", *arguments, count=1, warm=0)
    return one["bytes"] * 1e9 / one["nanoseconds"]


def hashed_each_second():
    """Two threads that compute SHA-256, for which Python does not make one wait for the other."""
    data = bytes(MEBIBYTE)

    def work():
        for _ in range(HASHED):
            hashlib.sha256(data)

    threads = [threading.Thread(target=work) for _ in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 2 * HASHED * MEBIBYTE / (time.monotonic() - start)


def verified_each_second(path):
    """Two programs that check and decompress all blocks of a file, which is in the page cache."""
    start = time.monotonic()
    programs = [subprocess.Popen([OVBD, "verify", "--threads=1", path], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert not any([program.wait() for program in programs])
    return 2 * SECTORS * 512 / (time.monotonic() - start)


def measure(name, rate):
    """The row of what `rate` measures, with one CPU and with two."""
    best = {"one": 0, "two": 0}
    for _ in range(ROUNDS):
        for count, online in (("one", "0"), ("two", "1")):
            SECOND_CPU.write_text(online)
            best[count] = max(best[count], rate())
    row(SUITE, name, one=[best["one"]], two=[best["two"]])


def main(chosen):
    if not SECOND_CPU.exists():
        skipped(SUITE, "scaling", "this guest has a single CPU")
        return
    measure("two threads, SHA-256", hashed_each_second)
    write_image(ram_disk(1), DATA / "data")
    measure("raw, two threads, 1 MiB reads",
            lambda: bytes_each_second(ram_disk(1), f"--length={SECTORS * 512}", *READERS["two threads, 1 MiB reads"]))
    load("dm-zfile")
    for name in filter(chosen, ("lz4-4k", "zstd-64k")):
        measure(f"ovbd verify {name.replace('-', ' ')}, two programs",
                lambda name=name: verified_each_second(DATA / f"{name}.zfile"))
        length = write_image(ram_disk(0), DATA / f"{name}.zfile")
        with dm.Mapped("bench", f"0 {SECTORS} zfile {ram_disk(0)} {length}") as device:
            for what, arguments in READERS.items():
                measure(f"dm-zfile {name.replace('-', ' ')}, {what}",
                        lambda arguments=arguments: bytes_each_second(device.node, *arguments))
