#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Fifty generations: writes to a device, `ovbd commit`, and a new device with one layer more, which must have exactly
what a model of the writes has."""

import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct
from lsmt_writer import SECTOR
from ovbd_command import existing, make_image, ovbd, settled
from test_script import SCRATCH, Tap, load

ROUNDS = 50
SIZE = 3 << 20
# A stack of this many layers is flattened to one.
MOST = 8
FORMATS = [["--format", "lsmt"], ["--format", "lsmt"], ["--format", "lsmt", "--tar"], ["--algo", "zstd"], ["--tar"]]


def write(device, model, generator):
    """Some writes of sectors, of random bytes and of zeros, overlapping now and then."""
    with open(device, "r+b", buffering=0) as file:
        for _ in range(generator.randrange(1, 30)):
            length = generator.choice([1, 1, 3, 8, 16, 64, 200]) * SECTOR
            start = generator.randrange((SIZE - length) // SECTOR + 1) * SECTOR
            data = generator.choice([generator.randbytes, bytes])(length)
            file.seek(start)
            file.write(data)
            model[start:start + length] = data
        os.fsync(file)


def flatten(paths, number):
    """One layer with the content of all."""
    raw, layer = SCRATCH / "flat.raw", SCRATCH / f"flat{number}.layer"
    ovbd("export", "--force", "-o", raw, *paths)
    ovbd("build", "--format", "lsmt", "-o", layer, raw)
    for path in paths:
        path.unlink()
    return [layer]


def run_rounds(tap, model, paths, generator):
    """Returns the layers of the last generation."""
    for number in range(ROUNDS):
        if len(paths) >= MOST:
            paths = flatten(paths, number)
        cow = SCRATCH / "cow"
        device = ovbd("up", "--writable", "--cow", cow, "round", *paths).strip()
        same = read_direct(device, 0, SIZE) == model
        tap.result(same, f"generation {number}: {len(paths)} layers have the content of the model")
        write(device, model, generator)
        paths.append(SCRATCH / f"{number}.layer")
        ovbd("commit", *generator.choice(FORMATS), "-o", paths[-1], "round")
        ovbd("down", "round")
        cow.unlink()
    return paths


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
generator = random.Random(6)
raw = SCRATCH / "raw"
make_image(raw, generator, SIZE)
model = bytearray(raw.read_bytes())
paths = [SCRATCH / "base.layer"]
ovbd("build", "-o", paths[0], raw)
before = existing()
paths = run_rounds(tap, model, paths, generator)
device = ovbd("up", "round", *paths).strip()
tap.result(read_direct(device, 0, SIZE) == model, f"generation {ROUNDS}: content")
ovbd("down", "round")
tap.equal(settled(before), before, "no device is left")
tap.attempt("the last stack passes ovbd verify", ovbd, "verify", *paths)
tap.finish()
