#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A stack that runs is pushed while it is written to: the image is of one moment, and of all its layers."""

import json
import os
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct
from numbered_writes import SIZE, Model, Writer, moment
from ovbd_command import existing, listed, ovbd, ovbd_fails, refused, settled
from test_script import SCRATCH, Tap, load, run

STORE = SCRATCH / "store"


def image_of(name):
    """What a name of an image gives."""
    copy = SCRATCH / "copy"
    ovbd("export", "--force", "-q", "-o", copy, name)
    return copy.read_bytes()


def configuration(name):
    """The configuration of an image of the store."""
    digest = json.loads(ovbd("inspect", "--store", STORE, "--json", name))["config"]
    return (STORE / "blobs" / digest.replace(":", "/")).read_text()


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
raw, base = SCRATCH / "raw", SCRATCH / "base.layer"
with open(raw, "wb") as file:
    file.truncate(SIZE)
ovbd("build", "-o", base, raw)
config = SCRATCH / "config.json"
config.write_text('{"Cmd": ["/sbin/init"]}')
# The image that the stack is on is in the store, with a configuration.
ovbd("push", "--config", config, base, f"oci:{STORE}:reg.example/vm:base")
before, model, cow = existing(), Model(), SCRATCH / "cow"
device = ovbd("up", "--store", STORE, "--writable", "--cow", cow, "live", "reg.example/vm:base").strip()
writer = Writer(device)
writer.start()
wrong = []
for number in range(3):
    name, layer = f"oci:{STORE}:reg.example/vm:{number}", SCRATCH / f"{number}.layer"
    begun = writer.acknowledged
    answer = json.loads(ovbd("push", "--json", "--store", STORE, "--layer", layer, "live", name))
    ended = writer.acknowledged + 1
    found = moment(image_of(name), model)
    if not isinstance(found, int) or not begun <= found <= ended:
        wrong.append(f"push {number}: {found}, wanted {begun} to {ended}")
    if (answer["layers"], answer["sent"]) != (number + 2, 2):
        wrong.append(f"push {number}: {answer}")
    if "/sbin/init" not in configuration(f"reg.example/vm:{number}"):
        wrong.append(f"push {number}: the configuration is lost")
tap.equal(wrong, [], "each push is of one moment, sends one layer and a configuration, and keeps the rest")
tap.equal(len(listed("live")["layers"]), 4, "the stack is on the layers that were pushed")

# The registry is away: the layer is there all the same, and what is said pushes it.
layer = SCRATCH / "later.layer"
status, said = ovbd_fails("push", "--retries", "1", "--plain-http", "--store", STORE, "--layer", layer, "live",
                          "127.0.0.1:1/vm:later")
tap.result(status == 1 and "later.layer: is complete" in said, "a registry that is away: the layer is complete", said)
tap.equal(listed("live")["layers"][-1]["path"], str(layer), "and the stack is on it")
words = said.split('"ovbd push ')[1].split('"')[0].split()
ovbd("push", "--store", STORE, *words[:-1], f"oci:{STORE}:reg.example/vm:later")
writer.stop()
tap.equal(writer.error, None, "the writer never failed")
out = SCRATCH / "last.layer"
ovbd("push", "--store", STORE, "--layer", out, "live", f"oci:{STORE}:reg.example/vm:last")
tap.equal(moment(image_of(f"oci:{STORE}:reg.example/vm:last"), model), writer.acknowledged, "the last one has everything")

status, said = ovbd_fails("push", "--store", STORE, "live", f"oci:{STORE}:x")
tap.result(status == 2 and "--layer FILE" in said, "without --layer: the usage", said)
refused(tap, "a layer that exists", "exists", "push", "--layer", base, "live", f"oci:{STORE}:x")
refused(tap, "no such stack", "no such stack", "push", "--layer", SCRATCH / "x", "nothing", f"oci:{STORE}:x")
# What is renamed the kernel finds. What has no name any more, or is another file, is not pushed.
hidden = SCRATCH / "hidden"
os.link(layer, hidden)
layer.unlink()
refused(tap, "a layer that was removed", "not the file any more", "push", "--layer", SCRATCH / "x", "live",
        f"oci:{STORE}:x")
hidden.rename(layer)
ovbd("down", "live")
tap.equal(settled(before), before, "down leaves nothing")

# Elsewhere the image is the device that it was.
ovbd("up", "--store", STORE, "copy", "reg.example/vm:last")
tap.equal(moment(read_direct("/dev/mapper/copy", 0, SIZE), model), writer.acknowledged, "the image is that device")
refused(tap, "a stack that is not writable", "not writable", "push", "--layer", SCRATCH / "x", "copy", f"oci:{STORE}:x")
ovbd("down", "copy")
# The layers squashed to one are the same, and the store fits on it.
run("cp", cow, f"{cow}.copy")
squashed = SCRATCH / "squashed.layer"
layers = [SCRATCH / f"{number}.layer" for number in range(3)]
ovbd("squash", *layers, layer, out, "-o", squashed)
ovbd("up", "--writable", "--cow", cow, "fewer", base, squashed)
tap.equal(moment(read_direct("/dev/mapper/fewer", 0, SIZE), model), writer.acknowledged, "squashed, under the same store")
ovbd("down", "fewer")
tap.finish()
