#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd commit` and what is above the device: it refuses to wait for itself, and freezes file systems that are on what
is made of the device."""

import contextlib
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import sectors
from ovbd_command import MIB, listed, ovbd, ovbd_fails, settled
from test_script import OVBD, SCRATCH, Tap, load, run

SIZE = 320 * MIB
TOP = SCRATCH / "top"


def has(*kinds):
    """Whether the kernel has these file systems or targets."""
    known = pathlib.Path("/proc/filesystems").read_text().split()
    return all(kind in known or pathlib.Path("/sys/module", kind).exists()
               or subprocess.run(["modprobe", kind], stderr=subprocess.DEVNULL).returncode == 0 for kind in kinds)


@contextlib.contextmanager
def stack():
    """A writable device without content."""
    device = ovbd("up", "--writable", "--size", "64M", "stack", base).strip()
    try:
        yield device
    finally:
        subprocess.run(["dmsetup", "resume", "stack"], stderr=subprocess.DEVNULL)
        ovbd("down", "stack")


@contextlib.contextmanager
def mounted(kind, device, place=TOP, *options):
    if kind != "none":
        run(f"mkfs.{kind}", "-q", device)
    place.mkdir(exist_ok=True)
    run("mount", *options, device, place)
    try:
        yield place
    finally:
        run("umount", place)


@contextlib.contextmanager
def mapped(device):
    """A device of a part of another one, as a partition or a logical volume is."""
    run("dmsetup", "create", "part", "--table", f"0 {sectors(device) - 2048} linear {device} 2048")
    try:
        yield "/dev/mapper/part"
    finally:
        run("dmsetup", "remove", "--retry", "part")


@contextlib.contextmanager
def encrypted(device):
    run("dmsetup", "create", "plain", "--table",
        f"0 {sectors(device)} crypt aes-xts-plain64 {'01' * 64} 0 {device} 0")
    try:
        yield "/dev/mapper/plain"
    finally:
        run("dmsetup", "remove", "--retry", "plain")


@contextlib.contextmanager
def volume(device):
    # The guest's configuration need not know the device, and its /etc may be read-only.
    lvm = ["--config", 'devices{use_devicesfile=0 scan=["/dev"] global_filter=["r|-lower[0-9]+$|", "r|-cow[0-9]+$|"]} '
                       'activation{monitoring=0} backup{backup=0 archive=0}', "-q"]
    run("vgcreate", *lvm, "holders", device)
    run("lvcreate", *lvm, "-W", "n", "-n", "volume", "-l", "100%FREE", "holders")
    try:
        yield "/dev/mapper/holders-volume"
    finally:
        run("vgremove", *lvm, "-f", "holders")


@contextlib.contextmanager
def looped(path, *options):
    loop = run("losetup", "--find", "--show", *options, path).strip()
    try:
        yield loop
    finally:
        run("losetup", "--detach", loop)


def check_out(tap, what, folder):
    """OUT is refused by name, and the device goes on."""
    out = folder / "out.layer"
    status, said = ovbd_fails("commit", "-o", out, "stack", timeout=60)
    tap.result(status == 1 and str(folder) in said and "wait for itself" in said and not out.exists(),
               f"OUT {what}: refused", said)
    tap.result(not listed("stack")["suspended"], f"OUT {what}: the device goes on")


def check_from_inside(tap, top):
    """OUT, messages and working folder on the file system on the device: nothing of it is needed while it is
    suspended. The stack cannot be put on a layer that is on itself, so the next one has all of it again."""
    copy = SCRATCH / "inside.raw"
    for number in range(2):
        (top / f"file{number}").write_bytes(b"inside " * 100000)
        out = top / f"inside{number}.layer"
        with open(top / "messages", "w+") as messages:
            status = subprocess.run([OVBD, "commit", "-o", out.name, "stack"], stderr=messages, cwd=top,
                                    timeout=60).returncode
            messages.seek(0)
            said = messages.read()
        tap.result(status == 0 and "is on the stack itself" in said, "commit from inside", said)
        ovbd("export", "--force", "-o", copy, base, out)
        with looped(copy) as loop:
            check = subprocess.run(["e2fsck", "-fn", loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            tap.equal(check.returncode, 0, "commit from inside: the file system is clean in the layer")
            with mounted("none", loop, SCRATCH / "copy", "-o", "ro") as copied:
                tap.equal([(copied / f"file{one}").read_bytes() == b"inside " * 100000 for one in range(number + 1)],
                          [True] * (number + 1), "commit from inside: the layer has all files")
    tap.equal(len(listed("stack")["layers"]), 1, "commit from inside: the stack is on the layers that it was on")


def check_places(tap):
    with stack() as device:
        with mounted("ext4", device) as top:
            check_from_inside(tap, top)
            with open(top / "file", "wb") as file:
                file.truncate(64 * MIB)
            with looped(top / "file") as loop, mounted("ext4", loop, SCRATCH / "second") as second:
                check_out(tap, "in a file system in a file on the device", second)
            if has("overlay"):
                for name in ("lower", "upper", "work"):
                    (top / name).mkdir()
                options = f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
                with mounted("none", "overlay", SCRATCH / "over", "-t", "overlay", "-o", options) as over:
                    # The overlay has nothing of its own.
                    said = subprocess.run([OVBD, "commit", "-o", over / "out.layer", "stack"], stderr=subprocess.PIPE,
                                          text=True, timeout=60)
                    tap.result(said.returncode == 0 and "is on the stack itself" in said.stderr,
                               "OUT in an overlay on the device", said.stderr)
                    tap.attempt("OUT in an overlay on the device: a layer", ovbd, "verify", base, over / "out.layer")
            else:
                tap.skip("OUT in an overlay", "the kernel has none")
    with stack() as device, mapped(device) as part, mounted("ext4", part) as top:
        check_out(tap, "on a device that is made of the device", top)
    with stack() as device, volume(device) as logical, mounted("ext4", logical) as top:
        check_out(tap, "on a logical volume on the device", top)
    if has("dm_crypt"):
        with stack() as device, encrypted(device) as plain, mounted("ext4", plain) as top:
            check_out(tap, "on an encrypted device", top)
    else:
        tap.skip("OUT on an encrypted device", "the kernel has no dm-crypt")
    with stack() as device:
        if has("btrfs"):
            with mounted("btrfs", device) as top:
                run("btrfs", "subvolume", "create", top / "part")
                check_out(tap, "in a part of a btrfs on the device", top / "part")
        else:
            tap.skip("OUT on btrfs", "the kernel has none")
    with stack() as device:
        run("mkswap", device)
        if subprocess.run(["swapon", device], stderr=subprocess.DEVNULL).returncode:
            tap.skip("swap", "the kernel has none")
            return
        tap.equal(listed("stack")["used"], "used as swap", "ls of a device with swap")
        status, said = ovbd_fails("commit", "-o", SCRATCH / "x", "stack", timeout=60)
        tap.result(status == 1 and "swap on" in said, "a device with swap: refused", said)
        run("swapoff", device)


def check_volume(tap):
    """The label of a physical volume is on two devices then, which LVM does not like."""
    layer = SCRATCH / "volume.layer"
    with stack() as device:
        with volume(device):
            pass
        ovbd("commit", "-o", layer, "stack")
    said = subprocess.run([OVBD, "up", "--writable", "stack", base, layer], stderr=subprocess.PIPE,
                          stdout=subprocess.DEVNULL, text=True).stderr
    tap.result("physical volume" in said and "global_filter" in said, "up warns of a physical volume", said)
    ovbd("down", "stack")


def check_frozen(tap):
    """What a file system on a part of the device has not written yet is in the layer, and it goes on."""
    layer, copy = SCRATCH / "frozen.layer", SCRATCH / "frozen.raw"
    with stack() as device, mapped(device) as part, mounted("ext4", part) as top:
        (top / "file").write_bytes(b"written " * 100000)
        ovbd("commit", "-o", layer, "stack")
        (top / "later").write_bytes(b"later")
    ovbd("export", "-o", copy, base, layer)
    with looped(copy, "--offset", MIB) as loop:
        check = subprocess.run(["e2fsck", "-fn", loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        tap.equal(check.returncode, 0, "a file system above a holder is whole in the layer")
        with mounted("none", loop, TOP, "-o", "ro") as top:
            tap.equal((top / "file").read_bytes(), b"written " * 100000, "and has what was not written yet")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
raw, base = SCRATCH / "raw", SCRATCH / "base.layer"
with open(raw, "wb") as file:
    file.truncate(SIZE)
ovbd("build", "-o", base, raw)
check_places(tap)
check_volume(tap)
check_frozen(tap)
tap.equal(settled([]), [], "nothing is left")
tap.finish()
