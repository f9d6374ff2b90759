#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""How long writers wait for a commit, beside what they wait for `dmsetup suspend` and `resume`: with no file system, with
ext4 and with XFS, after little and after much was written; and how fast a commit is beside a build of the same bytes.

Printed, not judged: other programs use the machine too. `make bench-commit` is this with more.
"""

import contextlib
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from dm_ioctl import suspended_for
from numbered_writes import SIZE, Writer
from ovbd_command import MIB, existing, has_file_system, listed, mounted, ovbd, settled
from test_script import SCRATCH, Tap, load, run

MUCH = int(os.environ.get("OVBD_WINDOW_MB", "8"))
ROUNDS = int(os.environ.get("OVBD_WINDOW_ROUNDS", "1"))
# How often what leaves nothing behind is done beside each commit.
PLAIN = min(ROUNDS, 5)
COMMITS = ("a new generation", "the commit of both")
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


class Urgent(Writer):
    """Does not wait for processors that others use."""

    def run(self):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        super().run()


def longest_write(place, action):
    """Milliseconds that the longest write takes while something is done."""
    writer = Urgent(place)
    writer.start()
    while writer.acknowledged < 50:
        time.sleep(0.01)
    writer.longest = 0.0
    action()
    writer.stop()
    assert writer.error is None, writer.error
    return writer.longest * 1000


def suspend_and_resume():
    run("dmsetup", "suspend", "window")
    run("dmsetup", "resume", "window")


def replace_table():
    """What any change of a table takes."""
    run("dmsetup", "load", "window", "--table", run("dmsetup", "table", "window"))
    suspend_and_resume()


def measure(tap, kind, mebibytes, base):
    """The middle of all rounds counts."""
    out = SCRATCH / "window.layer"
    actions = {
        "suspend and resume": suspend_and_resume,
        "their ioctls alone": lambda: suspended_for("window"),
        "suspend and resume with a table loaded": replace_table,
        COMMITS[0]: lambda: ovbd("commit", "--snapshot-only", "window"),
        COMMITS[1]: lambda: ovbd("commit", "-q", "-o", out, "window"),
    }
    waits = {what: [] for what in actions}
    for _ in range(ROUNDS):
        with writable(kind, base) as (place, _):
            if kind != "none":
                with open(place, "wb") as file:
                    file.truncate(SIZE)
                run("dd", "if=/dev/zero", f"of={place}", "bs=1M", f"count={SIZE // MIB}", "conv=notrunc,fsync")
            fill(kind, place, mebibytes)
            for what, action in actions.items():
                for _ in range(1 if what in COMMITS else PLAIN):
                    waits[what].append(longest_write(place, action))
            tap.equal(listed("window")["layers"][-1]["path"], str(out), f"{kind}, {mebibytes} MiB: committed")
        out.unlink()
    middle = {what: statistics.median(times) for what, times in waits.items()}
    beside = middle["suspend and resume"]
    print(f"# {kind}, {mebibytes} MiB: the longest write beside", flush=True)
    for what, times in waits.items():
        print(f"#   {what}: {middle[what]:.1f} ms ({min(times):.1f} to {max(times):.1f}), {middle[what] / beside:.2f}",
              flush=True)


def collect(path, bytes_):
    """Files of the system, one after the other."""
    with open(path, "wb") as out:
        for top, _, names in os.walk("/usr/lib"):
            for file in (pathlib.Path(top, name) for name in names):
                if file.is_file() and not file.is_symlink():
                    out.write(file.read_bytes()[:bytes_ - out.tell()])
            if out.tell() == bytes_:
                return


def measure_throughput(tap, mebibytes, base, what):
    """A commit of a device that nobody writes to, and a build of a copy, which is the same layer."""
    data, copy, outs = SCRATCH / "data", SCRATCH / "copy", [SCRATCH / f"{number}.layer" for number in range(2)]
    collect(data, mebibytes * MIB)
    times = {"commit": [], "build --base of a copy": []}
    for _ in range(ROUNDS):
        with writable("none", base) as (_, device):
            run("dd", f"if={data}", f"of={device}", "bs=1M", "seek=3", "oflag=direct", "conv=notrunc")
            run("dd", f"if={device}", f"of={copy}", "bs=1M", "iflag=direct", "conv=sparse")
            commands = [["commit", "-q", "-o", outs[0], "window"], ["build", "-q", "--base", base, "-o", outs[1], copy]]
            for command, found in zip(commands, times.values()):
                start = time.monotonic()
                ovbd(*command)
                found.append(time.monotonic() - start)
        tap.result(outs[0].read_bytes() == outs[1].read_bytes(), f"{what}: commit and build make the same layer")
        for path in (*outs, copy):
            path.unlink()
    data.unlink()
    words = ", ".join(f"{name} {min(found):.2f} s" for name, found in times.items())
    commit, build = map(min, times.values())
    print(f"# {mebibytes} MiB of files, {what}: {words}, {build / commit:.2f}; the least of {ROUNDS}", flush=True)


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
before = existing()
raw, base = SCRATCH / "raw", SCRATCH / "base.layer"
with open(raw, "wb") as file:
    file.truncate((SPACE + MUCH) * MIB)
ovbd("build", "--format", "lsmt", "-o", base, raw)
for kind in ("none", "ext4", "xfs"):
    if kind != "none" and not has_file_system(kind):
        print(f"# this kernel has no {kind}", flush=True)
        continue
    for mebibytes in (1, MUCH):
        measure(tap, kind, mebibytes, base)
measure_throughput(tap, MUCH, base, "where the stack has nothing")
with open(raw, "r+b") as file:
    for _ in range(MUCH + 4):
        file.write(os.urandom(512) * (MIB // 512))
base.unlink()
ovbd("build", "--format", "lsmt", "-o", base, raw)
raw.unlink()
measure_throughput(tap, MUCH, base, "where it has other data")
tap.equal(settled(before), before, "nothing is left")
tap.finish()
