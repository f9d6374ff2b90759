# SPDX-License-Identifier: GPL-2.0
"""Compressed block devices and file systems over the same 64 MiB on one RAM disk, and what they cannot do without.

The figures of a row: `random`, 4 KiB direct reads; `cold`, 4 KiB reads of what is not in the page cache; `sequential`
and `buffered`, 1 MiB reads with and without O_DIRECT, for each MiB. File systems that compress have no direct reads.
For a ZFile there are also `crc` and `decode`, the CRC-32C and decompression of all its blocks, for each MiB of
content, and `lower`, reading the compressed bytes for a MiB from the RAM disk. For lz4, `kernel decode` is
decompression by the kernel's decoder, over the benchmark's content and over text. `stored` is what the content takes.
"""

import os
import pathlib
import struct

from layered import write_all
from measure import (DATA, MEBIBYTE, drop_caches, ram_disk, random_reads, require_content, row, sequential_reads,
                     skipped, write_image)
import dm_ioctl
import zfile_writer
from block_devices import Devices
from test_script import MODULES, CommandFailed, load, run

SUITE = "zfile"
LENGTH = 64 * MEBIBYTE
SECTORS = LENGTH // 512
PARTS = "dm_zfile_parts"
# By the clock, the least of many counts; a count of instructions is always the same.
ROUNDS = 1 if os.environ["LENS"] == "instructions" else 25


def all_reads(device):
    """All figures of a block device."""
    require_content(device)
    part = f"--length={LENGTH}"
    return {"random": random_reads(device, part, "--direct"), "cold": random_reads(device, part, "--cold"),
            "sequential": sequential_reads(device, part, "--direct"), "buffered": sequential_reads(device, part)}


def fields(path):
    """What the ZFile at `path` says of itself."""
    values = zfile_writer.values(path.read_bytes())
    index_offset, blocks, original = struct.unpack_from("<QQQ", values, 40)
    block_bytes, algorithm = struct.unpack_from("<IB", values, 72)
    return {"index_offset": index_offset, "blocks": blocks, "original_bytes": original, "block_bytes": block_bytes,
            "zstd": int(algorithm == 2), "crc": values[88]}


def parts(disk, path):
    """CRC and decompression alone of the ZFile at `path`, which is also on `disk`, for each MiB of content."""
    options = fields(path)
    original_bytes = options.pop("original_bytes")
    options |= {"path": disk, "rounds": ROUNDS}
    wanted = ["decode"] + ["crc"] * options["crc"] + ["kernel decode"] * (not options["zstd"])
    results = {what: [] for what in wanted}
    for _ in range(2):
        run("insmod", MODULES / "selftests/dm-zfile-parts/dm-zfile-parts.ko",
            *(f"{key}={value}" for key, value in options.items()))
        for what, values in results.items():
            nanoseconds = int(pathlib.Path(f"/sys/module/{PARTS}/parameters/{what.replace(' ', '_')}_ns").read_text())
            values.append(nanoseconds * MEBIBYTE / original_bytes)
        run("rmmod", PARTS)
    return results


def lower_read(disk, length, original_bytes):
    """Reading as many bytes as are stored for a MiB, in whole pages, for each MiB of content."""
    count = original_bytes // MEBIBYTE
    lower = -(-length // count // 4096) * 4096
    reads = sequential_reads(disk, f"--length={count * lower}", "--direct", size=lower)
    return [value * lower / MEBIBYTE for value in reads]


def label(name):
    return name.removesuffix(".zfile").replace("-", " ")


def zfile(disk, name):
    """The row of one ZFile."""
    length = write_image(disk, DATA / name)
    figures = parts(disk, DATA / name) | {"lower": lower_read(disk, length, LENGTH)}
    with dm_ioctl.Mapped("bench", f"0 {SECTORS} zfile {disk} {length}") as device:
        row(SUITE, f"dm-zfile {label(name)}", stored=[length], **all_reads(device.node), **figures)


def text(disk, name):
    """The row of a ZFile that holds text, of which only the parts are measured."""
    write_image(disk, DATA / name)
    row(SUITE, label(name), **parts(disk, DATA / name))


def kernel_decoder(disk, names):
    """Rows of ZFiles that dm-zfile decompresses with the kernel's decoder."""
    run("rmmod", "dm-zfile")
    run("insmod", MODULES / "dm-zfile/dm-zfile.ko", "kernel_lz4=1")
    for name in names:
        length = write_image(disk, DATA / name)
        with dm_ioctl.Mapped("bench", f"0 {SECTORS} zfile {disk} {length}") as device:
            row(SUITE, f"the kernel's decoder, {label(name)}", stored=[length], **all_reads(device.node))
    run("rmmod", "dm-zfile")
    load("dm-zfile")


def file_system(disk, name):
    """The row of one file system image."""
    with Devices() as devices:
        length = write_image(disk, DATA / name)
        drop_caches()
        file = devices.mount(disk, "/tmp/bench-mount") / "data"
        require_content(file)
        row(SUITE, name.removesuffix(".img").replace("-", " "), stored=[length], cold=random_reads(file, "--cold"),
            buffered=sequential_reads(file))


def vdo(disk, data):
    """The row of dm-vdo, which formats a device that starts with zeros (since Linux 7.1), with the same content."""
    run("modprobe", "dm-vdo")
    write_all(disk, [(0, bytes(1 << 20))])
    blocks = int(run("blockdev", "--getsize64", disk)) // 4096
    table = f"0 {SECTORS} vdo V4 {disk} {blocks} 512 32768 16380 deduplication off compression on"
    with dm_ioctl.Mapped("bench", table, readonly=False) as device:
        # Without what it takes for itself. Blocks of which no two fit into one, it stores as they are.
        used = -int(device.status().split()[-2])
        run("dd", f"if={data}", f"of={device.node}", "bs=1M", "oflag=direct", "conv=fsync", "status=none")
        used += int(device.status().split()[-2])
        row(SUITE, "dm-vdo lz4", **all_reads(device.node), stored=[used * 4096])


def main(chosen):
    load("dm-zfile")
    disk = ram_disk(0)
    write_image(disk, DATA / "data")
    row(SUITE, "raw brd", **all_reads(disk))
    with dm_ioctl.Mapped("bench", f"0 {SECTORS} linear {disk} 0") as device:
        row(SUITE, "dm-linear", **all_reads(device.node))
    # Not those of the Debian root.
    for name in filter(chosen, sorted(path.name for path in DATA.glob("[lz]*.zfile"))):
        zfile(disk, name)
    for name in filter(chosen, sorted(path.name for path in DATA.glob("text-*.zfile"))):
        text(disk, name)
    if names := list(filter(chosen, ("lz4-4k.zfile", "lz4-64k.zfile"))):
        kernel_decoder(disk, names)
    for name in filter(chosen, sorted(path.name for path in DATA.glob("*.img"))):
        try:
            file_system(disk, name)
        except CommandFailed as error:
            skipped(SUITE, name, error)
    if chosen("vdo"):
        try:
            vdo(ram_disk(1), DATA / "data")
        except (CommandFailed, OSError) as error:
            skipped(SUITE, "dm-vdo lz4", error)

