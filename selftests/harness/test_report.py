# SPDX-License-Identifier: GPL-2.0
"""Tests of the TAP reader: what must count as a failure does."""

import unittest

from report import Tap


def read(*lines, status=0, problems=(), kernel=()):
    tap = Tap()
    for line in lines:
        tap.line(line)
    for message in kernel:
        tap.kernel(message)
    tap.end(status, problems)
    return tap


class TapTest(unittest.TestCase):
    def counts(self, tap, passed, failed, skipped):
        self.assertEqual((tap.counts.passed, tap.counts.failed, tap.counts.skipped), (passed, failed, skipped))

    def test_passes_and_skips(self):
        tap = read("1..3", "ok 1 - read", "# a comment", "ok 2 - write # SKIP read-only", "ok 3")
        self.counts(tap, 2, 0, 1)
        self.assertEqual(tap.skips, ["write: read-only"])

    def test_whole_script_skipped(self):
        self.counts(read("1..0 # SKIP no module"), 0, 0, 1)

    def test_not_ok(self):
        self.counts(read("1..2", "ok 1 - a", "not ok 2 - b", status=1), 1, 1, 0)

    def test_plan_is_required_and_kept(self):
        self.counts(read("ok 1 - a"), 1, 1, 0)
        self.counts(read("1..2", "ok 1 - a"), 1, 1, 0)
        self.counts(read("1..1", "ok 1 - a", "ok 2 - b"), 2, 1, 0)

    def test_exit_status_alone_fails(self):
        self.counts(read("1..1", "ok 1 - a", status=1), 1, 1, 0)

    def test_problems_and_kernel_log(self):
        self.counts(read("1..1", "ok 1 - a", problems=["timed out after 5 s"]), 1, 1, 0)
        self.counts(read("1..1", "ok 1 - a", kernel=["WARNING: CPU: 0 PID: 1 at mm/slub.c"]), 1, 1, 0)
        self.counts(read("1..1", "ok 1 - a", kernel=["device-mapper: overlaybd: no trailer"]), 1, 0, 0)

    def test_races_elsewhere_do_not_count(self):
        self.counts(read("1..1", "ok 1 - a", kernel=["BUG: KCSAN: data-race in shmem_fault / find_get_entry"]), 1, 0, 0)
        self.counts(read("1..1", "ok 1 - a", kernel=["BUG: KCSAN: data-race in bio_endio / _RNv [dm_zfile]"]), 1, 1, 0)
        self.counts(read("1..1", "ok 1 - a", kernel=["BUG: KCSAN: data-race in read+0x5/0x10 [dm_overlaybd]"]), 1, 1, 0)
        self.counts(read("1..1", "ok 1 - a", kernel=["Kernel panic - not syncing: KCSAN selftests failed"]), 1, 1, 0)

    def test_output_that_resembles_results(self):
        self.counts(read("1..1", "okay then", "  not ok 7 - nested", "ok 1 - a"), 1, 0, 0)


if __name__ == "__main__":
    unittest.main()
