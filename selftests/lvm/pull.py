#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Snapshots of a thin volume are pushed by one volume group and pulled by another: they hold the same, only what is missing
is written, and it works in both directions."""

import json
import pathlib
import random
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd, ovbd_fails
from test_script import Tap, run
from volumes import LAYOUT, MIB, Group, left, push, set_up_lvm, write_random

SIZE = 48
tap = Tap()


def pull(name, target):
    """Pulls from the layout; returns what was said."""
    return json.loads(ovbd("pull", "--json", "--thin", target, f"oci:{LAYOUT}:{name}"))


def same(what, first, volume, second, said):
    """Passes where two volumes hold the same, and the second is a read-only image that nobody uses."""
    name = said["volume"].split("/")[1]
    tap.equal(second.sha256(name), first.sha256(volume), f"{what}: both hold the same")
    row = second.fields(name)
    tap.equal((row["lv_permissions"], row["lv_active"]), ("read-only", ""), f"{what}: read-only, not active")
    tap.equal(left(second), [], f"{what}: nothing is left")


def forth(first, second, count):
    """Snapshots of the first group, each pulled by the second; volumes that grow and shrink."""
    generator = random.Random("pull")
    size = SIZE * MIB
    write_random(first.node("web"), generator, size, 50)
    for number in range(count):
        if number == 3:
            size += 16 * MIB
            run("lvextend", "--quiet", "--size", f"{size}b", f"{first.name}/web")
        if number == 6:
            size -= 24 * MIB
            run("lvreduce", "--yes", "--force", "--size", f"{size}b", f"{first.name}/web")
        if number == 8:
            size += 32 * MIB
            run("lvextend", "--quiet", "--size", f"{size}b", f"{first.name}/web")
        if number:
            write_random(first.node("web"), generator, size, 10)
        pushed = push(number, f"--snapshot=web.{number}", f"{first.name}/web")
        said = pull(number, f"{second.name}/pool/web")
        same(f"snapshot {number}", first, f"web.{number}", second, said)
        if number:
            tap.result(said["base"] is not None, f"snapshot {number} is pulled on top of the one before", said)
            # Zeros that are no whole chunk of this pool are written. Those beyond the end of a smaller volume are not there.
            tap.result(said["written"] + said["discarded"] <= pushed["data"] + pushed["zeroed"],
                       f"snapshot {number}: only its layer is written", (said, pushed))
        tap.equal(said["writable"], None if number else f"{second.name}/web", f"snapshot {number}: the writable volume")


def back(first, second):
    """The second group changes what it pulled, and the first pulls that."""
    write_random(second.node("web"), random.Random("back"), 20 * MIB, 20)
    pushed = push("back", "--snapshot=changed", f"{second.name}/web")
    tap.result(pushed["base"].startswith(f"{second.name}/web."), "what was pulled is the base of the next push", pushed)
    said = pull("back", f"{first.name}/pool/returned")
    same("the way back", second, "changed", first, said)
    tap.equal(said["base"], f"{first.name}/web.0", "on top of the snapshot that both have")
    tap.equal(first.sha256("returned"), second.sha256("changed"), "the writable volume holds the same")


def again(second):
    """What is there is not written again, and what is in the way stays."""
    said = pull("0", f"{second.name}/pool/web")
    tap.equal((said["written"], said["writable"]), (0, None), "an image that is there is not written again")
    said = pull("0", f"{second.name}/pool/other")
    tap.equal((said["written"], said["writable"]), (0, f"{second.name}/other"), "it is shared under another name")
    name = said["volume"].split("/")[1]
    run("lvremove", "--yes", f"{second.name}/other", f"{second.name}/{name}")
    run("lvcreate", "--yes", "--wipesignatures", "n", "--virtualsize", "16m", "--thin", "--name", name,
        f"{second.name}/pool")
    status, error = ovbd_fails("pull", "--thin", f"{second.name}/pool/other", f"oci:{LAYOUT}:0")
    tap.result(status == 1 and "exists and is not the image" in error, "a volume in the way: refused", error)
    tap.result(second.fields(name) is not None, "and it stays")
    second.pool("small", 4)
    status, error = ovbd_fails("pull", "--thin", f"{second.name}/small/x", f"oci:{LAYOUT}:5")
    tap.result(status == 1 and "needs" in error and "lvextend" in error, "a pool without room: refused", error)
    tap.result(not [found for found in second.all() if found.startswith("x")], "and nothing is made", second.all())


def main():
    set_up_lvm()
    with Devices() as devices:
        first, second = Group(devices, "vg-a.b", 700), Group(devices, "vg_2", 700)
        first.pool("pool", 500, "--chunksize", "64k")
        second.pool("pool", 500, "--chunksize", "128k")
        first.thin("web", SIZE)
        forth(first, second, 10)
        back(first, second)
        again(second)
    tap.finish()


main()
