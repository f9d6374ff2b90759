# SPDX-License-Identifier: GPL-2.0
"""The stages of `make test`, timed, with one total at the end."""

import os
import re
import subprocess
import time
import unittest

import build
import kernel as kernels
import selftests
import tracked
from cache import SOURCE
from report import Counts, Tap

CARGO_RESULT = re.compile(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored")


def one(status):
    """The counts of a check that passes or fails as a whole."""
    return Counts(passed=1) if status == 0 else Counts(failed=1)


def cargo_test():
    """`cargo test` with its own counts; a run that breaks off counts as a failure."""
    # All in one profile: another one would compile every dependency once more.
    process = subprocess.Popen(["cargo", "test", "--release", "--workspace", "--locked", "--no-fail-fast"],
                               cwd=SOURCE / "tools", stdout=subprocess.PIPE, text=True)
    counts = Counts()
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := CARGO_RESULT.match(line):
            counts.add(Counts(*map(int, match.groups())))
    if process.wait() and not counts.failed:
        counts.failed += 1
    return counts


def cases():
    """Every case of the folder CASES through ovbd, named where it differs."""
    process = subprocess.Popen(["cargo", "run", "--release", "--locked", "--quiet", "-p", "ovbd-cases", "--bin",
                                "ovbd-cases", "--", os.environ["CASES"]],
                               cwd=SOURCE / "tools", stdout=subprocess.PIPE, text=True)
    tap = Tap()
    for line in process.stdout:
        print(line, end="", flush=True)
        tap.line(line.rstrip("\n"))
    tap.end(process.wait(), [])
    return tap.counts


def harness_test():
    """The harness's own unit tests."""
    program = unittest.main(module=None, argv=["harness", "discover", "-s", str(SOURCE / "selftests/harness")],
                            exit=False)
    failed = len(program.result.failures) + len(program.result.errors)
    return Counts(passed=program.result.testsRun - failed, failed=failed)


def test(patterns):
    """Everything; returns the counts of all stages."""
    times = []
    total = Counts()

    def stage(name, work):
        print(f"\n=== {name}", flush=True)
        start = time.monotonic()
        result = work()
        times.append((name, time.monotonic() - start))
        if isinstance(result, Counts):
            total.add(result)
        return result

    kernel = stage("kernel build tree", kernels.ensure)
    stage("harness", harness_test)
    stage("formatting", lambda: one(build.make("rustfmt-check", OVBD_KERNEL_SOURCE=kernel.source)))
    stage("clippy, kernel", lambda: one(build.clippy(kernel)))
    built = stage("modules", lambda: one(build.modules(kernel)))
    stage("clippy, tools", lambda: one(build.make("clippy-tools")))
    stage("cargo test", cargo_test)
    stage("ovbd", lambda: one(build.make("ovbd")))
    if built.failed:
        print("the modules did not build: the guest tests cannot run", flush=True)
        total.failed += 1
    else:
        stage("guest tests", lambda: selftests.run(kernel, selftests.select(patterns)))
        stage("tracked figures", lambda: tracked.check(kernel))

    print("\nstage                      seconds")
    for name, seconds in times:
        print(f"{name:24} {seconds:9.0f}")
    return total
