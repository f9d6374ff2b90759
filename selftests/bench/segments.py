# SPDX-License-Identifier: GPL-2.0
"""What a read costs through dm-overlaybd as segments and layers grow to a million and 250, beside dm-linear.

The RAM disks hold nothing but the layers' metadata, so that a device of 4 GB fits and reads of data cost the same
everywhere. `random` is for each 4 KiB direct read; `split`, for each bio that a 1 MiB read must become.
"""

import time

from measure import per_read, ram_disk, random_reads, row
import dm_ioctl
import lsmt_writer
from test_script import load

SUITE = "segments"
# A layer may have a million entries with the padding to a multiple of 256; "1M" below is nearly that.
LAYERS, EACH, LENGTH = 250, 3999, 8
SEGMENTS = LAYERS * EACH
SECTORS = SEGMENTS * LENGTH
# The largest segment that is a whole number of 4 KiB blocks, and the area of the fragmented reads.
ONE = 16376
FRAGMENTED = 32768
BIOS = 256


def write(device, virtual, data, index):
    return f"{device} {lsmt_writer.write_sparse(device, virtual, data, index)}"


def one_segment(device):
    return write(device, ONE, ONE, lsmt_writer.uniform_index(1, ONE, 0, ONE, 8))


def many_in_one(device, segments):
    """Neighbours are stored apart, in two halves that alternate; they would become one segment otherwise."""
    half = segments // 2
    even = lsmt_writer.uniform_index(half, LENGTH, 0, 2 * LENGTH, 8)[:16 * half]
    odd = lsmt_writer.uniform_index(half, LENGTH, LENGTH, 2 * LENGTH, 8 + half * LENGTH)[:16 * half]
    words = lsmt_writer.array.array("Q", bytes(16 * segments))
    for at, index in ((0, even), (2, odd)):
        source = lsmt_writer.array.array("Q", index)
        words[at::4], words[at + 1::4] = source[0::2], source[1::2]
    sectors = segments * LENGTH
    return write(device, sectors, sectors, words.tobytes() + lsmt_writer.PADDING * (-segments % 256))


def share(device, number, count, segments):
    """Layer `number` of `count` that hold the segments in turn."""
    each = segments // count
    index = lsmt_writer.uniform_index(each, LENGTH, number * LENGTH, count * LENGTH, 8)
    return write(device, segments * LENGTH, each * LENGTH, index)


def mapped(name, table, sectors):
    """A row of 4 KiB random reads, with what activation took and the size of the index."""
    start = time.perf_counter_ns()
    with dm_ioctl.Mapped("bench", table) as device:
        activation = time.perf_counter_ns() - start
        reads = random_reads(device.node, "--direct", f"--length={sectors * 512}")
        # <start> <sectors> overlaybd <#layers> <#segments> <mapped sectors> <bytes of memory> ...
        memory = [int(device.status().split()[6])] if " overlaybd " in table else None
        row(SUITE, name, random=reads, activation=[activation], memory=memory)


def spread_table():
    """A million segments in 250 layers that hold them in turn."""
    stack = [share(ram_disk(number), number, LAYERS, SEGMENTS) for number in range(LAYERS)]
    return f"0 {SECTORS} overlaybd {LAYERS} {' '.join(stack)}"


def overlaybd(name, sectors, stack):
    mapped(name, f"0 {sectors} overlaybd {len(stack)} {' '.join(stack)}", sectors)


def split_reads(name, table, sectors):
    """A row of 1 MiB reads over segments of 4 KiB, for each of the bios that they become."""
    with dm_ioctl.Mapped("bench", table) as device:
        times = per_read(device.node, "--direct", "--order=sequential", "--size=1048576",
                         f"--length={sectors * 512}", "--count=64")
        row(SUITE, name, split=[time / BIOS for time in times])


def main(_chosen):
    load("dm-overlaybd")
    disks = [ram_disk(number) for number in range(LAYERS + 1)]
    base = disks[-1]
    row(SUITE, "raw brd", random=random_reads(base, "--direct", f"--length={SECTORS * 512}"))
    mapped("dm-linear", f"0 {SECTORS} linear {base} 0", SECTORS)
    overlaybd("dm-overlaybd, 1 segment", ONE, [one_segment(base)])
    overlaybd("dm-overlaybd, 1 layer, 1k segments", 1000 * LENGTH, [many_in_one(base, 1000)])
    overlaybd("dm-overlaybd, 1 layer, 1M segments", SECTORS, [many_in_one(base, SEGMENTS)])
    mapped("dm-overlaybd, 250 layers, 1M segments", spread_table(), SECTORS)

    # What it costs alone that neighbouring reads go to different disks.
    for count in (3, LAYERS):
        width = SECTORS // count // LENGTH * LENGTH
        table = f"0 {width * count} striped {count} {LENGTH} {' '.join(f'{disk} 0' for disk in disks[:count])}"
        mapped(f"dm-stripe, {count} disks", table, width * count)

    # A table of targets is limited in size: the same reads over fewer of them.
    few = FRAGMENTED // 8
    lines = "\n".join(f"{at * LENGTH} {LENGTH} linear {disks[at % 2]} {at // 2 * LENGTH}"
                      for at in range(few // LENGTH))
    split_reads("dm-linear, 4 KiB targets", lines, few)
    pair = [share(disks[number], number, 2, FRAGMENTED // LENGTH) for number in range(2)]
    split_reads("dm-overlaybd, 4 KiB segments", f"0 {FRAGMENTED} overlaybd 2 {' '.join(pair)}", FRAGMENTED)
