#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The KUnit suites and the doctests that the series brings: they ran when the kernel booted, their results are in
debugfs. Examples in the documentation are doctests, named after their file."""

import os
import re
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from debug_kernel import DEBUG, require
from test_script import Tap

SUITES = ("rust_dm_args", "rust_codec")
RESULT = re.compile(r"\s*(not )?ok \d+ (\S+)(.*)")

require("kunit")
tap = Tap()


def results(suite):
    """The cases of a suite."""
    path = DEBUG / "kunit" / suite / "results"
    text = path.read_text() if path.exists() else ""
    return [match for line in text.splitlines() if line.startswith(" ") and (match := RESULT.match(line))]


for suite in SUITES:
    cases = results(suite)
    tap.result(cases, f"{suite} ran")
    for match in cases:
        tap.result(not match[1] and "SKIP" not in match[3], f"{suite} {match[2]}")
examples = [match for match in results("rust_doctests_kernel") if "device_mapper" in match[2]]
tap.result(examples, "the examples of the documentation ran")
for match in examples:
    tap.result(not match[1] and "SKIP" not in match[3], f"example {match[2]}")
tap.finish()
