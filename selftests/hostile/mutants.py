#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Damaged images on both targets: each is activated, read and removed, and the kernel must agree with the tools
about every sector. The work is done by tools/mutants; here are the devices that it asks for. OVBD_MUTANTS says how
many there are of each base, OVBD_FIRST_MUTANT where to start."""

import os
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests")
from cases import FIXTURES
from devices import SCRATCH, SOURCE, Devices, load
from dm import Mapped

# More than any base has.
LAYERS = 4
LAYER_BYTES = 1 << 20
UDEVD = "/usr/lib/systemd/systemd-udevd"


def serve(program):
    """Makes and removes the mapped devices that the program asks for, prints what else it says."""
    devices = {}
    for line in program.stdout:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "create":
            name, sectors, target = rest.split(" ", 2)
            try:
                devices[name] = Mapped(name, f"0 {sectors} {target}")
                answer = f"ok {devices[name].node}"
            except OSError as error:
                answer = f"refused {error.strerror}"
        elif word == "remove":
            devices.pop(rest).remove()
            answer = "ok"
        else:
            print(line, end="", flush=True)
            continue
        program.stdin.write(answer + "\n")
        program.stdin.flush()


load("loop", "dm-zfile", "dm-overlaybd")
# Thousands of devices come and go; for udev to look at each would take most of the time.
had_udev = subprocess.run(["udevadm", "control", "--exit"], stderr=subprocess.DEVNULL).returncode == 0
with Devices() as devices:
    slots = []
    for number in range(LAYERS):
        file = SCRATCH / f"layer{number}"
        file.write_bytes(bytes(LAYER_BYTES))
        slots.append(f"{file}={devices.loop(file)}")
    program = subprocess.Popen([SOURCE / "tools/target/release/ovbd-mutants", "run",
                                os.environ.get("CASES") or FIXTURES, os.environ.get("OVBD_FIRST_MUTANT", "0"),
                                os.environ.get("OVBD_MUTANTS", "55"), *slots],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    serve(program)
    status = program.wait()
if had_udev:
    subprocess.run([UDEVD, "--daemon"], check=True)
sys.exit(status)
