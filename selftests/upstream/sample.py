#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The sample, a twin of dm-linear: what is read and written, the table, and what it refuses."""

import os
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices, read_direct
from test_script import SCRATCH, CommandFailed, Tap, run

SECTORS, START = 2048, 96

tap = Tap()
content = os.urandom((START + SECTORS) * 512)
path = SCRATCH / "lower"
path.write_bytes(content)
with Devices() as devices:
    lower = run("losetup", "--find", "--show", path).strip()
    devices.undo(run, "losetup", "--detach", lower)
    node = devices.map("sample", f"0 {SECTORS} rust-linear {lower} {START}", readonly=False)
    part = content[START * 512:]
    tap.result(read_direct(node, 0, len(part)) == part, "reads are those of the part")
    table = run("dmsetup", "table", "sample")
    run("dmsetup", "reload", "sample", input=table)
    run("dmsetup", "--noudevsync", "--noudevrules", "resume", "sample")
    tap.equal(run("dmsetup", "table", "sample"), table, "the table reloads verbatim")
    with open(node, "r+b", buffering=0) as device:
        device.seek(512)
        device.write(b"x" * 512)
        os.fsync(device.fileno())
    run("sync")
    tap.result(read_direct(lower, (START + 1) * 512, 512) == b"x" * 512, "a write gets to its place")
    for what, line in (("a device that is too short", f"0 {SECTORS + 1} rust-linear {lower} {START}"),
                       ("a number that is none", f"0 {SECTORS} rust-linear {lower} 1x"),
                       ("a word too many", f"0 {SECTORS} rust-linear {lower} 0 1")):
        try:
            devices.map("refused", line)
        except CommandFailed:
            tap.result(True, f"refused: {what}")
        else:
            tap.result(False, f"refused: {what}")
tap.finish()
