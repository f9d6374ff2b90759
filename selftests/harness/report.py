# SPDX-License-Identifier: GPL-2.0
"""Counts of passed, failed and skipped tests, and the reading of TAP."""

import dataclasses
import re

# What the kernel says when something is wrong, whatever the test that ran thought of it.
KERNEL_TROUBLE = re.compile(
    r"WARNING:|BUG:|Oops|KASAN|KCSAN|UBSAN|lockdep|possible recursive locking|possible circular locking|"
    r"general protection fault|rust_kernel: panicked|kernel panic|Kernel panic|blocked for more than|"
    r"memory leak|inconsistent lock state|sleeping function called|rcu.*stall"
)
# KCSAN names what both sides of a race ran, and finds some all over the kernel: only those of the project's modules
# count.
RACE_ELSEWHERE = re.compile(r"BUG: KCSAN: data-race in (?!.*\[dm_(overlaybd|zfile|rust_linear)\])")
RESULT = re.compile(r"(not )?ok\b\s*(\d+)?\s*-?\s*([^#]*)(?:#\s*(.*))?")
PLAN = re.compile(r"1\.\.(\d+)\s*(?:#\s*SKIP\S*\s*(.*))?", re.IGNORECASE)


@dataclasses.dataclass
class Counts:
    """How many tests passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, other):
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


class Tap:
    """Reads the TAP of one script and says what is wrong with it."""

    def __init__(self):
        self.counts = Counts()
        self.failures = []
        self.skips = []
        self._planned = None
        self._seen = 0

    def line(self, text):
        """Takes the next line of output."""
        if plan := PLAN.fullmatch(text.strip()):
            self._planned = int(plan[1])
            if self._planned == 0:
                self.counts.skipped += 1
                self.skips.append(plan[2] or "no reason given")
        elif (result := RESULT.match(text)) and not text.startswith(" "):
            self._seen += 1
            directive = (result[4] or "").strip()
            if directive.upper().startswith("SKIP"):
                self.counts.skipped += 1
                self.skips.append(f"{result[3].strip()}: {directive[4:].strip()}")
            elif result[1]:
                self.fail(result[3].strip() or text)
            else:
                self.counts.passed += 1

    def fail(self, why):
        """Records a failure."""
        self.counts.failed += 1
        self.failures.append(why)

    def kernel(self, message):
        """Takes a line of the kernel log; trouble there is a failure of the test."""
        if KERNEL_TROUBLE.search(message) and not RACE_ELSEWHERE.search(message):
            self.fail(f"kernel log: {message}")

    def end(self, status, problems):
        """Takes the exit status and what the guest found wrong afterwards."""
        for problem in problems:
            self.fail(problem)
        if self._planned is None:
            self.fail("no plan was printed: the script did not run to its end")
        elif self._planned != self._seen:
            self.fail(f"planned {self._planned} tests but {self._seen} reported")
        if status and not self.failures:
            self.fail(f"exit status {status}")
