#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What `ovbd up` and `down` must refuse, with a message that helps and without leaving a device behind; also where the
program is interrupted or killed in the middle."""

import json
import os
import signal
import struct
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices, sha256
from ovbd_command import MIB, Images, existing, listed, ovbd, ovbd_fails, refused, settled
from test_script import OVBD, SCRATCH, Tap, load, run


def check_names(tap, images):
    for name in ("a/b", "-x", "control", "n" * 100, ""):
        status, said = ovbd_fails("up", "--", name, *images.layer)
        tap.result(status == 1 and "ovbd: " in said, f"name {name[:10]!r}: refused", said)
    ovbd("up", "taken", *images.layer)
    refused(tap, "a name in use", "/dev/mapper/taken: exists already", "up", "taken", *images.layer)
    with Devices() as devices:
        devices.map("other", "0 8 zero")
        refused(tap, "the name of another device", "a device other exists already", "up", "other", *images.layer)
        refused(tap, "down of another device", "no such stack", "down", "other")
    ovbd("down", "taken")


def check_layers(tap, images):
    base, second, third = images.layer
    refused(tap, "layers in the wrong order", f"{third}: not the one for {base}: it belongs on {second}",
            "up", "stack", base, third, second)
    refused(tap, "no base layer", f"{second}: not a base layer: its parent is ", "up", "stack", second, third)
    ovbd("up", "--ignore-parents", "stack", base, third)
    tap.equal(len(listed("stack")["layers"]), 2, "--ignore-parents allows any order")
    ovbd("down", "stack")
    refused(tap, "a missing file", "No such file", "up", "stack", base, SCRATCH / "missing")
    refused(tap, "an image", "", "up", "stack", images.raw[0])
    compressed = SCRATCH / "raw.zfile"
    ovbd("build", "--raw", "-o", compressed, images.raw[0])
    refused(tap, "a ZFile that holds no layer", "holds no layer", "up", "stack", compressed)
    # The index is not read before the kernel does.
    damaged = SCRATCH / "damaged.layer"
    ovbd("build", "--format", "lsmt", "-o", damaged, images.raw[0])
    with open(damaged, "r+b") as file:
        file.seek(-4096 - 4096, os.SEEK_END)
        file.write(b"\xff" * 8 + b"\x00" * 8 + b"\x11" * 32)
    refused(tap, "a damaged index", "/dev/mapper/stack: ", "up", "stack", damaged)
    loop = run("losetup", "--find", "--show", second).strip()
    refused(tap, "a layer that can be written", f"{second}: can be written through {loop}",
            "up", "stack", base, second, third)
    run("losetup", "--detach", loop)


def check_cow(tap, images):
    cow = SCRATCH / "cow"
    writable = ["up", "--writable", "--cow"]
    refused(tap, "a COW store that is too small", "at least", *writable, cow, "--size", "4K", "stack", *images.layer)
    tap.result(not cow.exists(), "a COW store that is too small: is not made")
    refused(tap, "a layer as COW store", "both a layer and the COW store", *writable, images.layer[1], "stack",
            *images.layer)
    cow.write_bytes(b"precious" * 10000)
    refused(tap, "a COW file with something else", "--wipe-cow", *writable, cow, "stack", *images.layer)
    tap.result(cow.read_bytes() == b"precious" * 10000, "a COW file with something else: is untouched")
    cow.unlink()
    ovbd(*writable, cow, "first", *images.layer)
    refused(tap, "a COW file in use", "in use by /dev/loop", *writable, cow, "stack", *images.layer)
    refused(tap, "--size for an existing COW file", "--size", *writable, cow, "--size", "1M", "stack", *images.layer)
    ovbd("down", "first")
    cow.unlink()
    missing = SCRATCH / "missing" / "cow"
    refused(tap, "a COW file in no folder", str(missing), *writable, missing, "stack", *images.layer)
    for size, what in ((4096, "too small"), (MIB, None)):
        disk = SCRATCH / "disk"
        with open(disk, "wb") as file:
            file.truncate(size)
        loop = run("losetup", "--find", "--show", disk).strip()
        if what:
            refused(tap, "a COW device that is too small", what, *writable, loop, "stack", *images.layer)
        else:
            ovbd(*writable, loop, "stack", *images.layer)
            tap.equal(listed("stack")["cow"]["bytes"], size, "a COW device: ls has its size")
            refused(tap, "a COW device in use", "in use", *writable, loop, "other", *images.layer)
            ovbd("down", "stack")
        run("losetup", "--detach", loop)


def check_cow_names(tap, images):
    """One store is one store under whatever name."""
    writable = ["up", "--writable", "--cow"]
    for what, name in (("is not UTF-8", b"cow \xff"), ("ends in a newline", b"cow\n"), ("has a blank", b"a cow")):
        cow = SCRATCH / os.fsdecode(name)
        ovbd(*writable, cow, "first", *images.layer)
        link = SCRATCH / "link"
        os.link(cow, link)
        os.unlink(cow)
        refused(tap, f"a store in use whose name {what} and is gone", "in use", *writable, link, "second",
                *images.layer)
        tap.result(json.loads(ovbd("ls", "--json"))[0]["cow"]["state"] == "valid", f"ls of a store whose name {what}")
        ovbd("down", "first")
        link.unlink()
    cow = SCRATCH / "cow"
    cow.touch()
    os.truncate(cow, MIB)
    other = SCRATCH / "other"
    other.touch()
    run("unshare", "--mount", "sh", "-c", f"mount --bind {cow} {other} && "
        f"exec {OVBD} up --writable --cow {other} first {images.layer[0]}")
    refused(tap, "a store in use by another name in another mount namespace", "in use", *writable, cow, "second",
            *images.layer)
    ovbd("down", "first")
    cow.unlink()


def check_strangers(tap, images):
    """Other devices, whatever their names, and devices that come and go."""
    with Devices() as devices:
        run("dmsetup", "create", "--manglename", "none", "s: 0 8 overlaybd 1", "--table", "0 8 zero")
        devices.undo(run, "dmsetup", "remove", "--manglename", "none", "--retry", "s: 0 8 overlaybd 1")
        ovbd("up", "s", *images.layer)
        tap.equal(listed("s")["bytes"], images.raw[2].stat().st_size, "a stranger's name adds nothing to a stack")
        ovbd("down", "s")
    ovbd("up", "stack", *images.layer)
    script = "while :; do for i in 1 2 3; do dmsetup create v$i --table '0 8 zero'; done; dmsetup remove v1 v2 v3; done"
    others = subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True)
    failed = [said for _ in range(50) if (said := ovbd_fails("ls"))[0]]
    os.killpg(others.pid, signal.SIGKILL)
    others.wait()
    for name in [name for name in existing() if name.startswith("v")]:
        run("dmsetup", "remove", "--retry", name)
    tap.equal(failed, [], "ls while other devices come and go")
    run("dmsetup", "rename", "stack", "another")
    tap.equal(listed("stack")["device"], "/dev/mapper/another", "ls knows a stack that was renamed")
    refused(tap, "up of one that was renamed", "exists already, under the name another", "up", "stack", *images.layer)
    ovbd("down", "stack")
    tap.equal(settled([]), [], "down of one that was renamed")


def check_blocks(tap, images):
    """A layer in its wrapper on a disk with blocks of 4096 bytes."""
    layer = SCRATCH / "wrapped.layer"
    ovbd("build", "--tar", "-o", layer, images.raw[0])
    os.truncate(layer, (layer.stat().st_size + MIB) // 4096 * 4096)
    loop = run("losetup", "--find", "--show", "--sector-size", "4096", layer).strip()
    device = ovbd("up", "stack", loop).strip()
    tap.result(sha256(device) == sha256(images.raw[0]), "a wrapped layer on a disk with larger blocks: content")
    ovbd("down", "stack")
    run("losetup", "--detach", loop)


def check_users(tap, images):
    """What is in use stays, and the message says who uses it."""
    device = ovbd("up", "used", *images.layer).strip()
    with open(device, "rb"):
        status, said = ovbd_fails("down", "used")
    tap.result(status == 1 and f"in use by python3 ({os.getpid()})" in said, "down of an open device: refused", said)
    run("dmsetup", "create", "user", "--table", f"0 8 linear {device} 0")
    status, said = ovbd_fails("down", "used")
    tap.result(status == 1 and said.endswith("used by /dev/mapper/user"), "down below another device: refused", said)
    run("dmsetup", "remove", "--retry", "user")
    tap.result(sha256(device) == sha256(images.raw[2]), "a device that could not go down still works")
    ovbd("down", "used")

    raw, layer, top = SCRATCH / "ext4.raw", SCRATCH / "ext4.layer", SCRATCH / "a mount"
    top.mkdir()
    with open(raw, "wb") as file:
        file.truncate(4 * MIB)
    run("mkfs.ext4", "-q", raw)
    ovbd("build", "-o", layer, raw)
    device = ovbd("up", "--writable", "used", layer).strip()
    run("mount", device, top)
    status, said = ovbd_fails("down", "used")
    tap.result(status == 1 and said == f"ovbd: {device}: mounted on {top}", "down of a mounted device: refused", said)
    run("umount", top)
    run("dmsetup", "suspend", "used")
    refused(tap, "commit of a suspended device", "dmsetup resume used", "commit", "-o", SCRATCH / "x", "used")
    run("dmsetup", "resume", "used")
    ovbd("down", "used")


def spoiled_store(path):
    """A COW store that `ovbd` takes and dm-snapshot does not: its exceptions are to be beyond its end."""
    with open(path, "wb") as file:
        file.write(struct.pack("<4s3I", b"SnAp", 1, 1, 64))
        file.truncate(16 << 10)


def check_undo(tap, images):
    """Whatever becomes of messages, nothing is left of a failed `up`."""
    cow = SCRATCH / "spoiled"
    spoiled_store(cow)
    digest = sha256(cow)
    words = ["up", "--writable", "--cow", cow, "stack", *images.layer]
    refused(tap, "the last step fails", "/dev/mapper/stack-cow0: ", *words)
    tap.equal(sha256(cow), digest, "the last step fails: the COW file is as it was")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed, open("/dev/full", "wb") as full:
        for what, stderr in (("a closed pipe", closed), ("a full disk", full)):
            before = existing()
            process = subprocess.run([OVBD, *map(str, words)], stderr=stderr)
            tap.equal(process.returncode, 1, f"stderr is {what}: up fails as before")
            tap.equal(settled(before), before, f"stderr is {what}: nothing is left")


def check_interrupted(tap, images):
    """A signal and a death in the middle."""
    cow = SCRATCH / "cow"
    # Many devices, so that there is a middle.
    words = ["up", "--ignore-parents", "--writable", "--cow", cow, "--size", "1M", "stack", *images.layer * 8]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
        name = signal.Signals(number).name
        stopped = 0
        # It may have ended by the time that it gets the signal: then the next attempt does not wait for so many devices.
        for attempt in range(40):
            process = subprocess.Popen([OVBD, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                       text=True)
            wanted, count = attempt * 7 % 20, 0
            while process.poll() is None and count < wanted:
                count = sum(part.startswith("stack") for part in existing())
            process.send_signal(number)
            said = process.communicate()[1].strip()
            if process.returncode == 0:
                ovbd("down", "stack")
                cow.unlink()
                continue
            stopped += count > 0
            if number == signal.SIGKILL:
                parts = [name for name in existing() if name.startswith("stack")]
                if parts and listed("stack")["device"]:
                    # It died with nothing left to do.
                    ovbd("down", "stack")
                elif parts:
                    refused(tap, f"up after {name}", "\"ovbd down stack\" removes them", *words)
                    tap.result("incomplete" in ovbd("ls"), f"{name}: ls lists the parts", parts)
                    ovbd("down", "stack")
                cow.unlink(missing_ok=True)
            else:
                # Before it notices signals there is nothing to undo.
                ended = process.returncode == 1 and said.endswith("interrupted") or process.returncode == -number
                tap.result(ended, f"{name}: up ends", said)
                tap.result(not cow.exists(), f"{name}: no COW file is left")
            tap.equal(settled([]), [], f"{name} after {count} devices: nothing is left")
            if stopped == 4:
                break
        tap.result(stopped > 0, f"{name}: came in the middle {stopped} times")


# Runs a program where it looks as if the kernel had all modules but one, which modprobe does not find either.
WITHOUT_MODULE = """names=$(ls /sys/module); mount -t tmpfs none /sys/module; cd /sys/module; mkdir $names; rmdir $1
cd "$2"; printf '#!/bin/sh\nexit 1\n' >modprobe; chmod +x modprobe; PATH=$2:$PATH; shift 2; "$@" 2>&1"""


def check_no_snapshots(tap, images):
    """A kernel without dm-snapshot."""
    cow, folder = SCRATCH / "no-snapshot.cow", SCRATCH / "no-snapshot"
    folder.mkdir()

    def up(*words):
        before = existing()
        command = ["unshare", "--mount", "sh", "-c", WITHOUT_MODULE, "sh", "dm_snapshot", folder, OVBD, "up", *words, "stack",
                   *images.layer]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        return result.returncode, result.stdout.strip(), existing() == before
    status, said, is_clean = up("--writable", "--cow", cow)
    good = status == 1 and said.startswith("ovbd: dm-snapshot: this kernel has none") and "\n" not in said
    tap.result(good, "no dm-snapshot: says so", f"exit status {status}: {said}")
    tap.result(is_clean and not cow.exists(), "no dm-snapshot: nothing is left, and no store is made")
    status, said, _ = up()
    tap.equal((status, said), (0, "/dev/mapper/stack"), "no dm-snapshot: without --writable it is not needed")
    ovbd("down", "stack")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
images = Images("images", options=[[], ["--tar"], ["--algo", "zstd"]])
check_names(tap, images)
check_layers(tap, images)
check_cow(tap, images)
check_cow_names(tap, images)
check_strangers(tap, images)
check_blocks(tap, images)
check_users(tap, images)
check_undo(tap, images)
check_interrupted(tap, images)
check_no_snapshots(tap, images)
tap.finish()
