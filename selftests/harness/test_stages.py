# SPDX-License-Identifier: GPL-2.0
"""Tests of how stages are run: one that breaks off is one failure, and the others count all the same."""

import contextlib
import io
import unittest

from cache import Failure
from report import Counts
from stages import Stages


def breaks_off(error):
    raise error


class StagesTest(unittest.TestCase):
    def run_stages(self, *works, **options):
        stages, said = Stages(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            results = [stages.run(f"stage {number}", work, **options) for number, work in enumerate(works)]
        return stages, results, said.getvalue()

    def test_counts_are_added(self):
        stages, results, _ = self.run_stages(lambda: Counts(passed=2), lambda: ("kernel", Counts(skipped=1)))
        self.assertEqual(str(stages.total), "2 passed, 0 failed, 1 skipped")
        self.assertEqual(results[1][0], "kernel")

    def test_what_breaks_off_has_failed(self):
        for error in (Failure("a guest wrote"), OSError("no such program"), KeyError("row")):
            stages, results, said = self.run_stages(lambda: Counts(passed=1), lambda: breaks_off(error), lambda: Counts(passed=1))
            self.assertEqual(str(stages.total), "2 passed, 1 failed, 0 skipped")
            self.assertIsNone(results[1])
            self.assertEqual([name for name, _ in stages.times], ["stage 0", "stage 1", "stage 2"])
            self.assertIn(f"error: stage 1: {error}", said)
            self.assertEqual("Traceback" in said, not isinstance(error, Failure))

    def test_what_the_others_need_is_the_end(self):
        with self.assertRaises(Failure):
            self.run_stages(lambda: breaks_off(Failure("no kernel")), needed=True)

    def test_an_interrupt_is_the_end(self):
        with self.assertRaises(KeyboardInterrupt):
            self.run_stages(lambda: breaks_off(KeyboardInterrupt()))


if __name__ == "__main__":
    unittest.main()
