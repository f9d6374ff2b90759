#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What `ovbd` says where it is not root or the kernel lacks a module."""

import os
import pathlib
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from ovbd_command import Images, ovbd, refused, settled
from test_script import Tap, load, run


def check_user(tap, images):
    refused(tap, "not root", "only root", "up", "stack", *images.layer, user=65534, group=65534)
    refused(tap, "ls, not root", "only root", "ls", user=65534, group=65534)


def check_targets(tap, images):
    run("rmmod", "dm-overlaybd")
    refused(tap, "no module", "insmod dm-overlaybd.ko", "up", "stack", *images.layer)
    load("dm-overlaybd")
    settled([])


def check_loop(tap, images):
    run("rmmod", "loop")
    folder = pathlib.Path("/run/modprobe.d")
    folder.mkdir(exist_ok=True)
    (folder / "no-loop.conf").write_text("install loop /bin/false\n")
    refused(tap, "no loop devices", "no loop devices", "up", "stack", *images.layer)
    (folder / "no-loop.conf").unlink()
    ovbd("up", "stack", *images.layer)
    ovbd("down", "stack")
    tap.equal(settled([]), [], "the loop module is loaded where it is missing")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
images = Images("images")
check_user(tap, images)
check_targets(tap, images)
# Only a module has this file.
if pathlib.Path("/sys/module/loop/initstate").exists():
    check_loop(tap, images)
else:
    tap.skip("no loop devices", "this kernel has them built in")
tap.finish()
