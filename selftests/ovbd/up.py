#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd up`, `ls` and `down`: stacks of every kind of layer have the content of their image, are listed as what they
are, and go without a trace; and the commands that `--dry-run` prints make the same device."""

import itertools
import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices, sectors, sha256
from ovbd_command import MIB, Images, existing, leaves_nothing, listed, ovbd, refused, settled
from test_script import SCRATCH, CommandFailed, Tap, load, run


def same(device, raw):
    """Whether a device has the content of an image."""
    return sha256(device) == sha256(raw)


def check_stack(tap, what, paths, raw, *options):
    """Up, content, and down again."""
    before = settled([])
    try:
        device = ovbd("up", *options, "stack", *paths).strip()
    except CommandFailed as error:
        tap.result(False, f"{what}: up", error)
        tap.equal(settled(before), before, f"{what}: nothing is left")
        return None
    tap.equal(device, "/dev/mapper/stack", f"{what}: up prints the device")
    tap.equal(sectors(device) * 512, raw.stat().st_size, f"{what}: size")
    tap.result(same(device, raw), f"{what}: content")
    entry = listed("stack")
    tap.equal([layer["path"] for layer in entry["layers"]], [str(path) for path in paths], f"{what}: ls has the paths")
    ovbd("down", "stack")
    tap.equal(settled(before), before, f"{what}: down leaves nothing")
    return entry


def with_odd_length(options):
    """Images whose layers are files of any length."""
    for attempt in itertools.count():
        images = Images(f"odd{attempt}", options=options)
        if all(layer.stat().st_size % 512 for layer in images.layer):
            return images


def check_kinds(tap):
    plain = Images("plain", options=[["--format", "lsmt"]] * 3)
    entry = check_stack(tap, "plain layers", plain.layer, plain.raw[2])
    tap.equal([layer["zfile"] for layer in entry["layers"]], [None] * 3, "plain layers: ls says so")
    tap.equal([layer["stored_bytes"] for layer in entry["layers"]], [path.stat().st_size for path in plain.layer],
              "plain layers: ls has their sizes")

    odd = with_odd_length([[], ["--algo", "zstd"], ["--block-size", "65536", "--own-reader-only"]])
    digests = [sha256(path) for path in odd.layer]
    entry = check_stack(tap, "compressed layers of odd length", odd.layer, odd.raw[2])
    tap.equal([layer["zfile"]["algorithm"] for layer in entry["layers"]], ["lz4", "zstd", "lz4"],
              "compressed layers: ls has the algorithms")
    tap.equal([layer["stored_bytes"] for layer in entry["layers"]], [path.stat().st_size for path in odd.layer],
              "compressed layers: ls has their sizes")
    tap.result(0 < sum(layer["owned_bytes"] for layer in entry["layers"]) <= 4 * MIB,
               "compressed layers: ls says how much of the device is theirs", entry["layers"])
    tap.equal([sha256(path) for path in odd.layer], digests, "compressed layers: the files did not change")
    check_stack(tap, "one layer", odd.layer[:1], odd.raw[0])

    tar = Images("tar", options=[["--tar"], ["--tar", "--format", "lsmt"], ["--tar", "--algo", "zstd"]])
    check_stack(tap, "layers in tar wrappers", tar.layer, tar.raw[2])
    # What follows the blob is not needed.
    for path in (tar.layer[0], tar.layer[2]):
        size = int(re.search(rb"size=(\d+)\n", path.read_bytes()[:1024])[1])
        os.truncate(path, 1536 + size)
    check_stack(tap, "truncated tar wrappers", tar.layer, tar.raw[2])
    return odd, tar


def check_block_devices(tap):
    """Layers on block devices: a plain blob that fills one, and others in wrappers that say how long they are."""
    images = Images("block", options=[["--format", "lsmt"], ["--tar"], ["--tar", "--format", "lsmt"]])
    with Devices() as devices:
        nodes = [devices.loop(images.layer[0])]
        for path in images.layer[1:]:
            os.truncate(path, path.stat().st_size + MIB)
            nodes.append(devices.loop(path))
        before = existing()
        device = ovbd("up", "stack", *nodes).strip()
        tap.result(same(device, images.raw[2]), "layers on block devices: content")
        ovbd("down", "stack")
        tap.equal(settled(before), before, "layers on block devices: down leaves them alone")


def check_volumes(tap):
    """The same on logical volumes."""
    images = Images("volume", options=[["--tar"], ["--tar", "--algo", "zstd"], ["--tar"]])
    disk = SCRATCH / "disk"
    with open(disk, "wb") as file:
        file.truncate(64 * MIB)
    loop = run("losetup", "--find", "--show", disk).strip()
    try:
        # The guest's configuration need not know the loop device, and its /etc may be read-only.
        lvm = ["--config", 'devices{use_devicesfile=0 scan=["/dev"]} activation{monitoring=0} '
                           'backup{backup=0 archive=0}']
        run("vgcreate", *lvm, "-q", "layers", loop)
        nodes = []
        for number, path in enumerate(images.layer):
            run("lvcreate", *lvm, "-q", "-W", "n", "-n", f"layer{number}", "-L", "8m", "layers")
            nodes.append(f"/dev/layers/layer{number}")
            run("dd", f"if={path}", f"of={nodes[-1]}", "bs=1M", "conv=fsync")
        device = ovbd("up", "stack", *nodes).strip()
        tap.result(same(device, images.raw[2]), "layers on logical volumes: content")
        tap.equal([layer["path"] for layer in listed("stack")["layers"]],
                  [f"/dev/mapper/layers-layer{number}" for number in range(3)], "layers on logical volumes: ls")
        ovbd("down", "stack")
    finally:
        subprocess.run(["vgremove", *lvm, "-q", "-f", "layers"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run("losetup", "--detach", loop)


def tables():
    """The tables of all devices, with what a loop device is attached to in place of its number."""
    text = run("dmsetup", "table") + run("dmsetup", "info", "-c", "--noheadings", "-o", "name,uuid,attr")
    names = {}
    for block in os.listdir("/sys/block"):
        for path in ("loop/backing_file", "dm/name"):
            try:
                number = open(f"/sys/block/{block}/dev").read().strip()
                name = open(f"/sys/block/{block}/{path}").read().strip()
            except OSError:
                continue
            # The files without a name.
            names[number] = "unnamed" if name.endswith("(deleted)") else name
    return re.sub(r"\b\d+:\d+\b", lambda match: names.get(match[0], match[0]), text)


def check_dry_run(tap, what, paths, raw, *options):
    before = settled([])
    script = leaves_nothing(tap, f"dry run of {what}", ovbd, "up", "--dry-run", *options, "stack", *paths)
    ovbd("up", *options, "stack", *paths)
    wanted = tables()
    ovbd("down", "stack")
    settled(before)
    run("sh", "-euc", script)
    tap.equal(tables(), wanted, f"pasted dry run of {what}: the same tables, names and UUIDs")
    tap.result(same("/dev/mapper/stack", raw), f"pasted dry run of {what}: content")
    ovbd("down", "stack")
    tap.equal(settled(before), before, f"pasted dry run of {what}: down removes it")


def check_writable(tap, images):
    """Writes go to the COW store and nowhere else."""
    cow = SCRATCH / "some cow"
    digests = [sha256(path) for path in images.layer]
    before = settled([])
    device = ovbd("up", "--writable", "--cow", cow, "--size", "2M", "stack", *images.layer).strip()
    tap.equal(cow.stat().st_size, 2 * MIB, "writable: the COW file has its size")
    tap.result(cow.stat().st_blocks * 512 < 128 << 10, "writable: the COW file is sparse")
    tap.result(same(device, images.raw[2]), "writable: content")
    with open(device, "r+b", buffering=0) as file:
        file.seek(MIB)
        file.write(b"written" * 1000)
        os.fsync(file)
    with open(images.raw[2], "r+b") as file:
        file.seek(MIB)
        file.write(b"written" * 1000)
    tap.result(same(device, images.raw[2]), "writable: content after a write")
    entry = listed("stack")
    tap.equal(entry["cow"]["state"], "valid", "writable: ls says that the snapshot is valid")
    tap.equal(entry["cow"]["path"], str(cow), "writable: ls has the COW file")
    tap.result(8192 <= entry["cow"]["used_bytes"] <= 64 << 10, "writable: ls says how much is used", entry["cow"])
    ovbd("down", "stack")
    tap.equal(settled(before), before, "writable: down leaves nothing")
    tap.equal([sha256(path) for path in images.layer], digests, "writable: the layers did not change")
    ovbd("up", "--writable", "--cow", cow, "stack", *images.layer)
    tap.result(same(device, images.raw[2]), "writable: the same COW file again has the writes")
    ovbd("down", "stack")
    refused(tap, "a COW file of other layers", "written over the layer", "up", "--writable", "--cow", cow, "stack",
            *images.layer[:2])
    ovbd("up", "--ignore-parents", "--writable", "--cow", cow, "stack", *images.layer[:2])
    ovbd("down", "stack")

    ovbd("up", "--writable", "stack", *images.layer)
    with open(device, "r+b", buffering=0) as file:
        file.write(b"gone")
    ovbd("down", "stack")
    tap.equal(settled(before), before, "writable without --cow: down leaves nothing")


def check_udev(tap):
    """Only the device on top has names below /dev/disk, also after events for all devices; with device-mapper's rules alone,
    and with those of ovbd, with which nothing waits for the devices of layers."""
    if not pathlib.Path("/run/udev/control").exists() or os.environ.get("DM_DISABLE_UDEV"):
        tap.skip("hidden devices", "udev does not run")
        return
    raw, layer = SCRATCH / "named.raw", SCRATCH / "named.layer"
    with open(raw, "wb") as file:
        file.truncate(8 * MIB)
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    run("mkfs.ext4", "-q", "-U", uuid, raw)
    ovbd("build", "-o", layer, raw)
    parts = ("named-cow0", "named-lower0", "named-zfile0")
    own = pathlib.Path("/run/udev/rules.d/09-ovbd.rules")
    for rules in ("rules of device-mapper", "own rules"):
        if rules == "own rules":
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(pathlib.Path(os.environ["SRC"], "tools/boot/09-ovbd.rules").read_bytes())
            run("udevadm", "control", "--reload")
        ovbd("up", "--writable", "named", layer)
        for when in (f"{rules}: after up", f"{rules}: after a change of all"):
            run("udevadm", "settle")
            named = os.path.realpath(f"/dev/disk/by-uuid/{uuid}")
            tap.equal(named, os.path.realpath("/dev/mapper/named"), f"{when}: the UUID is that of the device on top")
            for name in parts:
                lines = run("udevadm", "info", "--query=property", f"/dev/mapper/{name}").splitlines()
                tap.result("DM_UDEV_DISABLE_DISK_RULES_FLAG=1" in lines, f"{when}: {name} is hidden", lines)
                tap.equal([line for line in lines if line.startswith("ID_FS_")], [], f"{when}: nobody looked into {name}")
            run("udevadm", "trigger", "--action=change", "--subsystem-match=block")
        run("udevadm", "settle")
        ovbd("down", "named")
        run("udevadm", "settle")
        tap.equal([name for name in parts if os.path.lexists(f"/dev/mapper/{name}")], [], f"{rules}: all nodes go")
    own.unlink()
    run("udevadm", "control", "--reload")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
tap.equal(ovbd("ls"), "", "ls: nothing")
odd, tar = check_kinds(tap)
check_block_devices(tap)
check_volumes(tap)
mixed = [odd.layer[0], odd.layer[1], odd.layer[2]]
check_dry_run(tap, "compressed layers", mixed, odd.raw[2])
check_dry_run(tap, "wrapped layers", tar.layer, tar.raw[2])
check_dry_run(tap, "a writable stack", mixed, odd.raw[2], "--writable")
check_writable(tap, odd)
check_udev(tap)
refused(tap, "down of nothing", "no such stack", "down", "stack")
tap.finish()
