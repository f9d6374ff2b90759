#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Damaged images on both targets: each is activated, read and removed, and the kernel must agree with the tools
about every sector. The work is done by tools/mutants; here are the devices that it asks for. OVBD_MUTANTS says how
many there are of each base, OVBD_FIRST_MUTANT where to start.

To make and remove a device is for the most part waiting. So several programs share the bases, each with a process of
this script that serves it, as `mutants.py PART`."""

import contextlib
import os
import re
import subprocess
import sys
import threading

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices
from dm_ioctl import Mapped
from fixture_cases import FIXTURES
from test_script import SCRATCH, SOURCE, load

PARTS = 4
# More than any base has.
LAYERS = 4
LAYER_BYTES = 1 << 20
RESULT = re.compile(r"((?:not )?ok) \d+ (.*)", re.DOTALL)


def answer(program, part):
    """Makes and removes the mapped devices that the program asks for, prints what else it says."""
    devices = {}
    for line in program.stdout:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "create":
            name, sectors, target = rest.split(" ", 2)
            try:
                devices[name] = Mapped(f"{name}-of-{part}", f"0 {sectors} {target}")
                said = f"ok {devices[name].node}"
            except OSError as error:
                said = f"refused {error.strerror}"
        elif word == "remove":
            devices.pop(rest).remove()
            said = "ok"
        else:
            print(line, end="", flush=True)
            continue
        # A program that has ended says why in what is left to read.
        with contextlib.suppress(BrokenPipeError):
            program.stdin.write(said + "\n")
            program.stdin.flush()


def serve(part):
    """Runs the program for one part of the bases; returns its exit status."""
    with Devices() as devices:
        slots = []
        for number in range(LAYERS):
            file = SCRATCH / f"layer{number}-of-{part}"
            file.write_bytes(bytes(LAYER_BYTES))
            slots.append(f"{file}={devices.loop(file)}")
        program = subprocess.Popen([SOURCE / "tools/target/release/ovbd-mutants", "run",
                                    os.environ.get("CASES") or FIXTURES, os.environ.get("OVBD_FIRST_MUTANT", "0"),
                                    os.environ.get("OVBD_MUTANTS", "22"), f"{part}/{PARTS}", *slots],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer(program, part)
        return program.wait()


def main():
    """Serves all parts at once and makes one list of their results; returns an exit status."""
    load("loop", "dm-zfile", "dm-overlaybd")
    count = 0
    printing = threading.Lock()

    def collect(output):
        nonlocal count
        for line in output:
            if line.startswith(("1..", "TAP version")):
                continue
            with printing:
                if result := RESULT.fullmatch(line):
                    count += 1
                    line = f"{result[1]} {count} {result[2]}"
                print(line, end="", flush=True)

    parts = [subprocess.Popen([sys.executable, __file__, str(part)], stdout=subprocess.PIPE, text=True)
             for part in range(PARTS)]
    threads = [threading.Thread(target=collect, args=[part.stdout]) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [part.wait() for part in parts]
    print(f"1..{count}")
    return 1 if any(failed) else 0


if len(sys.argv) > 1:
    sys.exit(serve(int(sys.argv[1])))
sys.exit(main())
