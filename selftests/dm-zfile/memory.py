#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads by a process that may have little memory (memcg limit), from several threads and through the page cache:
they finish and are right."""

import os
import pathlib
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices
from target_images import BYTES, Images
from test_script import SCRATCH, Tap, load

GROUP = pathlib.Path("/sys/fs/cgroup/ovbd-memory")
# A Python with four threads needs some ten; what is left is less than the file it reads.
LIMIT = 24 << 20
REPEATED = 32

READER = """
import os, sys, threading
device, content, bytes_ = sys.argv[1], open(sys.argv[2], "rb"), int(sys.argv[3])
wrong = []

def read(first):
    with open(device, "rb", buffering=0) as file:
        for at in range(first * 65536, bytes_, 4 * 65536):
            if os.pread(file.fileno(), 65536, at) != os.pread(content.fileno(), 65536, at):
                wrong.append(at)

threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(wrong)
"""


def table_of_many(table):
    """The same target again and again, so that the device does not fit into the limit."""
    start, length, *words = table.split(" ")
    return "\n".join(f"{number * int(length)} {length} {' '.join(words)}" for number in range(REPEATED))


def in_group():
    (GROUP / "cgroup.procs").write_text(str(os.getpid()))


tap = Tap()
controllers = pathlib.Path("/sys/fs/cgroup/cgroup.subtree_control")
try:
    controllers.write_text("+memory")
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.max").write_text(str(LIMIT))
except OSError as error:
    print(f"1..0 # SKIP no memory controller: {error}")
    sys.exit(0)
load("loop", "dm-zfile", "dm-overlaybd")
images = Images()
whole = SCRATCH / "whole"
whole.write_bytes(images.content * REPEATED)
for name in Images.NAMES:
    with Devices() as devices:
        mapped = devices.mapped("memory", table_of_many(images.table(devices, name)))
        result = subprocess.run([sys.executable, "-c", READER, mapped.node, whole, str(BYTES * REPEATED)],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=in_group)
        tap.equal((result.returncode, result.stdout.strip()), (0, "[]"), f"{name}: reads with little memory")
        events = (GROUP / "memory.events").read_text()
        reached = int(events.split("max ")[1].split()[0])
        tap.result(reached > 0, f"{name}: the limit was reached", events)
GROUP.rmdir()
tap.finish()
