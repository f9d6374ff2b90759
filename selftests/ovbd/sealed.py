#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A sealed stack below the kernel's dm-verity, as veritysetup opens it: the content is the image's, a changed byte is an
error for its block alone, and with another root there is no content at all."""

import os
import pathlib
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import sha256
from ovbd_command import MIB, existing, ovbd, settled
from sealed_stacks import BLOCK, failed_blocks, flip
from test_script import SCRATCH, Tap, load, run

SIZE = 5 * MIB
DEVICE = pathlib.Path("/dev/mapper/sealed")
CHECKED = pathlib.Path("/dev/mapper/checked")
# A block of the image, which is not in the first window that is read.
CHANGED = 700


def failed(device):
    """The blocks that cannot be read."""
    return failed_blocks(device, SIZE)


def opened(root, layers, look):
    """What `look` says of the checked device."""
    ovbd("up", "sealed", *layers)
    run("veritysetup", "open", "--root-hash-file", root, "--hash-offset", str(SIZE), DEVICE, "checked", DEVICE)
    try:
        return look(CHECKED)
    finally:
        run("veritysetup", "close", "checked")
        ovbd("down", "sealed")


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile", "dm-verity")
    raw, base, seal = SCRATCH / "raw", SCRATCH / "base.layer", SCRATCH / "seal.zfile"
    generator = random.Random("sealed")
    raw.write_bytes(generator.randbytes(SIZE))
    before = existing()
    # Without checksums of its own.
    ovbd("build", "--format", "lsmt", "-o", base, raw)
    root, data = ovbd("seal", "-o", seal, base).split()
    tap.equal(int(data), SIZE, "bytes of the image")
    root_file = SCRATCH / "seal.zfile.roothash"
    tap.equal(root_file.read_text(), root, "the file with the root hash")
    layers = [base, seal]
    tap.equal(opened(root_file, layers, sha256), sha256(raw), "what dm-verity has checked is the image")

    wrong = SCRATCH / "wrong.roothash"
    wrong.write_text(f"{int(root[0], 16) ^ 1:x}{root[1:]}")
    tap.equal(opened(wrong, layers, failed), list(range(SIZE // BLOCK)), "another root: nothing can be read")

    # Behind the header.
    flip(base, (1 + CHANGED) * BLOCK + 7)
    tap.equal(opened(root_file, layers, failed), [CHANGED], "a changed byte is an error for its block alone")

    changed = bytearray(raw.read_bytes())
    changed[:BLOCK] = generator.randbytes(BLOCK)
    # As it is in the base now.
    changed[CHANGED * BLOCK + 7] ^= 1
    raw.write_bytes(changed)
    following, again = SCRATCH / "next.zfile", SCRATCH / "again.zfile"
    ovbd("build", "--base", *layers, "-o", following, raw)
    ovbd("seal", "-o", again, *layers, following)
    layers += [following, again]
    tap.equal(opened(SCRATCH / "again.zfile.roothash", layers, sha256), sha256(raw), "a stack that was sealed again")
    tap.equal(settled(before), before, "no device is left")


tap = Tap()
main(tap)
tap.finish()
