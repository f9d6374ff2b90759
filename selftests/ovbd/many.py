#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Stacks of very many compressed layers: how long `ovbd up`, `ls` and `down` take, beside bare devices, and how many devices
there are."""

import os
import pathlib
import random
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import sha256
from ovbd_command import existing, listed, ovbd, settled
from test_script import SCRATCH, Tap, load

# Larger ones are copied, which is no cost of the kernel's.
dm_ioctl.BUFFER = 1024
LAYERS = 255
SIZE = 1 << 20


def timed(*words):
    """What `ovbd` prints and the seconds it takes."""
    start = time.monotonic()
    said = ovbd(*words)
    return said, time.monotonic() - start


def make_layers():
    """Layers that each own a few blocks, in files whose length is no multiple of a sector where it happens so; and the
    image of the first 100 and of all."""
    generator = random.Random("many")
    image = bytearray(SIZE)
    layers, images = [], {}
    for number in range(LAYERS):
        raw, layer = SCRATCH / "raw", SCRATCH / f"{number}.layer"
        part = bytearray(SIZE)
        for _ in range(4):
            at = generator.randrange(SIZE // 4096) * 4096
            block = generator.randbytes(generator.randrange(64, 4000)).ljust(4096, b"x")
            part[at:at + 4096] = image[at:at + 4096] = block
        raw.write_bytes(part)
        ovbd("build", "--uuid", f"{number:08x}-0000-0000-0000-000000000000", "-o", layer, raw)
        layers.append(layer)
        if number + 1 in (100, LAYERS):
            images[number + 1] = SCRATCH / f"{number + 1}.raw"
            images[number + 1].write_bytes(image)
    return layers, images


def bare(count):
    """The seconds that it takes to make and to remove as many devices that do nothing, by ioctl and one after the
    other: what the kernel costs."""
    start = time.monotonic()
    devices = [dm_ioctl.Mapped(f"bare{number}", "0 8 zero") for number in range(count)]
    made = time.monotonic()
    for device in devices:
        device.remove()
    return made - start, time.monotonic() - made


def check(tap, layers, image):
    count = len(layers)
    odd = sum(layer.stat().st_size % 512 != 0 for layer in layers)
    before = existing()
    device, up = timed("up", "many", *layers)
    mapped = [name for name in existing() if name.startswith("many")]
    tap.equal(len(mapped), 1 + count + odd, f"{count} layers: mapped devices")
    tap.result(sha256(device.strip()) == sha256(image), f"{count} layers: content")
    tap.equal([layer["path"] for layer in listed("many")["layers"]], list(map(str, layers)), f"{count} layers: ls")
    ls = timed("ls")[1]
    down = timed("down", "many")[1]
    tap.equal(settled(before), before, f"{count} layers: down leaves nothing")
    # Other tests may have left nodes of devices that went by themselves.
    nodes = [node.name for node in pathlib.Path("/dev/mapper").iterdir() if node.name.startswith("many")]
    tap.equal(nodes, [], f"{count} layers: no node")
    make, remove = bare(len(mapped))
    print(f"# {count} compressed layers, {len(mapped)} mapped devices: up {up:.2f} s, ls {ls:.2f} s, down {down:.2f} s; "
          f"as many dm-zero: make {make:.2f} s, remove {remove:.2f} s", flush=True)


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
layers, images = make_layers()
for count, image in images.items():
    check(tap, layers[:count], image)
tap.finish()
