#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A volume group inside an image, on a stack of its layers: read-only and writable, beside the disk that it was made from,
and taken down in the order that a shutdown takes.

LVM has the filter that is shipped in docs/lvm-filter.conf, and no other.
"""

import os
import pathlib
import random
import subprocess
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices, sha256
from ovbd_command import existing, ovbd, ovbd_fails, settled
from test_script import SCRATCH, SOURCE, Tap, load, run
from volumes import MIB

RAW, BASE, NEXT = SCRATCH / "disk.raw", SCRATCH / "base.zfile", SCRATCH / "next.zfile"
# Beside the filter: no daemon and no udev, which this guest does not have.
CONFIG = """
activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}
global {{ event_activation=0 use_lvmpolld=0 locking_dir="{folder}" }}
backup {{ backup=0 archive=0 }}
"""
tap = Tap()


def set_up(with_filter=True):
    """LVM's configuration from now on."""
    folder = SCRATCH / "lvm"
    folder.mkdir(exist_ok=True)
    text = (SOURCE / "docs/lvm-filter.conf").read_text() if with_filter else "devices {\n}\n"
    text = text.replace("devices {", 'devices {\n\tdir="/dev"\n\tscan=["/dev"]\n\tuse_devicesfile=0')
    (folder / "lvm.conf").write_text(text + CONFIG.format(folder=SCRATCH))
    os.environ["LVM_SYSTEM_DIR"] = str(folder)


def physical_volumes():
    """Where LVM sees physical volumes, and of which group."""
    lines = run("pvs", "--noheadings", "--options", "pv_name,vg_name").splitlines()
    return sorted(tuple(line.split()) for line in lines)


def make_image():
    """A disk with a group of one volume becomes a layer; returns the SHA-256 of what the volume holds."""
    with open(RAW, "wb") as file:
        file.truncate(64 * MIB)
    loop = run("losetup", "--show", "--find", RAW).strip()
    run("vgcreate", "inside", loop)
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", "16m", "--name", "data", "inside")
    with open("/dev/inside/data", "wb") as device:
        device.write(random.Random("inside").randbytes(16 * MIB))
    found = sha256("/dev/inside/data")
    run("vgchange", "--activate", "n", "inside")
    run("losetup", "--detach", loop)
    ovbd("build", "-o", BASE, RAW)
    return found


def read_only(data):
    """It is found and read; nobody can change it."""
    before = existing()
    ovbd("up", "disk", BASE)
    tap.equal(physical_volumes(), [("/dev/mapper/disk", "inside")], "read-only: LVM sees the stack, and nothing below it")
    run("vgchange", "--activate", "y", "--config", 'activation/read_only_volume_list=["inside"]', "inside")
    tap.equal(sha256("/dev/inside/data"), data, "its volume holds what it held")
    tap.equal(run("blockdev", "--getro", "/dev/inside/data").strip(), "1", "and is read-only")
    whole = sha256("/dev/mapper/disk")
    made = subprocess.run(["lvcreate", "--yes", "--size", "4m", "--name", "new", "inside"], capture_output=True, check=False)
    tap.equal(made.returncode, 5, "lvcreate fails")
    tap.equal(sha256("/dev/mapper/disk"), whole, "and changes nothing")
    status, said = ovbd_fails("down", "disk")
    tap.result(status == 1 and "inside-data" in said, "down: refused while a volume is active, which is named", said)
    run("vgchange", "--activate", "n", "inside")
    ovbd("down", "disk")
    tap.equal(settled(before), before, "and works when none is")


def writable(data):
    """Volumes are made, written to, and are in the layer of what was written."""
    before = existing()
    set_up(with_filter=False)
    result = ovbd_fails("up", "--writable", "disk", BASE)
    tap.result(result[0] == 0 and "global_filter" in result[1], "writable: a warning says that LVM wants a filter", result)
    said = subprocess.run(["vgchange", "--activate", "y", "inside"], capture_output=True, text=True, check=False)
    tap.result("duplicate" in said.stderr, "without one LVM finds the physical volume twice", said)
    subprocess.run(["vgchange", "--activate", "n", "inside"], capture_output=True, check=False)
    set_up()
    tap.equal(physical_volumes(), [("/dev/mapper/disk", "inside")], "with it LVM sees the stack, and nothing below it")
    run("vgchange", "--activate", "y", "inside")
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", "8m", "--name", "more", "inside")
    with open("/dev/inside/more", "wb") as device:
        device.write(random.Random("more").randbytes(8 * MIB))
    more = sha256("/dev/inside/more")
    run("vgchange", "--activate", "n", "inside")
    ovbd("commit", "disk", "-o", NEXT)
    ovbd("down", "disk")
    ovbd("up", "disk", BASE, NEXT)
    run("vgchange", "--activate", "y", "inside")
    tap.equal((sha256("/dev/inside/data"), sha256("/dev/inside/more")), (data, more), "both volumes are in the layers")
    run("vgchange", "--activate", "n", "inside")
    ovbd("down", "disk")
    tap.equal(settled(before), before, "no device is left")


def cloned(data):
    """Beside the disk that it was made from it gets a name and UUIDs of its own."""
    before = existing()
    loop = run("losetup", "--show", "--find", RAW).strip()
    original = sha256(RAW)
    ovbd("up", "--writable", "copy", BASE)
    status = subprocess.run(["vgchange", "--activate", "y", "inside"], capture_output=True, text=True, check=False)
    tap.result("duplicate" in status.stderr, "beside its original the physical volume is there twice", status)
    subprocess.run(["vgchange", "--activate", "n", "inside"], capture_output=True, check=False)
    run("vgimportclone", "--basevgname", "copied", "/dev/mapper/copy")
    tap.equal(physical_volumes(), [(loop, "inside"), ("/dev/mapper/copy", "copied")], "vgimportclone gives it another identity")
    run("vgchange", "--activate", "y", "copied", "inside")
    tap.equal((sha256("/dev/copied/data"), sha256("/dev/inside/data")), (data, data), "both are active, side by side")
    with open("/dev/copied/data", "wb") as device:
        device.write(b"changed")
    run("vgchange", "--activate", "n", "copied", "inside")
    ovbd("down", "copy")
    run("losetup", "--detach", loop)
    tap.equal(sha256(RAW), original, "the original is as it was")
    tap.equal(settled(before), before, "no device is left")


def shut_down():
    """blkdeactivate, which is what a shutdown calls, takes all of it down from the top, mounts and the stack too."""
    before = existing()
    ovbd("up", "--writable", "--cow", SCRATCH / "written", "disk", BASE)
    run("vgchange", "--activate", "y", "inside")
    run("mkfs.ext4", "-q", "/dev/inside/data")
    folder = SCRATCH / "mounted"
    folder.mkdir()
    run("mount", "/dev/inside/data", folder)
    (folder / "file").write_bytes(b"text" * 5000)
    said = run("blkdeactivate", "-u", "-l", "wholevg", "-d", "retry")
    tap.result(not os.path.ismount(folder), "blkdeactivate unmounts what is on the volume", said)
    tap.equal(settled(before), before, "and removes the volume and the stack with all its devices")
    ovbd("up", "--writable", "--cow", SCRATCH / "written", "disk", BASE)
    run("vgchange", "--activate", "y", "inside")
    run("mount", "/dev/inside/data", folder)
    tap.equal((folder / "file").read_bytes(), b"text" * 5000, "what was written is there the next time")
    run("umount", folder)
    run("vgchange", "--activate", "n", "inside")
    ovbd("down", "disk")


def on_volumes():
    """The layer is on a volume itself, the group of which blkdeactivate takes down last."""
    before = existing()
    disk = SCRATCH / "outside.raw"
    with open(disk, "wb") as file:
        file.truncate(64 * MIB)
    loop = run("losetup", "--show", "--find", disk).strip()
    run("vgcreate", "outside", loop)
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", "40m", "--name", "layer", "outside")
    layer = BASE.read_bytes()
    with open("/dev/outside/layer", "wb") as device:
        device.write(layer)
    ovbd("up", "disk", "/dev/outside/layer")
    run("vgchange", "--activate", "y", "inside")
    said = run("blkdeactivate", "-l", "wholevg", "-d", "retry")
    run("losetup", "--detach", loop)
    tap.equal(settled(before), before, "from the volume inside down to the volume of the layer, nothing is left")
    tap.result("FAIL" not in said.upper(), "blkdeactivate takes all of it at once", said)


def main():
    load("dm-zfile")
    load("dm-overlaybd")
    set_up()
    with Devices():
        data = make_image()
        read_only(data)
        writable(data)
        cloned(data)
        shut_down()
        on_volumes()
    tap.finish()


main()
