#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd up --writable` where dm-snapshot can discard: the store gives room back, and layers have zeroed segments. Under
all other kernels the option would divide by zero, and every other test of ovbd sees that it is not used there."""

import fcntl
import json
import os
import random
import struct
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct
from ovbd_command import MIB, existing, ovbd, settled
from test_script import SCRATCH, Tap, load, run

# linux/fs.h
BLKDISCARD = 0x1277


def write(device, at, content):
    with open(device, "r+b", buffering=0) as file:
        file.seek(at)
        file.write(content)
        os.fsync(file)


def discard(device, start, size):
    with open(device, "r+b", buffering=0) as file:
        fcntl.ioctl(file, BLKDISCARD, struct.pack("QQ", start, size))


def features(number):
    return run("dmsetup", "table", f"trim-cow{number}").split()[7:]


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
content = random.Random(1).randbytes(8 * MIB)
raw, base, cow = SCRATCH / "raw", SCRATCH / "base.layer", SCRATCH / "cow"
raw.write_bytes(content)
ovbd("build", "-o", base, raw)
before = existing()
device = ovbd("up", "--writable", "--cow", cow, "trim", base).strip()
tap.equal(features(0), ["1", "discard_zeroes_cow"], "the option is used")
write(device, MIB, b"n" * 2 * MIB)
full = os.stat(cow).st_blocks * 512
discard(device, MIB, MIB)
discard(device, 5 * MIB, MIB)
tap.equal(read_direct(device, 0, 8 * MIB), content[:MIB] + bytes(MIB) + b"n" * MIB + content[3 * MIB:],
          "what was written is discarded, what was not is not")
shrunk = os.stat(cow).st_blocks * 512
tap.result(shrunk <= full - MIB, "the store gives room back", f"{full} bytes, then {shrunk}")
out = SCRATCH / "next.layer"
ovbd("commit", "-o", out, "trim")
tap.equal(features(1), ["1", "discard_zeroes_cow"], "the next generation has it too")
info = json.loads(ovbd("info", "--json", base, out))
tap.equal((info["zeroed_bytes"], info["layers"][1]["data_bytes"]), (MIB, MIB), "a zeroed segment in the layer")
tap.equal(read_direct(device, 0, 8 * MIB), content[:MIB] + bytes(MIB) + b"n" * MIB + content[3 * MIB:],
          "after the commit it reads the same")
discard(device, 0, 8 * MIB)
tap.equal(read_direct(device, 0, 2 * MIB), content[:MIB] + bytes(MIB), "nothing is written yet: nothing to discard")
ovbd("down", "trim")
ovbd("up", "--writable", "--cow", cow, "trim", base, out)
tap.equal(read_direct(device, 0, 2 * MIB), content[:MIB] + bytes(MIB), "the files give the same")
ovbd("down", "trim")
tap.equal(settled(before), before, "down leaves nothing")
tap.finish()
