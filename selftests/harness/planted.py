# SPDX-License-Identifier: GPL-2.0
"""Bugs that are put into the targets on purpose, one after the other: the tests must find each.

The first lines of a patch in selftests/planted/ say what it does, under which kernel tests run with it if not the debug
kernel, which tests, and what a line of their logs must look like afterwards, as a regular expression. One that changes
nothing is a bug of that kernel, and its tests are those of the kernel without it.
"""

import os
import re

import build
import built_kernels
import selftests
from cache import SOURCE, Failure
from report import Counts

PATCHES = SOURCE / "selftests/planted"
ABOUT = re.compile(r"^(What|Kernel|Without|Test|Found): (.*)$", re.MULTILINE)


def run(stock):
    """Plants each bug and counts as passed those that were found."""
    counts = Counts()
    lines = []
    if build.make("ovbd"):
        return Counts(failed=1)
    patches = sorted(PATCHES.glob(f"{os.environ.get('OVBD_PLANTED') or '*'}.patch"))
    if not patches:
        raise Failure(f"no such bug in {PATCHES.relative_to(SOURCE)}")
    for patch in patches:
        about = dict(ABOUT.findall(patch.read_text()))
        print(f"\n=== {patch.stem}: {about['What']}", flush=True)
        kernel = built_kernels.KINDS[about.get("Kernel", "debug")](stock)
        kernel.ensure()
        found = _found(kernel, patch, about)
        counts.add(Counts(passed=1) if found else Counts(failed=1))
        lines.append(f"{'found ' if found else 'MISSED'}  {patch.stem}: {about['What']}\n        {found or ''}")
    print("", *lines, sep="\n", flush=True)
    return counts


def _found(kernel, patch, about):
    """The line of a log that tells of the bug, or None."""
    if build.modules(kernel, patch if "Without" not in about else None):
        print(f"{patch.name} does not apply or build", flush=True)
        return None
    tests = selftests.select(about["Test"].split(), about.get("Without", kernel.name))
    if not selftests.run(kernel, tests).failed:
        return None
    # The console's too: of some the guest dies.
    for log in sorted(selftests.logs(kernel).rglob("*.log")):
        for line in log.read_text(errors="replace").splitlines():
            if re.match(about["Found"], line):
                return line
    return None
