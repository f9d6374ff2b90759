#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What an administrator sees of a target: table, status, messages, limits, and the error for each bad table line."""

import os
import pathlib
import re
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices, sectors
from dm_ioctl import KernelLog, Mapped, table_refused
from linear_twin import load, loop, twin, unload
from test_script import CommandFailed, Tap, run

NAME = "t-rust"
INVALID = "(-EINVAL)"
# What the log says, and the words after "rust-linear".
BAD_LINES = [
    (f"Missing device {INVALID}", ""),
    *((f"Invalid device sector {INVALID}", f"LOWER {start}".rstrip())
      for start in ("", "-1", "+1", "0x1", "1x", "1.0", 1 << 64, "9" * 26)),
    ("Device lookup failed (-ENOENT)", "/dev/nonexistent 0"),
    ("Device lookup failed", "99:99 0"),
    ("/dev/nonexistent: cannot open: ENOENT", "/dev/nonexistent 0"),
    ("Device lookup failed", "/dev/null 0"),
    *((f"Invalid number of optional arguments {INVALID}", f"LOWER 0 {count}") for count in ("x", "-1", "1001")),
    (f"Not enough arguments in group {INVALID}", "LOWER 0 1"),
    (f"Not enough arguments in group {INVALID}", "LOWER 0 3 split 8"),
    (f"Too many arguments {INVALID}", "LOWER 0 1 defer defer"),
    (f"Too many arguments {INVALID}", "LOWER 0 0 defer"),
    (f"Unrecognised optional argument {INVALID}", "LOWER 0 1 unknown"),
    (f"Invalid split size {INVALID}", "LOWER 0 1 split"),
    (f"Invalid split size {INVALID}", "LOWER 0 2 split 4294967296"),
    (f"Missing status {INVALID}", "LOWER 0 1 fail"),
    (f"Invalid status {INVALID}", "LOWER 0 2 fail well"),
    (f"Invalid maximum I/O length {INVALID}", "LOWER 0 2 max_io_len 4294967296"),
    (f"Table must be read-only (dmsetup create --readonly) {INVALID}", "LOWER 0 1 readonly"),
]


def dmsetup(verb, *words):
    """What dmsetup says of the device."""
    return run("dmsetup", verb, NAME, *words).strip()


def number(device):
    found = os.stat(device).st_rdev
    return f"{os.major(found)}:{os.minor(found)}"


def limit(node, name):
    return int(pathlib.Path("/sys/block", os.path.basename(node), "queue", name).read_text())


def check_tables(tap, lower):
    options = "15 split 8 queue requeue 3 io_opt 65536 max_io_len 64 read 0 512 read 1 4096"
    with twin(f"0 2048 rust-linear {lower} 16 {options}"):
        tap.equal(dmsetup("table"), f"0 2048 rust-linear {number(lower)} 16 {options}",
                  "table names the device by number and lists the options")
    for options in ("", "1 defer", "2 fail medium", "2 fail drop", "3 read 100 5000", "4 io_opt 8192 split 1"):
        with twin(f"0 2048 rust-linear {lower} 16 {options}".rstrip()) as device:
            table = dmsetup("table")
            run("dmsetup", "reload", NAME, "--table", table)
            device.suspend()
            device.resume()
            tap.equal(dmsetup("table"), table, f"reloads verbatim: '{options}'")
    # Longer than the first buffer of dmsetup: 200 checksums, and a table of 4 kB.
    reads = " ".join(f"read {start} 512" for start in range(1000, 1200))
    with twin(f"0 8 rust-linear {lower} 0 600 {reads}"):
        tap.equal(len(dmsetup("status").split()), 211, "200 checksums in the status")
        tap.equal(dmsetup("table"), f"0 8 rust-linear {number(lower)} 0 600 {reads}", "200 reads in the table")


def check_status(tap, lower):
    with twin(f"0 2048 rust-linear {lower} 16 2 io_opt 65536") as device:
        status = dmsetup("status")
        tap.result(re.fullmatch(r"0 2048 rust-linear( \d+){8}", status), "status has eight counters", status)
        tap.equal(dmsetup("measure"), "0 2048 rust-linear target_name=rust-linear,target_version=1.2.3,"
                                      f"device_name={number(lower)},start=16;", "IMA measurement")
        tap.equal(" ".join(dmsetup("deps").split()), f"1 dependencies : ({number(lower).replace(':', ', ')})",
                  "device is a dependency")
        tap.equal(limit(device.node, "optimal_io_size"), 65536, "io_opt is in the limits")
        tap.equal(dmsetup("message", 0, "echo one two three"), "one two three", "message with a reply")
        words = " ".join(f"word{number:04}" for number in range(1, 4001))
        tap.equal(dmsetup("message", 0, f"echo {words}"), words, "reply of 36 kB is complete")
        tap.equal(dmsetup("message", 0, "reset"), "", "message without a reply")
        for what, words in (("unknown message", "unknown"), ("message with too many arguments", "reset now")):
            try:
                dmsetup("message", 0, words)
            except CommandFailed:
                tap.result(True, f"{what}: refused")
            else:
                tap.result(False, f"{what}: refused")


def check_refusals(tap, log, lower, lower4k):
    for reason, words in BAD_LINES:
        words = words.replace("LOWER", lower)
        line = f"0 8 rust-linear {words}".rstrip()
        table_refused(tap, log, line, line, f"rust-linear: {reason}", readonly=False)
    with Mapped(NAME, f"0 8 rust-linear {lower} 0 1 readonly") as device:
        tap.equal(run("blockdev", "--getro", device.node).strip(), "1", "loads read-only")
    # iterate_devices: device mapper knows what is used.
    size = sectors(lower)
    for start, length in ((0, size + 1), (1, size), (size, 1), ((1 << 64) - 8, 8)):
        line = f"0 {length} rust-linear {lower} {start}"
        table_refused(tap, log, line, line, "too small for target", readonly=False)
    with twin(f"0 {size} rust-linear {lower} 0"):
        tap.result(True, "whole device")
    table_refused(tap, log, "start is not a multiple of the logical block", f"0 8 rust-linear {lower4k} 1",
                  "not aligned to h/w logical block size 4096", readonly=False)
    with twin(f"0 8 rust-linear {lower4k} 8") as device:
        tap.equal(limit(device.node, "logical_block_size"), 4096, "logical block size of the device")


tap = Tap()
log = KernelLog()
tap.attempt("module loads", load)
with Devices() as devices:
    lower, _ = loop(devices, os.urandom(2 << 20))
    lower4k, _ = loop(devices, os.urandom(2 << 20), "--sector-size", 4096)
    check_tables(tap, lower)
    check_status(tap, lower)
    check_refusals(tap, log, lower, lower4k)
    tap.attempt("module unloads", unload)
    tap.attempt("module loads with a parameter", load, "max_reads=1")
    with twin(f"0 8 rust-linear {lower} 0 3 read 0 1"):
        tap.result(True, "one read")
    table_refused(tap, log, "two reads", f"0 8 rust-linear {lower} 0 6 read 0 1 read 0 1",
                  f"rust-linear: Too many read options {INVALID}", readonly=False)
    tap.equal(os.listdir(f"/sys/block/{os.path.basename(lower)}/holders"), [], "nothing is left open")
tap.finish()
