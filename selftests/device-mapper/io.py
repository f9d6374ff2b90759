#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""I/O through the twin of dm-linear is what it is through dm-linear, in all ways that a target can answer a bio."""

import os
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices, read_direct, sectors
from linear_twin import load, loop, twin, unload, write_direct
from test_script import Tap, run

START = 77
KIB, MIB = 1 << 10, 1 << 20


def read(device, piece=64 * KIB):
    """All of a device, read in pieces."""
    return b"".join(read_direct(device, at, min(piece, BYTES - at)) for at in range(0, BYTES, piece))


def check_read(tap, what, node, piece=64 * KIB):
    tap.result(read(node, piece) == read(linear.node), what)


def check_write(tap, what, node, piece=512 * KIB):
    """What is written to the twin can be read from dm-linear."""
    data = os.urandom(BYTES)
    write_direct(node, data, piece)
    tap.result(read(linear.node) == data, what)


def counters(device):
    """Bios that were mapped and that ended, and those that had their data."""
    return [int(word) for word in device.status().split()[3:6]]


def check_balanced(tap, what, device):
    mapped, ended, whole = counters(device)
    tap.result(0 < mapped == ended == whole, what, f"{mapped} {ended} {whole}")


def bios(device):
    """How many bios the target gets for a read of 1 MiB."""
    device.message("reset")
    read_direct(device.node, 0, MIB)
    return counters(device)[0]


tap = Tap()
tap.attempt("module loads", load)
tap.result("v1.2.3" in [line.split()[1] for line in run("dmsetup", "targets").splitlines()
                        if line.startswith("rust-linear ")], "target is registered")
with Devices() as devices:
    lower, _ = loop(devices, os.urandom(2 * MIB))
    length = sectors(lower) - START - 5
    BYTES = length * 512
    linear = twin(f"0 {length} linear {lower} {START}", "t-linear")
    devices.undo(linear.remove)

    def new(options=""):
        return twin(f"0 {length} rust-linear {lower} {START} {options}".rstrip())

    with new() as device:
        check_read(tap, "reads equal dm-linear's", device.node)
        check_read(tap, "reads of one sector equal dm-linear's", device.node, 512)
        check_write(tap, "writes arrive", device.node)
        check_balanced(tap, "each bio has ended, with its data", device)
    for split in (1, 3, 8, 100):
        with new(f"2 split {split}") as device:
            check_read(tap, f"split at {split}: reads", device.node, MIB)
            check_write(tap, f"split at {split}: writes", device.node, MIB)
    with new("2 split 8") as device:
        tap.equal(bios(device), 256, "split at 8: number of bios")
    with new("2 max_io_len 16") as device:
        tap.equal(bios(device), 128, "max_io_len 16: number of bios")
    for way in ("defer", "queue"):
        with new(f"1 {way}") as device:
            check_read(tap, f"{way}: reads", device.node)
            check_write(tap, f"{way}: writes", device.node)
            check_balanced(tap, f"{way}: each bio has ended, with its data", device)
    with new("1 zero") as device:
        tap.result(read(device.node) == bytes(BYTES), "zero: reads are zeros")
    for status in ("kill", "ioerr", "medium", "drop"):
        with new(f"2 fail {status}") as device:
            try:
                read_direct(device.node, 0, 4 * KIB)
            except OSError:
                tap.result(True, f"fail {status}: read fails")
            else:
                tap.result(False, f"fail {status}: read fails")

    # Two targets in one device: each sees its own sectors.
    half = length // 2 // 8 * 8
    with twin(f"0 {half} rust-linear {lower} {START} 2 split 7\n"
              f"{half} {length - half} rust-linear {lower} {START + half} 1 queue") as device:
        check_read(tap, "two targets: reads", device.node, MIB)
        check_write(tap, "two targets: writes", device.node, MIB)
        with open(device.node, "r+b", buffering=0) as file:
            file.write(bytes(4 * KIB))
            tap.attempt("flush reaches the target", os.fsync, file.fileno())
tap.attempt("module unloads", unload)
tap.finish()
