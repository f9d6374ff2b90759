#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A boot partition, which is FAT, after each verb that changes it, as the disk has it if the power goes right then: what is
in memory of the file system is not on it. Each entry is whole, and the kernel that it names."""

import json
import os
import pathlib
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from ovbd_command import MIB, mounted, ovbd
from test_script import SCRATCH, Tap, load, run

DISK, STORE = SCRATCH / "disk", SCRATCH / "store"
KERNEL = os.urandom(MIB)


def whole(path):
    """The entries of a boot partition by their numbers, and what is wrong with those that there are."""
    numbers, wrong = set(), []
    for entry in (path / "loader/entries").glob("ovbd-*.conf"):
        lines = dict(line.split(maxsplit=1) for line in entry.read_text().splitlines() if not line.startswith("#"))
        numbers.add(int(entry.name.split("-")[2].split("+")[0].removesuffix(".conf")))
        files = [(path / lines.get(kind, "none").lstrip("/")) for kind in ("linux", "initrd")]
        if not all(file.is_file() and file.read_bytes() == KERNEL for file in files):
            wrong.append(f"{entry.name}: {lines}")
    return numbers, wrong


def main(tap):
    load("loop", "vfat")
    for number in (1, 2, 3):
        (SCRATCH / "raw").write_bytes(os.urandom(64 << 10))
        ovbd("build", "-q", "-f", "-o", SCRATCH / "layer", SCRATCH / "raw")
        ovbd("push", "-q", SCRATCH / "layer", f"oci:{STORE}:h.x/vm/root:{number}")
    (SCRATCH / "kernel").write_bytes(KERNEL)
    with open(DISK, "wb") as disk:
        disk.truncate(48 * MIB)
    run("mkfs.vfat", "-F", "32", DISK)
    kernel = ["--linux", SCRATCH / "kernel", "--initrd", SCRATCH / "kernel"]
    with mounted(DISK, "-o", "loop") as top:
        place = ["--boot", top, "--store", STORE]
        for numbers, words in (({1}, ["init", "--device", "LABEL=x", *kernel, "h.x/vm/root:1"]),
                               ({1, 2}, ["add", *kernel, "h.x/vm/root:2"]), ({1, 2}, ["rollback"]), ({1, 2}, ["rollback"]),
                               ({1, 2, 3}, ["add", *kernel, "h.x/vm/root:3"]), ({1, 2, 3}, ["set-default", "1"]),
                               ({1, 2}, ["prune", "3"])):
            ovbd("system", words[0], "-q", *place, *words[1:])
            listed = {entry["number"] for entry in json.loads(ovbd("system", "list", "--json", *place))}
            run("cp", DISK, SCRATCH / "copy")
            with mounted(SCRATCH / "copy", "-o", "loop,ro") as copy:
                tap.equal((listed, *whole(copy)), (numbers, numbers, []), f"the power goes after {words[0]}")


tap = Tap()
main(tap)
tap.finish()
