#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Classic snapshots are pushed, the second by the exceptions of the first: the image has the size and the content of the
origin, however small the store of the snapshot is. And what LVM would remove along with a snapshot, or not zero."""

import os
import pathlib
import random
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd, ovbd_fails
from test_script import Tap, run
from volumes import LAYOUT, MIB, Group, image_content, overwrite_random, push, set_up_lvm

SIZE = 48
tap = Tap()


def snapshot(group, name):
    """A read-only classic snapshot of `web` with a store a third as large."""
    run("lvcreate", "--snapshot", "--permission", "r", "--size", f"{SIZE // 3}m", "--name", name, f"{group.name}/web")


def classic(group):
    generator = random.Random("classic")
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", f"{SIZE}m", "--name", "web", group.name)
    with open(group.node("web"), "wb") as device:
        device.write(generator.randbytes(SIZE * MIB))
    for number in range(3):
        snapshot(group, f"web{number}")
        said = push(number, f"{group.name}/web{number}")
        tap.equal(image_content(number), (SIZE * MIB, group.sha256(f"web{number}")),
                  f"image {number} holds what the snapshot holds")
        tap.equal(said["layers"], number + 1, f"image {number} has one layer more")
        if number:
            tap.result(said["read"] <= 2 * said["changed"] < SIZE * MIB, f"push {number} reads changed chunks only", said)
        overwrite_random(group.node("web"), generator, SIZE * MIB, 30)


def full(group):
    """A snapshot that was full and lost what it held is neither pushed nor a base."""
    old, new = f"{group.name}/full", f"{group.name}/newer"
    run("lvcreate", "--snapshot", "--permission", "r", "--size", "4m", "--name", "full", f"{group.name}/web")
    push("full", "--full", old)
    overwrite_random(group.node("web"), random.Random("full"), SIZE * MIB, 300)
    snapshot(group, "newer")
    for what, words in (("not pushed", ["--full", old]), ("no base", [f"--base={old}", new])):
        status, said = ovbd_fails("push", *words, f"oci:{LAYOUT}:x")
        tap.result(status == 1 and "invalid" in said, f"a snapshot that was full is {what}", (status, said))
    run("lvremove", "--yes", old, new)


def prune(group):
    group.pool("pool", 100)
    node = group.thin("thin", 16)
    for number in range(3):
        with open(node, "r+b") as device:
            device.write(os.urandom(MIB))
        push(f"thin{number}", f"--snapshot=thin.{number}", f"{group.name}/thin")
    run("lvcreate", "--snapshot", "--size", "8m", "--name", "test", f"{group.name}/thin.0")
    group.pool("other", 40)
    run("lvcreate", "--snapshot", "--thinpool", f"{group.name}/other", "--name", "clone", f"{group.name}/thin.1")
    said = ovbd("lvm", "prune", "--keep", "1", f"{group.name}/thin")
    names = set(group.all())
    tap.result({"thin.0", "thin.1", "thin.2", "test", "clone"} <= names, "what others are made of is not removed", (said, names))
    run("lvremove", "--yes", f"{group.name}/test", f"{group.name}/clone")
    said = ovbd("lvm", "prune", "--keep", "1", f"{group.name}/thin")
    names = set(group.all())
    tap.result("thin.2" in names and not {"thin.0", "thin.1"} & names, "and is, when they are gone", (said, names))


def not_zeroed(group):
    group.pool("dirty", 40, "--zero", "n")
    status, said = ovbd_fails("pull", "--thin", f"{group.name}/dirty/x", f"oci:{LAYOUT}:thin2")
    tap.result(status == 1 and "--zero y" in said, "a pool that does not zero: refused", said)
    tap.result("x" not in group.all(), "and nothing is made", group.all())
    group.thin("mine", 8, "dirty")
    pushed = ovbd_fails("push", "--snapshot=mine.0", f"{group.name}/mine", f"oci:{LAYOUT}:mine")
    tap.result(pushed[0] == 0 and "what other volumes held" in pushed[1], "a push from it warns", pushed)


def main():
    set_up_lvm()
    with Devices() as devices:
        group = Group(devices, "vg", 600)
        classic(group)
        full(group)
        prune(group)
        not_zeroed(group)
    tap.finish()


main()
