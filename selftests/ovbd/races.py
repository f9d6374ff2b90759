#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Commands that change one stack at the same time."""

import os
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import sha256
from ovbd_command import MIB, Images, listed, ovbd, settled
from test_script import OVBD, SCRATCH, Tap, load

ROUNDS = 100
COMMITS = 20


def check_commits(tap, base):
    """Two commits wait for each other; one of them has what was written, and the other nothing."""
    device = ovbd("up", "--writable", "stack", base).strip()
    seen = set()
    for number in range(COMMITS):
        with open(device, "r+b", buffering=0) as file:
            for at in range(0, 4 * MIB, 64 << 10):
                os.pwrite(file.fileno(), os.urandom(4096), at)
            os.fsync(file)
        outs = [SCRATCH / f"race{number}.{n}.layer" for n in range(2)]
        both = [subprocess.Popen([OVBD, "commit", "-q", "-o", out, "stack"]) for out in outs]
        seen |= {process.wait() for process in both}
        if listed("stack")["suspended"]:
            seen.add("suspended")
    tap.equal(seen, {0}, f"{2 * COMMITS} commits, two at a time")
    layers = [layer["path"] for layer in listed("stack")["layers"]]
    tap.equal(len(layers), 1 + 2 * COMMITS, "the stack is on all their layers")
    copy = SCRATCH / "race.raw"
    ovbd("export", "-o", copy, *layers)
    tap.equal(sha256(copy), sha256(device), "which have what was written")
    ovbd("down", "stack")


def check_ups(tap, base):
    """One of two that want the same name or the same store gets it."""
    cow = SCRATCH / "cow"
    for what, names in (("name", ("stack", "stack")), ("store", ("stack", "other"))):
        seen = set()
        for _ in range(10):
            with open(cow, "wb") as file:
                file.truncate(MIB)
            both = [subprocess.Popen([OVBD, "up", "--writable", "--cow", cow, name, base], stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL) for name in names]
            seen.add(tuple(sorted(process.wait() for process in both)))
            for name in {name for name in names if listed(name)}:
                ovbd("down", name)
        tap.equal(seen, {(0, 1)}, f"one of two that want the same {what} gets it")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
images = Images("races", options=[[]])
check_commits(tap, images.layer[0])
check_ups(tap, images.layer[0])
tap.equal(settled([]), [], "nothing is left")
tap.finish()
