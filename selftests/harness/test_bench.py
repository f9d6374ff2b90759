# SPDX-License-Identifier: GPL-2.0
"""Tests of what the benchmark concludes from its figures."""

import contextlib
import io
import unittest
from xml.etree import ElementTree

import bench_report
import plot
import tracked


def row(suite, name, layers=None, **figures):
    return {"suite": suite, "row": name, "layers": layers,
            "figures": {key: [value, value] for key, value in figures.items()}}


ZFILE = [row("zfile", "raw brd", random=5000), row("zfile", "erofs lz4 4k", cold=30000, buffered=4e6),
         row("zfile", "dm-zfile lz4 4k", random=20000, cold=27000, sequential=4e6, buffered=5e6, crc=2560 * 100,
             decode=256 * 12000, lower=500000)]


class ReportTest(unittest.TestCase):
    def test_marks_what_was_disturbed(self):
        self.assertEqual(bench_report.number("random", [1000000, 1001000]), "1,000,000")
        self.assertEqual(bench_report.number("random", [1000000, 1004000]), "1,000,000!")
        self.assertEqual(bench_report.number("first", [1000000, 1040000]), "1,000,000")
        self.assertEqual(bench_report.number("first", [1000000, 1140000]), "1,000,000!")
        text = "\n".join(bench_report.tables([{"suite": "zfile", "row": "x", "figures": {"random": [1, 2]}}],
                                             "instructions"))
        self.assertIn("x: random", text)

    def test_a_missing_competitor_has_its_reason(self):
        text = "\n".join(bench_report.tables([{"suite": "stacks", "row": "qcow2", "skipped": "no nbd"}],
                                             "instructions"))
        self.assertIn("skipped: no nbd", text)

    def test_figures_of_several_boots(self):
        boots = [{"suite": "scaling", "row": "dm-zfile lz4 4k, two programs", "figures": {count: [nanoseconds]}}
                 for count, nanoseconds in (("one", 400), ("two", 290), ("one", 410), ("two", 200), ("one", 300),
                                            ("two", 210))]
        report, = bench_report.middle([*boots, {"part": "scaling"}])
        self.assertEqual(report["figures"], {"one": [400], "two": [210]})
        self.assertIn("0.525 <= 0.556  reached", "\n".join(bench_report.goal_lines([report], "wall")))

    def test_goals_of_zfile(self):
        goals = {what: (value, limit) for what, value, limit in bench_report.goals(ZFILE)}
        value, limit = goals["dm-zfile lz4 4k / raw read + CRC + decompression, 4 KiB random"]
        self.assertAlmostEqual(value, 20000 / (5000 + 1000 + 12000))
        self.assertEqual(limit, 1.25)
        lines = "\n".join(bench_report.goal_lines(ZFILE, "instructions"))
        self.assertRegex(lines, r"1\.250 > +0\.900 +NOT REACHED +dm-zfile lz4 4k / erofs lz4 4k, 1 MiB")
        self.assertRegex(lines, r"0\.900 <= 1\.000 +reached +dm-zfile lz4 4k / erofs lz4 4k, 4 KiB")

    def test_goals_without_figures(self):
        self.assertEqual(bench_report.goal_lines([], "instructions"), [])


class TrackedTest(unittest.TestCase):
    def compare(self, wanted, figures):
        with contextlib.redirect_stdout(io.StringIO()):
            counts = tracked.compare(wanted, figures)
        return counts.passed, counts.failed

    def test_tolerance(self):
        self.assertEqual(self.compare({"a": 1.0}, {"a": 1.019}), (1, 0))
        self.assertEqual(self.compare({"a": 1.0}, {"a": 1.021}), (0, 1))
        self.assertEqual(self.compare({"a": 1.0}, {"a": 0.979}), (0, 1))

    def test_figures_appear_and_vanish(self):
        self.assertEqual(self.compare({"a": 1.0}, {"b": 1.0}), (0, 2))


class PlotTest(unittest.TestCase):
    def test_chart_is_xml_with_all_points(self):
        svg = plot.chart("a < b", "unit", [("one", [(1, 5000), (250, 6000)]), ("two", [(1, 9000), (32, 50000)])],
                         ("level", 4500))
        root = ElementTree.fromstring(svg)
        lines = root.findall("{http://www.w3.org/2000/svg}polyline")
        self.assertEqual([len(line.get("points").split()) for line in lines], [2, 2])


if __name__ == "__main__":
    unittest.main()
