#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The KUnit suites of selftests/dm-kunit: they run when the module is loaded, their results are in debugfs."""

import os
import re
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from debug_kernel import DEBUG, require
from test_script import MODULES, Tap, run

SUITES = ("ovbd_codec", "ovbd_args", "ovbd_image", "ovbd_claims")
RESULT = re.compile(r"\s+(not )?ok \d+ (\S+)(.*)")

require("kunit")
tap = Tap()
run("insmod", MODULES / "selftests/dm-kunit/dm-kunit.ko")
try:
    for suite in SUITES:
        text = (DEBUG / "kunit" / suite / "results").read_text()
        results = [match for line in text.splitlines() if (match := RESULT.match(line))]
        tap.result(len(results) > 0, f"{suite} ran", text)
        for match in results:
            # A skipped case has not shown anything.
            tap.result(not match[1] and "SKIP" not in match[3], f"{suite} {match[2]}", text)
finally:
    run("rmmod", "dm-kunit")
tap.finish()
