# SPDX-License-Identifier: GPL-2.0
"""Tests of what is read of a console: what a system reports must arrive whatever else is printed there."""

import unittest

import vm


class ReportedTest(unittest.TestCase):
    def test_a_line(self):
        self.assertEqual(vm.reported("[  1.2] report: table verity\r\n"), ["table verity"])
        self.assertEqual(vm.reported("a line of somebody else\n"), [])

    def test_a_program_asks_the_terminal_in_between(self):
        asks = "\x1b[!p\x1b]104\x07\x1b[?7h\x1b[6n\x1b[32766;32766H\x1b[6n"
        line = f"{asks}report: root /dev/mapper/root ext4{asks}report: table verity\n"
        self.assertEqual(vm.reported(line), ["root /dev/mapper/root ext4", "table verity"])
