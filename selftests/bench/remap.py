# SPDX-License-Identifier: GPL-2.0
"""What one read costs in instructions, through dm-overlaybd and through dm-linear, on the same RAM disks.

Runs inside a guest whose clock counts instructions (`make bench`): the time of a read in nanoseconds is then the
number of instructions executed for it, the same on any machine and in every run. Everything is measured twice to
show that. The RAM disks hold nothing but the layers' metadata, so that reads of data cost the same everywhere.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests")
import dm
import layers
from devices import load, run

# A layer may have a million entries with the padding to a multiple of 256; "1M" below is nearly that.
LAYERS, EACH, LENGTH = 250, 3999, 8
SEGMENTS = LAYERS * EACH
SECTORS = SEGMENTS * LENGTH
# The largest segment that is a whole number of 4 KiB blocks, and the area of the fragmented reads.
ONE = 16376
FRAGMENTED = 32768
RUNTIME = float(os.environ.get("BENCH_RUNTIME", "0.5"))


def measure(device, size, *arguments):
    """Instructions for each read, from two runs."""
    results = []
    for _ in range(2):
        output = run("fio", "--name=t", f"--filename={device}", f"--size={size}", "--direct=1", "--ioengine=psync",
                     "--thread", "--time_based", f"--runtime={int(RUNTIME * 1000)}ms", "--norandommap", "--readonly",
                     "--output-format=json", *arguments)
        read = json.loads(output[output.index("{"):])["jobs"][0]["read"]
        results.append(read["runtime"] * 1e6 / read["total_ios"])
    return results


def random_reads(device, sectors):
    return measure(device, sectors * 512, "--rw=randread", "--bs=4k")


def large_reads(device):
    return measure(device, FRAGMENTED * 512, "--rw=read", "--bs=1m")


def write(device, virtual, data, index):
    return f"{device} {layers.write_sparse(device, virtual, data, index)}"


def one_segment(device):
    return write(device, ONE, ONE, layers.uniform_index(1, ONE, 0, ONE, 8))


def million_in_one(device):
    """Neighbours are stored apart, in two halves that alternate; they would become one segment otherwise."""
    half = SEGMENTS // 2
    even = layers.uniform_index(half, LENGTH, 0, 2 * LENGTH, 8)[:16 * half]
    odd = layers.uniform_index(half, LENGTH, LENGTH, 2 * LENGTH, 8 + half * LENGTH)[:16 * half]
    words = layers.array.array("Q", bytes(16 * SEGMENTS))
    for at, index in ((0, even), (2, odd)):
        source = layers.array.array("Q", index)
        words[at::4], words[at + 1::4] = source[0::2], source[1::2]
    return write(device, SECTORS, SECTORS, words.tobytes() + layers.PADDING * (-SEGMENTS % 256))


def share(device, number, count, segments):
    """Layer `number` of `count` that hold the segments in turn."""
    each = segments // count
    index = layers.uniform_index(each, LENGTH, number * LENGTH, count * LENGTH, 8)
    return write(device, segments * LENGTH, each * LENGTH, index)


def rows(disks, loading):
    """The rows of the table: what, its figures, the row that it is compared with, and how many bios a read becomes.

    The seconds that each table took to load are appended to `loading`.
    """
    def mapped(table, sectors, reads):
        start = time.monotonic()
        with dm.Mapped("bench", table) as device:
            loading.append(time.monotonic() - start)
            return reads(device.node, *([sectors] if reads is random_reads else []))

    def overlaybd(sectors, stack, reads):
        return mapped(f"0 {sectors} overlaybd {len(stack)} {' '.join(stack)}", sectors, reads)

    base = disks[-1]
    yield "raw brd, 4 KiB random", random_reads(base, SECTORS), None, 1
    yield "dm-linear", mapped(f"0 {SECTORS} linear {base} 0", SECTORS, random_reads), None, 1
    yield "dm-overlaybd, 1 segment", overlaybd(ONE, [one_segment(base)], random_reads), "dm-linear", 1
    yield "dm-overlaybd, 1 layer, 1M segments", overlaybd(
        SECTORS, [million_in_one(base)], random_reads), "dm-linear", 1
    stack = [share(disks[number], number, LAYERS, SEGMENTS) for number in range(LAYERS)]
    yield "dm-overlaybd, 250 layers, 1M segments", overlaybd(
        SECTORS, stack, random_reads), "dm-overlaybd, 1 layer, 1M segments", 1

    # What it costs alone that neighbouring reads go to different disks.
    for count in (3, LAYERS):
        width = SECTORS // count // LENGTH * LENGTH
        table = f"0 {width * count} striped {count} {LENGTH} {' '.join(f'{disk} 0' for disk in disks[:count])}"
        yield f"dm-stripe, {count} disks", mapped(table, width * count, random_reads), (
            None if count == 3 else "dm-stripe, 3 disks"), 1

    parts = FRAGMENTED // LENGTH
    yield "dm-linear, 1 MiB sequential", mapped(f"0 {FRAGMENTED} linear {base} 0", FRAGMENTED, large_reads), None, 1
    lines = "\n".join(f"{at * LENGTH} {LENGTH} linear {disks[at % 2]} {at // 2 * LENGTH}" for at in range(parts // 8))
    yield "dm-linear, 4 KiB targets", mapped(lines, 0, short_reads), None, 256
    pair = [share(disks[number], number, 2, parts) for number in range(2)]
    yield "dm-overlaybd, 4 KiB segments", overlaybd(FRAGMENTED, pair, large_reads), "dm-linear, 4 KiB targets", 256


def short_reads(device):
    """A table of targets is limited in size: the same reads over fewer of them."""
    return measure(device, FRAGMENTED // 8 * 512, "--rw=read", "--bs=1m")


def main():
    run("udevadm", "control", "--stop-exec-queue")
    load("dm-overlaybd")
    run("modprobe", "brd", f"rd_nr={LAYERS + 1}", f"rd_size={SECTORS // 2 + (64 << 10)}")
    disks = [f"/dev/ram{number}" for number in range(LAYERS + 1)]
    seen, loading = {}, []
    print(f"{'':38} {'reads/s':>10} {'instructions for a bio':>24} {'ratio':>7}", flush=True)
    for what, (first, second), compared, bios in rows(disks, loading):
        seen[what] = first / bios
        ratio = f"{first / bios / seen[compared]:7.3f} x {compared}" if compared else ""
        print(f"{what:38} {1e9 / first:10.0f} {first / bios:11.1f}, {second / bios:11.1f} {ratio}", flush=True)
        if "1M" in what:
            print(f"{'':8}loading the table: {loading[-1] * 1e3:.0f} million instructions", flush=True)


main()
