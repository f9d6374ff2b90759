# SPDX-License-Identifier: GPL-2.0
"""Runs the scripts below selftests/ in guests and collects their results.

All selected scripts share one boot. Where a guest dies or hangs, the script that was running fails and the rest
continues in a new boot. The output and kernel log of every script are kept in build/selftests-<kernel>/.
"""

import fnmatch
import json
import os
import shlex
import shutil

import debs
from cache import SOURCE, Failure
from report import Counts, Tap

# Seconds that one script may take; under emulation everything is some ten times slower.
LIMIT = int(os.environ.get("OVBD_TEST_LIMIT", "900"))

# The test that needs packages of Debian.
PACKAGES = "ovbd/packages.py"

# Groups of tests that want what one kernel has: fault injection and checkers, KCSAN, or patches to its own code. Or the one that
# users have, where other kernels have tests of their own.
ONLY_UNDER = {"faults": "debug", "kunit": "debug", "lvm": "native", "races": "kcsan", "upstream": "upstream-2-overlaybd",
              "fixes": "fixed", "stock": "stock"}


def select(patterns, kernel):
    """The executable scripts for a kernel of that name, as `group/name.sh`, whose name or stem matches any of the shell
    `patterns`."""
    scripts = sorted(str(path.relative_to(SOURCE / "selftests"))
                     for path in (SOURCE / "selftests").glob("*/*.*")
                     if path.suffix in (".sh", ".py") and os.access(path, os.X_OK)
                     and ONLY_UNDER.get(path.parent.name, kernel) == kernel)
    chosen = [name for name in scripts
              if any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(os.path.splitext(name)[0], pattern)
                     for pattern in patterns)]
    if not chosen:
        raise Failure(f"no test matches {' '.join(patterns)}; there are: {' '.join(scripts) or 'none'}")
    return chosen


def logs(kernel):
    """The directory of the logs of the last run under `kernel`."""
    return SOURCE / "build" / f"selftests-{kernel.name}"


def run(kernel, scripts):
    """Runs `scripts` under `kernel` and returns their counts."""
    if PACKAGES in scripts:
        os.environ["OVBD_DEBS"] = str(debs.ensure())
        os.environ["OVBD_DEB_SETS"] = ":".join(debs.SETS)
    directory = logs(kernel)
    shutil.rmtree(directory, ignore_errors=True)
    total = Counts()
    remaining = list(scripts)
    boots = 0
    while remaining:
        boots += 1
        done, counts = _boot(kernel, remaining, directory, boots)
        total.add(counts)
        if done == 0:
            print(f"FAIL  the guest ran no test; its console: {directory}/console-{boots}.log", flush=True)
            total.failed += len(remaining)
            break
        remaining = remaining[done:]
    return total


def _boot(kernel, scripts, directory, number):
    """One boot; returns how many of `scripts` are dealt with, and their counts."""
    console = directory / f"console-{number}.log"
    passed_on = [f"{name}={value}" for name, value in os.environ.items()
                 if name == "CASES" or name.startswith("OVBD_")]
    command = shlex.join(["env", *passed_on, f"KO_DIR={kernel.modules}",
                          "python3", str(SOURCE / "selftests/lib/run_tests.py"), str(LIMIT), *scripts])
    guest = kernel.guest(command, console, silence=LIMIT + 90)
    total = Counts()
    done = 0
    current = tap = log = None
    print(f"==> booting {kernel.release} for {len(scripts)} test script{'s' * (len(scripts) != 1)}", flush=True)
    for line in guest:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, KeyError):
            continue
        if kind == "begin":
            current, tap = event["test"], Tap()
            path = directory / (os.path.splitext(current)[0] + ".log")
            path.parent.mkdir(parents=True, exist_ok=True)
            log = open(path, "w")
        elif kind == "line":
            log.write(event["text"] + "\n")
            tap.line(event["text"])
        elif kind == "kernel":
            log.write("kernel: " + event["text"] + "\n")
            tap.kernel(event["text"])
        elif kind == "end":
            tap.end(event["status"], event["problems"])
            _show(current, tap, f"{event['seconds']:.0f} s", log)
            total.add(tap.counts)
            done += 1
            current = None
    if current is not None:
        tap.fail(f"{guest.why or 'the guest stopped'}; its console: {console}")
        _show(current, tap, "not finished", log)
        total.add(tap.counts)
        done += 1
    return done, total


def _show(name, tap, duration, log):
    log.close()
    print(f"{'FAIL' if tap.failures else 'ok  '}  {name}: {tap.counts} ({duration})", flush=True)
    for failure in tap.failures[:20]:
        print(f"        not ok: {failure}", flush=True)
    for skip in tap.skips:
        print(f"        skipped: {skip}", flush=True)
    if tap.failures:
        print(f"        log: {log.name}", flush=True)
