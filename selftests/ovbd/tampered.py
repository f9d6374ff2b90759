#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Damaged layers of a sealed stack below dm-verity, plain and compressed without checksums: each block reads as it was
sealed or is an error, whatever was changed. OVBD_MUTANTS= of each kind."""

import contextlib
import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import zfile_writer
from block_devices import read_direct
from ovbd_command import make_image, ovbd
from sealed_stacks import BLOCK, verity_table
from test_script import SCRATCH, Tap, load, run

BYTES = 64 * BLOCK
MUTANTS = int(os.environ.get("OVBD_MUTANTS", "60"))
KINDS = {"plain": ["--format", "lsmt"], "compressed": ["--no-crc"]}


def ram_disk(number):
    return f"/dev/ram{number}"


def mutated(blob, generator):
    """A blob with some bytes changed: anywhere, or in a structure at one of its ends."""
    blob = bytearray(blob)
    for _ in range(generator.choice((1, 1, 1, 2, 8))):
        place = generator.randrange(len(blob))
        if generator.randrange(3) == 0:
            place = generator.choice((place % 512, len(blob) - 1 - place % 8192)) % len(blob)
        length = generator.choice((1, 1, 1, 4, 16, 512))
        if generator.randrange(2):
            blob[place] ^= 1 << generator.randrange(8)
        else:
            blob[place:place + length] = generator.randbytes(len(blob[place:place + length]))
    return bytes(blob)


def write(number, blob):
    with open(ram_disk(number), "r+b", buffering=0) as disk:
        disk.write(blob + bytes(-len(blob) % 512))
        os.fsync(disk.fileno())


def attempt(kind, blobs, root, image):
    """The blocks of a stack that are wrong, and how many can be read at all; None where it cannot be mapped."""
    with contextlib.ExitStack() as devices:
        def mapped(name, table):
            return devices.enter_context(dm_ioctl.Mapped(name, table)).node

        try:
            table = f"0 {len(image) // 512} overlaybd {len(blobs)}"
            for number, blob in enumerate(blobs):
                node, length = ram_disk(number), len(blob)
                if kind == "compressed":
                    length = zfile_writer.original_bytes(blob)
                    node = mapped(f"zfile{number}", f"0 {-(-length // 512)} zfile {node} {len(blob)}")
                table += f" {node} {length}"
            stack = mapped("stack", table)
            device = mapped("checked", verity_table(stack, BYTES, image[BYTES:], root))
        except OSError:
            return None
        wrong, read = [], 0
        for block in range(BYTES // BLOCK):
            try:
                data = read_direct(device, block * BLOCK, BLOCK)
            except OSError:
                continue
            read += 1
            if data != image[block * BLOCK:][:BLOCK]:
                wrong.append(block)
        return wrong, read


def mutants(tap, kind, options):
    """All mutants of one kind of layers."""
    generator = random.Random(f"sealed {kind}")
    raw, base, seal, export = (SCRATCH / f"{kind}.{end}" for end in ("raw", "base", "seal", "export"))
    make_image(raw, generator, BYTES)
    ovbd("build", *options, "-o", base, raw)
    root, _ = ovbd("seal", *options, "-o", seal, base).split()
    ovbd("export", base, seal, "-o", export)
    image = export.read_bytes()
    blocks = BYTES // BLOCK
    blobs = [base.read_bytes(), seal.read_bytes()]
    for number, blob in enumerate(blobs):
        write(number, blob)
    tap.equal(attempt(kind, blobs, root, image), ([], blocks), f"{kind}: undamaged, all of it can be read")
    wrong, unmapped, partly, whole = [], 0, 0, 0
    for number in range(MUTANTS):
        which = generator.randrange(3) // 2
        damaged = list(blobs)
        damaged[which] = mutated(blobs[which], generator)
        write(which, damaged[which])
        result = attempt(kind, blobs, root, image)
        write(which, blobs[which])
        if result is None:
            unmapped += 1
            continue
        if result[0]:
            wrong.append((number, result[0]))
        partly += result[1] < blocks
        whole += result[1] == blocks
    print(f"# {kind}: {unmapped} of {MUTANTS} could not be mapped, {partly} in part unreadable, {whole} read as before")
    tap.equal(wrong, [], f"{kind}: no wrong block in {MUTANTS} mutants")
    tap.result(unmapped and partly and whole, f"{kind}: there were mutants of every sort")


def main(tap):
    load("dm-overlaybd", "dm-zfile")
    run("modprobe", "dm-verity")
    run("modprobe", "brd", "rd_nr=2", f"rd_size={1 << 10}")
    for kind, options in KINDS.items():
        mutants(tap, kind, options)
    run("rmmod", "brd")


tap = Tap()
main(tap)
tap.finish()
