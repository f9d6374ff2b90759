# SPDX-License-Identifier: GPL-2.0
"""Snapshots of a thin volume and of a classic one, with random writes and discards between them, go from one volume group to
another and back: each holds the same on both sides, and each is one layer on top of the one before.

Of the thin volume every few snapshots the other side goes on from what it pulled. The classic volume goes out, in snapshots
that are compared by the exceptions of the one before; what the other side makes of it in its thin pool comes back as a stack
over layers in volumes.
"""

import json
import random

from block_devices import Devices, sha256
from ovbd_command import ovbd
from test_script import load, run
from volumes import LAYOUT, MIB, Group, image_content, left, overwrite_random, push, set_up_lvm, write_random

THIN, CLASSIC = 32 * MIB, 24 * MIB


def _pull(name, target):
    """Pulls from the layout into a pool; returns what was said."""
    return json.loads(ovbd("pull", "--json", "--thin", target, f"oci:{LAYOUT}:{name}"))


def _check(tap, what, pushed, layers, base):
    """Passes where what was pushed is one more layer on top of `base`, and little was read for it."""
    tap.equal((pushed["layers"], pushed["base"]), (layers, base), f"{what}: one layer more, on top of the one before")
    if base:
        tap.result(pushed["read"] <= 2 * pushed["changed"], f"{what}: only what changed is read", pushed)


def _thin(tap, sides, generator, count, turn):
    """Each side in turn changes a writable snapshot of what it has, and pushes; the other one pulls."""
    sides[0].thin("web", THIN // MIB)
    write_random(sides[0].node("web"), generator, THIN, 60)
    volume = "web"
    # The volume on each side that is the image of the last snapshot.
    images = [None, None]
    for number in range(count):
        own, other = (number // turn) % 2, 1 - (number // turn) % 2
        writer, reader = sides[own], sides[other]
        what = f"thin snapshot {number}"
        if number and number % turn == 0:
            volume = f"turn{number}"
            run("lvcreate", "--snapshot", "--setactivationskip", "n", "--name", volume, f"{writer.name}/{images[own]}")
        if number:
            write_random(writer.node(volume), generator, THIN, 15)
        pushed = push(f"thin{number}", f"--snapshot=s{number}", f"{writer.name}/{volume}")
        _check(tap, what, pushed, number + 1, images[own] and f"{writer.name}/{images[own]}")
        pulled = _pull(f"thin{number}", f"{reader.name}/pool/web")
        tap.equal(pulled["base"], images[other] and f"{reader.name}/{images[other]}", f"{what}: pulled on top of the one before")
        images[own], images[other] = f"s{number}", pulled["volume"].split("/")[1]
        tap.equal(reader.sha256(images[other]), writer.sha256(images[own]), f"{what}: both sides hold the same")
        tap.equal(left(reader) + left(writer), [], f"{what}: nothing is left")
    tap.equal(image_content(f"thin{count - 1}"), (THIN, sides[own].sha256(images[own])), "and so does the last image")


def _classic(tap, sides, generator, count, back):
    """Classic snapshots of the first side, then changes of the second."""
    first, second = sides
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", f"{CLASSIC}b", "--name", "plain", first.name)
    overwrite_random(first.node("plain"), generator, CLASSIC, 200)
    image = None
    for number in range(count):
        what = f"classic snapshot {number}"
        if number:
            overwrite_random(first.node("plain"), generator, CLASSIC, 15)
            run("blkdiscard", "--zeroout", "--offset", str(generator.randrange(CLASSIC // MIB) * MIB), "--length", "65536",
                first.node("plain"))
        run("lvcreate", "--snapshot", "--permission", "r", "--size", "8m", "--name", f"c{number}", f"{first.name}/plain")
        pushed = push(f"plain{number}", f"{first.name}/c{number}")
        _check(tap, what, pushed, number + 1, f"{first.name}/c{number - 1}" if number else None)
        pulled = _pull(f"plain{number}", f"{second.name}/pool/plain")
        tap.equal(pulled["base"], image, f"{what}: pulled on top of the one before")
        image = pulled["volume"]
        tap.equal(second.sha256(image.split("/")[1]), first.sha256(f"c{number}"), f"{what}: both sides hold the same")
        if number:
            run("lvremove", "--yes", f"{first.name}/c{number - 1}")
    run("lvcreate", "--snapshot", "--setactivationskip", "n", "--name", "back", image)
    before = image
    for number in range(count, count + back):
        what = f"way back {number}"
        write_random(second.node("back"), generator, CLASSIC, 15)
        pushed = push(f"plain{number}", f"--snapshot=b{number}", f"{second.name}/back")
        _check(tap, what, pushed, number + 1, before)
        before = f"{second.name}/b{number}"
        ovbd("pull", "--vg", first.name, "--up", "plain-stack", f"oci:{LAYOUT}:plain{number}")
        tap.equal(sha256("/dev/mapper/plain-stack"), second.sha256(f"b{number}"), f"{what}: both sides hold the same")
        ovbd("down", "plain-stack")
    tap.equal(left(second), [], "nothing is left")


def series(tap, thin, turn, classic, back):
    """`thin` snapshots of a thin volume, of which each side makes `turn` before it is the other's turn; `classic` ones of a classic
    volume, and `back` of what the other side makes of that."""
    set_up_lvm()
    load("dm-overlaybd", "dm-zfile")
    generator = random.Random("series")
    with Devices() as devices:
        sides = Group(devices, "vg-a.b", 500), Group(devices, "vg_2", 500)
        sides[0].pool("pool", 300, "--chunksize", "64k")
        sides[1].pool("pool", 300, "--chunksize", "128k")
        _thin(tap, sides, generator, thin, turn)
        _classic(tap, sides, generator, classic, back)
