#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Images are pulled into a volume group, a volume for each layer, and mapped from there: images share layers, what is written
stays in a volume of its own, and a pull that is killed leaves nothing that is taken for a layer."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices, sha256
from ovbd_command import ovbd, ovbd_fails
from test_script import OVBD, Tap, load, run
from volumes import LAYOUT, MIB, Group, image_content, push, set_up_lvm, write_random

SIZE = 32
KILLS = int(os.environ.get("OVBD_KILLS", "10"))
tap = Tap()


def pull(name, *words, group="layers"):
    """Pulls from the layout into the group; returns what was said first."""
    said = ovbd("pull", "--json", "--vg", group, *words, f"oci:{LAYOUT}:{name}")
    return json.loads(said.splitlines()[0])


def layers(group):
    """The volumes with layers."""
    return {name: row for name, row in group.all().items() if name.startswith("ovbd-")}


def shared(group):
    """Each layer is there once, read-only, and holds the file of its digest."""
    said = pull("1")
    tap.equal((len(said["layers"]), said["made"]), (2, 2), "the layers of an image")
    said = pull("2")
    tap.equal((len(said["layers"]), said["made"]), (3, 1), "only the layer that is missing is written for the next one")
    tap.equal(pull("2")["made"], 0, "and nothing for one that is there")
    found = layers(group)
    tap.equal(len(found), 3, "three volumes")
    tap.equal({(row["lv_permissions"], row["lv_active"]) for row in found.values()}, {("read-only", "")},
              "all read-only, none active")
    for name in found:
        digest = group.tags(name)["ovbd.layer"].removeprefix("sha256:")
        size = (LAYOUT / "blobs/sha256" / digest).stat().st_size
        run("lvchange", "--activate", "y", f"{group.name}/{name}")
        tap.equal((sha256(group.node(name), size), name), (digest, f"ovbd-{digest[:12]}"), f"{name} holds its layer")
        run("lvchange", "--activate", "n", f"{group.name}/{name}")
    tags = group.tags(said["layers"][-1].split("/")[1])
    tap.equal((tags["ovbd.manifest"], tags["ovbd.tag"]), (said["digest"], "2"), "the topmost says which image it completes")
    tap.result("ovbd.partial" not in str(found), "none is partial", found)


def mapped(group):
    """The stack over the volumes holds what the image holds; what is written stays."""
    pull("2", "--up", "stack")
    tap.equal(sha256("/dev/mapper/stack"), image_content("2")[1], "the stack over volumes holds what the image holds")
    ovbd("down", "stack")
    pull("2", "--up", "live", "--writable", "--size", "16m")
    tap.equal(group.fields("live-cow")["lv_size"], str(16 * MIB), "a volume for what is written")
    generator = random.Random("live")
    with open("/dev/mapper/live", "r+b") as device:
        for _ in range(20):
            device.seek(generator.randrange(SIZE * MIB - 70000))
            device.write(generator.randbytes(generator.randrange(1, 70000)))
    subprocess.run(["blockdev", "--flushbufs", "/dev/mapper/live"], check=True)
    written = sha256("/dev/mapper/live")
    ovbd("down", "live")
    pull("2", "--up", "live", "--writable")
    tap.equal(sha256("/dev/mapper/live"), written, "what was written is there again")
    status, said = ovbd_fails("pull", "--vg", group.name, "--up", "live", "--writable", f"oci:{LAYOUT}:2")
    tap.result(status == 1 and "live-cow" in group.all(), "a name that is taken: refused, and what was written stays", said)
    ovbd("down", "live")
    status, said = ovbd_fails("pull", "--vg", group.name, "--up", "huge", "--writable", "--size", "100g", f"oci:{LAYOUT}:2")
    tap.result(status == 1 and "huge-cow" not in group.all(), "no room for what is written: refused", said)
    names = " ".join(f"{group.name}/{name}" for name in layers(group)).split()
    run("lvchange", "--activate", "n", *names)


def in_the_way(group):
    """A volume of the name that is not the layer stays, and is not taken for it."""
    name = next(iter(layers(group)))
    run("lvremove", "--yes", f"{group.name}/{name}")
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", "4m", "--name", name, group.name)
    status, said = ovbd_fails("pull", "--vg", group.name, f"oci:{LAYOUT}:2")
    tap.result(status == 1 and "is not the layer" in said and name in group.all(), "a volume in the way: refused", said)
    run("lvchange", "--permission", "r", "--addtag", f"ovbd.layer=sha256:{'0' * 64}", f"{group.name}/{name}")
    status, said = ovbd_fails("pull", "--vg", group.name, f"oci:{LAYOUT}:2")
    tap.result(status == 1 and "is not the layer" in said, "and one of another layer", said)
    run("lvremove", "--yes", f"{group.name}/{name}")
    small = f"{group.name}-small"
    status, said = ovbd_fails("pull", "--vg", small, f"oci:{LAYOUT}:2")
    tap.result(status == 1, "a group without room: refused", said)
    tap.equal([row for row in run("lvs", "--noheadings", "-o", "lv_name", small).split() if row.endswith(".part")], [],
              "and nothing half-named is left")


def killed(group):
    """Killed at random moments, the next pull succeeds."""
    generator = random.Random("killed")

    def begin_anew():
        names = [f"{group.name}/{name}" for name in layers(group)]
        if names:
            run("lvremove", "--yes", *names)

    begin_anew()
    start = time.monotonic()
    pull("2")
    length = time.monotonic() - start
    deaths = 0
    for number in range(KILLS):
        begin_anew()
        process = subprocess.Popen([OVBD, "pull", "--vg", group.name, f"oci:{LAYOUT}:2"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        try:
            process.wait(generator.uniform(0.01, length))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            deaths += 1
        tap.attempt(f"pull {number} after one that was killed", pull, "2")
        found = layers(group)
        tap.equal((len(found), {(row["lv_permissions"], row["lv_active"]) for row in found.values()}),
                  (3, {("read-only", "")}), f"pull {number}: three layers, nothing half-named or active")
    tap.result(deaths > KILLS // 4, "enough were killed", deaths)


def main():
    load("dm-zfile")
    load("dm-overlaybd")
    set_up_lvm()
    with Devices() as devices:
        source, group = Group(devices, "source", 200), Group(devices, "layers", 300)
        Group(devices, "layers-small", 12)
        source.pool("pool", 150)
        node = source.thin("web", SIZE)
        for number in range(3):
            write_random(node, random.Random(number), SIZE * MIB, 40 if number == 0 else 6)
            push(number, f"--snapshot=web.{number}", f"{source.name}/web")
        shared(group)
        mapped(group)
        in_the_way(group)
        killed(group)
    tap.finish()


main()
