#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Every ZFile written by the original library, and its damaged copies: alone as a compressed device, and as layers
of dm-overlaybd. Content and probes agree, exactly the damaged ranges fail, or the table is refused."""

import hashlib
import os
import shutil
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import zfile_writer
from block_devices import Devices, read_direct, sectors, sha256
from fixture_cases import WHOLE_DEVICE_LIMIT, blob, cases, probe_errors
from test_script import SCRATCH, Tap, load


def chosen(case):
    """Whether a case has a ZFile, and is not damaged elsewhere: dm-overlaybd's own test has those."""
    damaged = case.get("corrupted", {}).get("layer")
    layers = case["layers"] if damaged is None else case["layers"][damaged:damaged + 1]
    return case["kind"] in ("image", "zfile") and any(layer.get("zfile") for layer in layers)


def whole_sectors(path, offset, size):
    """A file that a loop device shows completely: one that ends within a sector is padded in a copy."""
    if (path.stat().st_size - offset) % 512 == 0 or offset + size <= path.stat().st_size // 512 * 512:
        return path
    copy = SCRATCH / f"padded-{len(list(SCRATCH.iterdir()))}"
    shutil.copyfile(path, copy)
    os.truncate(copy, offset + (size + 511) // 512 * 512)
    return copy


def layer_device(devices, directory, layer, name):
    """The device of a layer and the length of its content: a loop device, or dm-zfile on one."""
    path, offset, size = blob(directory, layer)
    loop = devices.loop(whole_sectors(path, offset, size), offset)
    with open(path, "rb") as file:
        file.seek(offset)
        magic = file.read(6)
        file.seek(offset)
        content = zfile_writer.original_bytes(file.read(size)) if magic == b"ZFile\0" else None
    if not layer.get("zfile"):
        return loop, size
    # A header that does not say how long the content is must be refused before the length matters.
    length = max(1, -(-(content or 512) // 512))
    return devices.mapped(name, f"0 {length} zfile {loop} {size}").node, content or 512


def make_device(devices, directory, case):
    if not case["layers"]:
        raise dm_ioctl.Refused("no layers")
    words = []
    for number, layer in enumerate(case["layers"]):
        device, size = layer_device(devices, directory, layer, f"layer{number}")
        words += [device, str(size)]
    if case["kind"] == "zfile":
        return words[0]
    length = (case.get("virtual_size") or 1 << 20) // 512
    return devices.mapped("fixture", f"0 {length} overlaybd {len(case['layers'])} {' '.join(words)}").node


def failed_ranges(device):
    """The ranges whose direct reads of 4 KiB, or of what is left at the end, fail; neighbours merged."""
    failed = []
    size = sectors(device) * 512
    for offset in range(0, size, 4096):
        length = min(4096, size - offset)
        try:
            read_direct(device, offset, length)
        except OSError:
            if failed and failed[-1][1] == offset:
                failed[-1][1] += length
            else:
                failed.append([offset, offset + length])
    return failed


def check_failed_ranges(tap):
    """Of a device that ends within 4 KiB, what fails is found and nothing else."""
    for table, wanted in (("0 8 zero\n8 8 error\n16 3 zero", [[4096, 8192]]),
                          ("0 8 zero\n8 11 error", [[4096, 9728]]),
                          ("0 19 zero", [])):
        with dm_ioctl.Mapped("ranges", table) as mapped:
            tap.equal(failed_ranges(mapped.node), wanted, f"failed ranges of {table.splitlines()}")


def arbitrary_probe_errors(device, probes):
    """As `probe_errors` for ranges that are not whole sectors, through the page cache."""

    wrong = []
    with open(device, "rb") as file:
        for probe in probes:
            file.seek(probe["offset"])
            if hashlib.sha256(file.read(probe["length"])).hexdigest() != probe["sha256"]:
                wrong.append(f"offset {probe['offset']} length {probe['length']}: other bytes")
    return wrong


def check(tap, directory, case):
    name = case["name"]
    expect = case["expect"]
    where = (case.get("error") or {}).get("where")
    with Devices() as devices:
        try:
            device = make_device(devices, directory, case)
        except (dm_ioctl.Refused, ValueError, IndexError) as error:
            good = (expect == "error" and where == "open") or expect.startswith("undetected")
            tap.result(good, f"{name}: refused", error)
            return
        size = case["virtual_size"]
        if expect == "error" and where == "open":
            # The original reads all of an LSMT index when it opens a stack; a block that it needs is damaged.
            tap.result(False, f"{name}: refused", "the table was accepted")
            return
        tap.equal(sectors(device), -(-size // 512), f"{name}: size")
        if expect == "error":
            tap.equal(failed_ranges(device), case["error"]["failed_4k_ranges"], f"{name}: failed ranges")
            return
        allowed = [case[key] for key in ("sha256", "sha256_intact") if case.get(key)]
        if allowed and size <= WHOLE_DEVICE_LIMIT:
            tap.result(sha256(device, size) in allowed, f"{name}: content")
        if case["kind"] == "zfile" and size % 512:
            with open(device, "rb") as file:
                file.seek(size)
                tap.equal(file.read().strip(b"\0"), b"", f"{name}: zeros after the end")
        if case.get("probes") and not expect.startswith("undetected-different"):
            probe = arbitrary_probe_errors if case["kind"] == "zfile" else probe_errors
            tap.result(not (wrong := probe(device, case["probes"])), f"{name}: probes", "\n".join(wrong))


tap = Tap()
load("loop", "dm-zfile", "dm-overlaybd")
check_failed_ranges(tap)
found = [(directory, case) for directory, case in cases() if chosen(case)]
if not found:
    tap.skip("fixtures", "they are not beside the checkout")
for directory, case in found:
    check(tap, directory, case)
    for path in SCRATCH.iterdir():
        path.unlink()
tap.finish()
