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
    """Milliseconds that the longest write takes while something is done, and seconds that this takes."""
    writer = Writer(place)
    writer.start()
    while writer.acknowledged < 50:
        time.sleep(0.01)
    writer.longest, start = 0.0, time.monotonic()
    action()
    took = time.monotonic() - start
    writer.stop()
    assert writer.error is None, writer.error
    return writer.longest * 1000, took


def plain():
    run("dmsetup", "suspend", "window")
    run("dmsetup", "resume", "window")


def measure(tap, kind, mebibytes, base):
    out, copy, built = (SCRATCH / name for name in ("window.layer", "copy", "built.layer"))
    waits = {"commit": [], "suspend and resume": []}
    for _ in range(ROUNDS):
        with writable(kind, base) as (place, device):
            if kind != "none":
                with open(place, "wb") as file:
                    file.truncate(SIZE)
                run("dd", "if=/dev/zero", f"of={place}", "bs=1M", f"count={SIZE // MIB}", "conv=notrunc,fsync")
            fill(kind, place, mebibytes)
            waits["suspend and resume"].append(longest_wait(place, plain)[0])
            wait, took = longest_wait(place, lambda: ovbd("commit", "-q", "--force", "-o", out, "window"))
            waits["commit"].append(wait)
            tap.equal(listed("window")["layers"][-1]["path"], str(out), f"{kind}, {mebibytes} MiB: committed")
            if kind == "none":
                run("dd", f"if={device}", f"of={copy}", "bs=1M", "iflag=direct", "conv=sparse")
                start = time.monotonic()
                ovbd("build", "-q", "--force", "--base", base, "-o", built, copy)
                print(f"# commit of {mebibytes} MiB: {took:.2f} s, build --base of a copy {time.monotonic() - start:.2f} s",
                      flush=True)
                copy.unlink()
        out.unlink()
    words = ", ".join(f"{what} {min(times):.1f} ms" for what, times in waits.items())
    print(f"# {kind}, {mebibytes} MiB: the longest write: {words}; the least of {ROUNDS}", flush=True)


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
tap.equal(settled(before), before, "nothing is left")
tap.finish()
