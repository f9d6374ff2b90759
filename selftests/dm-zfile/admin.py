#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What an administrator sees of dm-zfile: the module is loaded by the target's name and stays while it is used; table,
status, IMA, messages and version are as documented."""

import errno
import os
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import zfile_writer
from block_devices import Devices, read_direct
from module_life import check_autoload, versions
from test_script import SCRATCH, Tap, load, run

BLOCK = 4096
FIELDS = ["decompressed", "cache_hits", "crc_errors", "decode_errors", "read_errors"]


def number_of(device):
    number = os.stat(device).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def check(tap, loop, blob, content):
    device = number_of(loop)
    sectors = len(content) // 512
    for options in ("", " 1 ignore_crc", " 2 cache_blocks 0", " 3 ignore_crc cache_blocks 256"):
        line = f"0 {sectors} zfile {device} {len(blob)}{options}"
        with dm_ioctl.Mapped("table", line) as mapped:
            tap.equal(mapped.status(dm_ioctl.TABLE), line, f"table with '{options}': as it was given")
            ignored = "y" if "ignore" in options else "n"
            tap.equal(mapped.status(dm_ioctl.IMA).split(" ", 3)[3],
                      f"target_name=zfile,target_version=1.1.0,device={device},bytes={len(blob)},algorithm=lz4,"
                      f"block_bytes={BLOCK},original_bytes={len(content)},ignore_crc={ignored},offset=0;", "IMA")
    # What is the default is not printed.
    with dm_ioctl.Mapped("table", f"0 {sectors} zfile {device} {len(blob)} 2 cache_blocks 8") as mapped:
        tap.equal(mapped.status(dm_ioctl.TABLE), f"0 {sectors} zfile {device} {len(blob)}",
                  "table: defaults are left out")

    stored = zfile_writer.offset_of(content, len(content) // BLOCK) - 512
    with dm_ioctl.Mapped("status", f"0 {sectors} zfile {device} {len(blob)}") as mapped:
        before = [int(word) for word in mapped.status().split()[7:]]
        fixed = ["lz4", str(BLOCK), str(len(content) // BLOCK), str(stored)]
        tap.equal(mapped.status().split()[3:7], fixed, "status: algorithm, block size, blocks, compressed bytes")
        read_direct(mapped.node, 8 * BLOCK, 4 * BLOCK)
        read_direct(mapped.node, 20 * BLOCK + 512, 512)
        read_direct(mapped.node, 20 * BLOCK + 1024, 512)
        after = [int(word) for word in mapped.status().split()[7:]]
        tap.equal([new - old for old, new in zip(before, after)], [5, 1, 0, 0, 0], "status: the counters count")
        wanted = " ".join(f"{name}={value}" for name, value in zip(FIELDS, after))
        tap.equal(mapped.message("stats"), wanted, "message stats")
        for text in ("stats 1", "statistics", "stat", "lookup 0"):
            try:
                got = mapped.message(text)
            except OSError as error:
                got = error.errno
            tap.equal(got, errno.EINVAL, f"message '{text}': refused")


def check_offset(tap, loop, start, blob, content):
    """The same of a file that begins somewhere on the device."""
    device, sectors = number_of(loop), len(content) // 512
    for options in (f" 2 offset {start}", f" 5 ignore_crc cache_blocks 0 offset {start}"):
        line = f"0 {sectors} zfile {device} {len(blob)}{options}"
        with dm_ioctl.Mapped("offset", line) as mapped:
            tap.equal(mapped.status(dm_ioctl.TABLE), line, f"table with '{options}': as it was given")
            tap.result(mapped.status(dm_ioctl.IMA).endswith(f",offset={start};"), "IMA: the offset")
    with dm_ioctl.Mapped("offset", f"0 {sectors} zfile {device} {len(blob)} 2 offset {start} ") as mapped:
        printed = mapped.status(dm_ioctl.TABLE)
    with dm_ioctl.Mapped("offset", printed) as mapped:
        tap.result(read_direct(mapped.node, 0, len(content)) == content, "offset: the printed table gives the content")


tap = Tap()
load("loop")
run("modprobe", "dm-mod")
content = zfile_writer.content(64 * BLOCK, BLOCK)
blob = zfile_writer.build(content, block=BLOCK)
path = SCRATCH / "admin.zfile"
path.write_bytes(blob + bytes(-len(blob) % 512))
with Devices() as devices:
    loop = devices.loop(path)
    check_autoload(tap, "dm-zfile", f"0 {len(content) // 512} zfile {loop} {len(blob)}", content)
    load("dm-zfile")
    tap.equal(versions("zfile"), ["v1.1.0"], "dmsetup targets: the version")
    check(tap, loop, blob, content)
    path.write_bytes(bytes(1337) + blob + bytes(-(1337 + len(blob)) % 512))
    check_offset(tap, devices.loop(path), 1337, blob, content)
tap.finish()
