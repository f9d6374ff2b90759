#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Every stack of plain LSMT layers written by the original library, and its damaged copies, through dm-overlaybd:
the device has the expected content and probes, or the table is refused."""

import os
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, sectors, sha256
from fixture_cases import WHOLE_DEVICE_LIMIT, blob, cases, probe_errors
from test_script import Tap, load


def plain(case):
    """The case with its plain LSMT layers alone, or None where they show nothing.

    Where one damaged layer makes the original refuse a stack, that layer by itself must be refused.
    """
    if case["kind"] != "image":
        return None
    if all(layer["zfile"] is None for layer in case["layers"]):
        return case
    damaged = case.get("corrupted", {}).get("layer")
    if damaged is None or case["layers"][damaged]["zfile"] or case["expect"] != "error":
        return None
    return case | {"layers": [case["layers"][damaged]]}


def table(devices, directory, case):
    words = []
    for layer in case["layers"]:
        path, offset, size = blob(directory, layer)
        words += [devices.loop(path, offset, size if offset else 0), str(size)]
    length = (case.get("virtual_size") or 1 << 20) // 512
    return f"0 {length} overlaybd {len(case['layers'])} {' '.join(words)}"


def check(tap, log, directory, case):
    name = case["name"]
    expect = case["expect"]
    with Devices() as devices:
        line = table(devices, directory, case)
        if expect == "error":
            dm_ioctl.table_refused(tap, log, name, line, "overlaybd: ")
            return
        try:
            device = devices.mapped("fixture", line).node
        except dm_ioctl.Refused as error:
            tap.result(expect.startswith("undetected"), f"{name}: table", error)
            return
        tap.equal(sectors(device), case["virtual_size"] // 512, f"{name}: size")
        allowed = [case[key] for key in ("sha256", "sha256_intact") if case.get(key)]
        if allowed and case["virtual_size"] <= WHOLE_DEVICE_LIMIT:
            tap.result(sha256(device) in allowed, f"{name}: content")
        if case.get("probes") and expect != "undetected-different":
            tap.result(not (wrong := probe_errors(device, case["probes"])), f"{name}: probes", "\n".join(wrong))


tap = Tap()
load("loop", "dm-overlaybd")
log = dm_ioctl.KernelLog()
found = [(directory, chosen) for directory, case in cases() if (chosen := plain(case))]
if not found:
    print("1..0 # SKIP the fixtures are not beside the checkout")
    sys.exit(0)
for directory, case in found:
    check(tap, log, directory, case)
tap.finish()
