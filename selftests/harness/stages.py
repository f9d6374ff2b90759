# SPDX-License-Identifier: GPL-2.0
"""The stages of `make test`, timed, with one total at the end."""

import contextlib
import os
import re
import signal
import subprocess
import time
import traceback
import unittest

import bench_guests
import build
import installed
import installed_guest
import kernel as kernels
import packages
import selftests
import stack_root
import system_boot
import tracked
from cache import SOURCE, Failure
from guest_process import keep_priority
from report import Counts, Tap

# What is about ovbd and starts very many programs. The debug kernel runs them at the speed of the machine.
TOOL_TESTS = ["ovbd/crashes", "ovbd/powercut", "ovbd/push", "ovbd/races", "ovbd/rounds",
              "ovbd/stores", "ovbd/streams", "ovbd/windows"]
# What else runs under the debug kernel: what needs its checkers, and of the rest what does most to the targets.
DEBUG_TESTS = ["kunit/*", "faults/*", "device-mapper/*", "hostile/*", "dm-overlaybd/tables", "dm-overlaybd/io",
               "dm-zfile/reads", "dm-zfile/io"]
# Damaged images of each base there. The stock kernel's guest takes twice as many, `make torture` 1400.
DEBUG_MUTANTS = os.environ.get("OVBD_MUTANTS", "11")
# What runs under the oldest kernel, in one short boot: each part of what the modules ask of a kernel once.
OLDEST_TESTS = ["device-mapper/io", "device-mapper/stale", "dm-overlaybd/io", "dm-zfile/io"]
# What runs under the native kernel: of what is about logical volumes each way that an image goes once; and what needs a
# network, which the debug kernel has not, many reads, or many programs.
NATIVE_TESTS = ["lvm/push", "lvm/served", "lvm/inside", "ovbd/commit", "ovbd/images", "ovbd/lazy", "ovbd/lazy_parts",
                "ovbd/deploy", "ovbd/squashed", "ovbd/tars", "ovbd/many", "ovbd/refusals", "ovbd/generations"]
# What takes as long as one wants, or measures: in `make bench-lazy`, `bench-system` and `make test-all`.
LONG_TESTS = ["ovbd/lazy_figures", "ovbd/lazy_soak", "ovbd/deploy_figures"]
DEBUG_LOG = SOURCE / "build/debug-pass.log"
COUNTS = re.compile(r"(\d+) passed, (\d+) failed, (\d+) skipped")
CARGO_RESULT = re.compile(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored")


def one(status):
    """The counts of a check that passes or fails as a whole."""
    return Counts(passed=1) if status == 0 else Counts(failed=1)


def cargo_test():
    """`cargo test` with its own counts, and as skipped what a test says that it left out; a run that breaks off counts as
    a failure."""
    # All in one profile: another one would compile every dependency once more.
    process = subprocess.Popen(["cargo", "test", "--release", "--workspace", "--locked", "--no-fail-fast",
                                "--", "--show-output"],
                               cwd=SOURCE / "tools", stdout=subprocess.PIPE, text=True)
    counts = Counts()
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := CARGO_RESULT.match(line):
            counts.add(Counts(*map(int, match.groups())))
        elif line.startswith("skipped: "):
            counts.skipped += 1
    if process.wait() and not counts.failed:
        counts.failed += 1
    return counts


def long_transfers():
    """Connections that are cut and clients that are killed, far more often than in `cargo test`."""
    command = ["cargo", "test", "--release", "--locked", "-p", "ovbd-oci", "--test", "servers"]
    return one(subprocess.run(command, cwd=SOURCE / "tools", env=os.environ | {"OVBD_TRANSFERS": "1000"}).returncode)


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


def lint_python():
    """What Python itself does not say: names that do not exist, keys given twice."""
    return one(subprocess.run(["pyflakes3", "selftests"], cwd=SOURCE).returncode)


def harness_test():
    """The harness's own unit tests."""
    program = unittest.main(module=None, argv=["harness", "discover", "-s", str(SOURCE / "selftests/harness")],
                            exit=False)
    failed = len(program.result.failures) + len(program.result.errors)
    return Counts(passed=program.result.testsRun - failed, failed=failed)


@contextlib.contextmanager
def debug_pass():
    """Runs tests under the debug kernel, which is built where it is not cached, while the body runs, on what the
    stock guest leaves idle: the emulator loses far more than its share when it has to wait for a processor. Gives a
    function that waits for it, shows its output and returns its counts."""

    def lowest_priority():
        os.nice(19)
        keep_priority()

    DEBUG_LOG.parent.mkdir(exist_ok=True)
    with open(DEBUG_LOG, "w") as log:
        process = subprocess.Popen(["make", "--no-print-directory", "selftests", "KERNEL=debug",
                                    f"T={' '.join(DEBUG_TESTS + TOOL_TESTS)}", f"OVBD_MUTANTS={DEBUG_MUTANTS}"],
                                   cwd=SOURCE, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False,
                                   start_new_session=True, preexec_fn=lowest_priority)

    def finish():
        process.wait()
        text = DEBUG_LOG.read_text(errors="replace")
        print(text, end="", flush=True)
        counts = COUNTS.fullmatch(text.splitlines()[-1]) if text else None
        # Without a count it did not come to the tests.
        return Counts(*map(int, counts.groups())) if counts else Counts(failed=1)

    try:
        yield finish
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def shortfall(kernel):
    """A skip where a kernel stands in for the one that was meant."""
    if not kernel.shortfall:
        return Counts()
    print(f"skipped: {kernel.shortfall}", flush=True)
    return Counts(skipped=1)


def oldest_modules(stock):
    """Builds the modules for the oldest kernel; returns it, or None where there is nothing to test with, and counts."""
    kernel = kernels.ensure_oldest()
    counts = shortfall(kernel)
    if kernel.release == stock.release:
        print(f"{kernel.release} is the kernel of the other stages", flush=True)
        return None, counts
    counts.add(one(build.modules(kernel)))
    return (None if counts.failed else kernel), counts


def stock_tests(patterns, kernel):
    """Those that match, without what other kernels are enough for."""
    elsewhere = selftests.select(TOOL_TESTS + NATIVE_TESTS + LONG_TESTS, kernel.name)
    return [name for name in selftests.select(patterns, kernel.name) if name not in elsewhere]


class Stages:
    """What is run one after the other: the sum of its counts, and how long each takes."""

    def __init__(self):
        self.total = Counts()
        self.times = []

    def run(self, name, work, needed=False):
        """Runs a stage, which returns counts or has them in what it returns. One that breaks off has failed and
        gives None, and those behind it run all the same, unless it is `needed` by them."""
        print(f"\n=== {name}", flush=True)
        start = time.monotonic()
        try:
            result = work()
        except Exception as error:
            if needed:
                raise
            if not isinstance(error, Failure):
                traceback.print_exc()
            print(f"error: {name}: {error}", flush=True)
            self.total.failed += 1
            result = None
        self.times.append((name, time.monotonic() - start))
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, Counts):
                self.total.add(part)
        return result

    def show(self):
        """Prints the times."""
        print(f"\n{'stage':46} seconds")
        for name, seconds in self.times:
            print(f"{name:46} {seconds:7.0f}")


def test(patterns, stages):
    """Everything that fits into the time of a continuous integration."""
    stage, total = stages.run, stages.total
    kernel = stage("kernel build tree", kernels.ensure, needed=True)
    stage("harness", harness_test)
    stage("lint, Python", lint_python)
    stage("formatting", lambda: one(build.make("rustfmt-check", OVBD_KERNEL_SOURCE=kernel.source)))
    stage("clippy, kernel", lambda: one(build.clippy(kernel)))
    modules = stage("modules", lambda: one(build.modules(kernel)))
    built = modules is not None and not modules.failed
    stage("bindings without the kernel's rust/Makefile",
          lambda: one(0 if built and build.same_bindings_without_makefile(kernel) else 1))
    oldest, _ = stage("modules, oldest kernel", lambda: oldest_modules(kernel)) or (None, None)
    stage("clippy, tools", lambda: one(build.make("clippy-tools")))
    stage("cargo test", cargo_test)
    stage("ovbd", lambda: one(build.make("ovbd")))
    if not built:
        print("the modules did not build: the guest tests cannot run", flush=True)
        total.failed += 1
    else:
        with debug_pass() as finish:
            stage("guest tests, stock kernel", lambda: selftests.run(kernel, stock_tests(patterns, kernel)))
            if oldest:
                stage("guest tests, oldest kernel",
                      lambda: selftests.run(oldest, selftests.select(OLDEST_TESTS, oldest.name)))
            stage("tracked figures", lambda: tracked.check(kernel))
            stage("packages", lambda: installed.test(kernel, packages.cached_kernels()))
            stage("guest tests, native kernel",
                  lambda: counted("selftests", "KERNEL=native", f"T={' '.join(NATIVE_TESTS)}"))
            stage("guest tests, debug kernel (the wait for them)", finish)


def counted(*arguments, **environment):
    """Runs a verb of the Makefile that prints its counts last; one that breaks off counts as a failure."""
    process = subprocess.Popen(["make", "--no-print-directory", *arguments], cwd=SOURCE, close_fds=False,
                               stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    counts = None
    for line in process.stdout:
        print(line, end="", flush=True)
        counts = COUNTS.fullmatch(line.rstrip("\n"))
    process.wait()
    return Counts(*map(int, counts.groups())) if counts else Counts(failed=1)


def test_packages(stages):
    """All that there is about packages."""
    stages.run("packages", lambda: installed.test(kernels.ensure(), packages.all_kernels(), whole=True))
    stages.run("packages in a guest", lambda: installed_guest.test(kernels.ensure(), packages.DEBS))
    stages.run("a root file system on a stack", lambda: stack_root.test(kernels.ensure(), packages.DEBS))
    stages.run("a system that updates by layers", lambda: system_boot.test(kernels.ensure(), packages.DEBS))


def test_all(stages):
    """Everything of `test`, and what takes too long for it."""
    test(["*"], stages)
    stages.run("many layers, refusals and generations, debug kernel",
               lambda: counted("selftests", "KERNEL=debug", "T=ovbd/many ovbd/refusals ovbd/generations",
                               OVBD_TEST_LIMIT="3600"))
    stages.run("all guest tests, oldest kernel", lambda: counted("selftests", "KERNEL=oldest"))
    stages.run("all about logical volumes", lambda: counted("selftests", "KERNEL=native", "T=lvm/*", OVBD_KILLS="50"))
    stages.run("logical volumes, stock kernel", lambda: counted("selftests", "T=stock/*", OVBD_SNAPSHOTS="20",
                                                                OVBD_TEST_LIMIT="7200"))
    stages.run("more damaged images", lambda: counted("selftests", "KERNEL=debug", "T=hostile/*", OVBD_MUTANTS="200",
                                                      OVBD_TEST_LIMIT="3600"))
    stages.run("sealed stacks that were changed", lambda: counted("selftests", "KERNEL=native", "T=ovbd/tampered",
                                                                  OVBD_MUTANTS="5000", OVBD_TEST_LIMIT="7200"))
    stages.run("images, stock kernel", lambda: counted("selftests", "T=ovbd/commit ovbd/images ovbd/lazy ovbd/lazy_parts "
                                                                    "ovbd/tars"))
    stages.run("lazily fetched, for half an hour", lambda: counted("selftests", "KERNEL=native",
                                                                   "T=ovbd/lazy ovbd/lazy_soak", OVBD_KILLS="100",
                                                                   OVBD_SOAK="1800", OVBD_TEST_LIMIT="3600"))
    stages.run("commits under a writer, and killed", lambda: counted("selftests", "KERNEL=native",
                                                                     "T=ovbd/generations ovbd/crashes ovbd/powercut ovbd/stores ovbd/deploy "
                                                                     "ovbd/deploy_figures ovbd/squashed",
                                                                     OVBD_COMMITS="200", OVBD_MANY_COMMITS="1000",
                                                                     OVBD_KILLS="100", OVBD_TEST_LIMIT="3600",
                                                                     OVBD_STEP_STRIDE="1", OVBD_MOMENTS="50"))
    stages.run("damaged files for the tools", lambda: one(build.make("fuzz-smoke")))
    stages.run("transfers cut and killed", long_transfers)
    stages.run("two guests and one image", lambda: bench_guests.test(kernels.ensure()))
    stages.run("race detector", lambda: counted("selftests", "KERNEL=kcsan", "T=races/* dm-*/io */dax */dax_refused",
                                                OVBD_HOSTILE_STACKS="500", OVBD_TEST_LIMIT="3600"))
    stages.run("planted bugs", lambda: counted("planted"))
    stages.run("packages, and the power cut 50 times", lambda: counted("test-packages", OVBD_CUTS="50"))
    stages.run("upstream", lambda: counted("upstream"))
