#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Every stack of plain LSMT layers written by the original library, and its damaged copies, through dm-overlaybd:
the device has the expected content and probes, or the table is refused."""

import os
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests")
from devices import CommandFailed, Devices, Tap, cases, load, probe_errors, refused, sectors, sha256

# Larger devices are checked by their probes alone.
WHOLE_DEVICE_LIMIT = 128 << 20
# Blobs start here in a file with the tar wrapper.
TAR_BYTES = {True: 1536, "ustar": 512}


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


def layer_device(devices, directory, layer):
    """The loop device of a layer and the length of its blob in bytes."""
    path = (directory / layer["file"]).resolve()
    if layer["tar"] not in TAR_BYTES:
        return devices.loop(path), path.stat().st_size
    offset = TAR_BYTES[layer["tar"]]
    with open(path, "rb") as file:
        # The size is in a pax record of the wrapper, else in octal in its header.
        head = file.read(1536)
    if layer["tar"] is True:
        size = int(head[512:1024].split(b"size=")[1].split(b"\n")[0])
    else:
        size = int(head[124:135], 8)
    return devices.loop(path, offset, size), size


def table(devices, directory, case):
    words = []
    for layer in case["layers"]:
        device, size = layer_device(devices, directory, layer)
        words += [device, str(size)]
    length = (case.get("virtual_size") or 1 << 20) // 512
    return f"0 {length} overlaybd {len(case['layers'])} {' '.join(words)}"


def check(tap, directory, case):
    name = case["name"]
    expect = case["expect"]
    with Devices() as devices:
        line = table(devices, directory, case)
        if expect == "error":
            refused(tap, f"{name}: refused", line, "overlaybd: ")
            return
        try:
            device = devices.map("fixture", line)
        except CommandFailed as error:
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
found = [(directory, chosen) for directory, case in cases() if (chosen := plain(case))]
if not found:
    print("1..0 # SKIP the fixtures are not beside the checkout")
    sys.exit(0)
for directory, case in found:
    check(tap, directory, case)
tap.finish()
