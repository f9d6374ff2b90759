#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""How long writers wait for a commit, beside what they wait for `dmsetup suspend` and `resume`: with no file system, with
ext4 and with XFS, after little and after much was written; and how fast a commit is beside a build of the same bytes.

Printed, not judged: other programs use the machine too. `make bench-commit` is this with more.
"""

import contextlib
import os
import pathlib
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from numbered_writes import SIZE, Writer
from ovbd_command import MIB, existing, has_file_system, listed, mounted, ovbd, settled
from test_script import SCRATCH, Tap, load, run

MUCH = int(os.environ.get("OVBD_WINDOW_MB", "8"))
ROUNDS = int(os.environ.get("OVBD_WINDOW_ROUNDS", "1"))
# XFS wants no less.
SPACE = 320


@contextlib.contextmanager
def writable(kind, base):
    """Where something can be written on a stack, and its device."""
    device = ovbd("up", "--writable", "window", base).strip()
    try:
        if kind == "none":
            yield pathlib.Path(device), device
            return
        run(f"mkfs.{kind}", "-q", device)
        with mounted(device) as top:
            yield top / "file", device
    finally:
        ovbd("down", "window")


def fill(kind, place, mebibytes):
    """Writes so much that does not compress, and that is not what the writer writes."""
    run("dd", "if=/dev/urandom", f"of={place}{'' if kind == 'none' else '-large'}", "bs=1M", f"count={mebibytes}",
        f"seek={SIZE // MIB if kind == 'none' else 0}", "oflag=direct", "conv=notrunc")


def longest_wait(place, action):
    """Milliseconds that the longest write takes while something is done."""
    writer = Writer(place)
    writer.start()
    while writer.acknowledged < 50:
        time.sleep(0.01)
    writer.longest = 0.0
    action()
    writer.stop()
    assert writer.error is None, writer.error
    return writer.longest * 1000


def plain():
    run("dmsetup", "suspend", "window")
    run("dmsetup", "resume", "window")


def measure(tap, kind, mebibytes, base):
    out = SCRATCH / "window.layer"
    waits = {"commit": [], "suspend and resume": []}
    for _ in range(ROUNDS):
        with writable(kind, base) as (place, _):
            if kind != "none":
                with open(place, "wb") as file:
                    file.truncate(SIZE)
                run("dd", "if=/dev/zero", f"of={place}", "bs=1M", f"count={SIZE // MIB}", "conv=notrunc,fsync")
            fill(kind, place, mebibytes)
            waits["suspend and resume"].append(longest_wait(place, plain))
            waits["commit"].append(longest_wait(place, lambda: ovbd("commit", "-q", "--force", "-o", out, "window")))
            tap.equal(listed("window")["layers"][-1]["path"], str(out), f"{kind}, {mebibytes} MiB: committed")
        out.unlink()
    words = ", ".join(f"{what} {min(times):.1f} ms" for what, times in waits.items())
    print(f"# {kind}, {mebibytes} MiB: the longest write: {words}; the least of {ROUNDS}", flush=True)


def measure_throughput(tap, mebibytes, base):
    """A commit of a device that nobody writes to, and a build of a copy, which is the same layer."""
    names = ("commit", "build --base of a copy")
    outs, copy, times = [SCRATCH / f"{number}.layer" for number in range(2)], SCRATCH / "copy", ([], [])
    for _ in range(ROUNDS):
        with writable("none", base) as (place, device):
            fill("none", place, mebibytes)
            run("dd", f"if={device}", f"of={copy}", "bs=1M", "iflag=direct", "conv=sparse")
            commands = [["commit", "-q", "-o", outs[0], "window"], ["build", "-q", "--base", base, "-o", outs[1], copy]]
            for command, found in zip(commands, times):
                start = time.monotonic()
                ovbd(*command)
                found.append(time.monotonic() - start)
        tap.result(outs[0].read_bytes() == outs[1].read_bytes(), f"{mebibytes} MiB: commit and build make the same layer")
        for path in (*outs, copy):
            path.unlink()
    words = ", ".join(f"{name} {min(found):.2f} s" for name, found in zip(names, times))
    print(f"# {mebibytes} MiB: {words}; the least of {ROUNDS}", flush=True)


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
before = existing()
raw, base = SCRATCH / "raw", SCRATCH / "base.layer"
with open(raw, "wb") as file:
    file.truncate((SPACE + 2 * MUCH) * MIB)
ovbd("build", "--format", "lsmt", "-o", base, raw)
for kind in ("none", "ext4", "xfs"):
    if kind != "none" and not has_file_system(kind):
        print(f"# this kernel has no {kind}", flush=True)
        continue
    for mebibytes in (1, MUCH):
        measure(tap, kind, mebibytes, base)
measure_throughput(tap, MUCH, base)
tap.equal(settled(before), before, "nothing is left")
tap.finish()
