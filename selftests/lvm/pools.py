#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Pools of many kinds: sizes of chunks and extents, external origins, pools that are full, read-only or become full, volumes
with file systems, programs that are missing."""

import contextlib
import json
import os
import pathlib
import random
import sys
import threading
import time

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd, ovbd_fails
from test_script import SCRATCH, Tap, run
from volumes import LAYOUT, MIB, Group, image_content, left, push, set_up_lvm, write_random

tap = Tap()


def pull(name, target):
    """Pulls from the layout; returns what was said."""
    return json.loads(ovbd("pull", "--json", "--thin", target, f"oci:{LAYOUT}:{name}"))


def both_ways(group, pool, name, sizes):
    """A volume of these sizes in KiB, one after the other, is pushed and pulled into the other pool."""
    generator = random.Random(name)
    run("lvcreate", "--yes", "--wipesignatures", "n", "--virtualsize", f"{sizes[0]}k", "--thin", "--name", name, f"{group.name}/{pool}")
    for number, size in enumerate(sizes):
        if number and size != sizes[number - 1]:
            how = ["lvextend"] if size > sizes[number - 1] else ["lvreduce", "--yes", "--force", "--fs", "ignore"]
            run(*how, "--quiet", "--size", f"{size}k", f"{group.name}/{name}")
        write_random(group.node(name), generator, size << 10, 12)
        said = push(f"{name}{number}", f"--snapshot={name}.{number}", f"{group.name}/{name}")
        wanted = (size << 10, group.sha256(f"{name}.{number}"))
        tap.equal(image_content(f"{name}{number}"), wanted, f"{name}: image {number} holds what the volume holds")
        tap.equal(said["base"] is not None, number > 0, f"{name}: image {number} has a base")
        said = pull(f"{name}{number}", f"{group.name}/pulled/{name}-{number}")
        tap.equal(group.sha256(said["volume"].split("/")[1]), wanted[1], f"{name}: pulled {number} holds the same")
    tap.equal(left(group, pool) + left(group, "pulled"), [], f"{name}: nothing is left")


def chunks(devices):
    """Chunks from the smallest to some that are larger than the volume, and no power of two."""
    sizes = os.environ.get("OVBD_CHUNKS", "64k 192k 1m 32m").split()
    # A chunk of each snapshot; all that is not written to is a hole of a file.
    group = Group(devices, "chunks", 900 + 4096 * sizes.count("1g"))
    group.pool("pulled", 300, "--chunksize", "64k")
    for size in sizes:
        group.pool(f"p-{size}.x", 4096 if size == "1g" else 128, "--chunksize", size)
        both_ways(group, f"p-{size}.x", f"v-{size}", [12 << 10, 16 << 10])


def small_extents(devices):
    """Sizes that are no whole blocks of 4 KiB."""
    group = Group(devices, "kib", 300, "--physicalextentsize", "1k")
    group.pool("pool", 60, "--chunksize", "64k")
    group.pool("pulled", 100, "--chunksize", "128k")
    both_ways(group, "pool", "odd", [10241, 10245, 12289, 9219, 9219])


def external_origin(group):
    """A thin volume whose unmapped chunks are those of a volume outside of its pool."""
    for name in ("golden", "golden2"):
        run("lvcreate", "--yes", "--wipesignatures", "n", "--size", "16m", "--name", name, group.name)
        with open(group.node(name), "wb") as device:
            device.write(random.Random(name).randbytes(16 * MIB))
        run("lvchange", "--activate", "n", "--permission", "r", f"{group.name}/{name}")
    run("lvcreate", "--snapshot", "--name", "clone", "--thinpool", f"{group.name}/pool", f"{group.name}/golden")
    run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{group.name}/clone")
    for number in range(3):
        said = push(f"clone{number}", f"--snapshot=clone.{number}", f"{group.name}/clone")
        tap.equal(image_content(f"clone{number}"), (16 * MIB, group.sha256(f"clone.{number}")),
                  f"external origin: image {number} holds what the volume holds")
        if number:
            tap.result(said["read"] < 16 * MIB, f"external origin: push {number} reads what changed", said)
        write_random(group.node("clone"), random.Random(number), 16 * MIB, 8)
    # What both have not written is not the same.
    run("lvcreate", "--snapshot", "--permission", "r", "--name", "other", "--thinpool", f"{group.name}/pool",
        f"{group.name}/golden2")
    status, said = ovbd_fails("push", f"--base={group.name}/clone.0", f"{group.name}/other", f"oci:{LAYOUT}:x")
    tap.result(status == 1 and "another external origin" in said and "--full" in said,
               "a base with another external origin: refused", said)
    run("lvremove", "--yes", f"{group.name}/other")
    tap.equal(left(group), [], "and nothing is left")


def file_systems(group):
    """A volume that is pulled smaller than its base, which has a file system: LVM is not to object."""
    node = group.thin("fs", 48)
    run("mkfs.ext4", "-q", node)
    push("fs0", "--snapshot=fs.0", f"{group.name}/fs")
    pull("fs0", f"{group.name}/pulled/fsp")
    run("lvreduce", "--yes", "--fs", "ignore", "--size", "24m", f"{group.name}/fs")
    push("fs1", "--snapshot=fs.1", f"{group.name}/fs")
    said = pull("fs1", f"{group.name}/pulled/fsp")
    name = said["volume"].split("/")[1]
    tap.equal((group.fields(name)["lv_size"], group.sha256(name)), (str(24 * MIB), group.sha256("fs.1")),
              "a smaller volume over one with a file system")


def refused(group, what, reason, name, target, pool):
    """Passes where a pull is refused for that reason, and leaves nothing."""
    before = set(group.all())
    status, said = ovbd_fails("pull", "--thin", target, f"oci:{LAYOUT}:{name}")
    tap.result(status == 1 and reason in said, f"{what}: refused", f"exit status {status}, wanted: {reason}\n{said}")
    tap.equal((set(group.all()), left(group, pool)), (before, []), f"{what}: nothing is left")


def no_room(group):
    """Zeros need room too where they cannot be discarded, and a pool may become full meanwhile."""
    node = group.thin("zeros", 40)
    with open(node, "wb") as device:
        device.write(random.Random("zeros").randbytes(40 * MIB))
    push("zeros0", "--snapshot=zeros.0", f"{group.name}/zeros")
    run("blkdiscard", "--force", node)
    push("zeros1", "--snapshot=zeros.1", f"{group.name}/zeros")
    group.pool("ignoring", 60, "--discards", "ignore")
    pull("zeros0", f"{group.name}/ignoring/z")
    refused(group, "zeros that cannot be discarded", "needs", "zeros1", f"{group.name}/ignoring/z", "ignoring")

    group.pool("filled", 120, "--errorwhenfull", "y")
    filler = group.thin("filler", 200, "filled")
    with open(group.thin("large", 100), "wb") as device:
        device.write(random.Random("large").randbytes(100 * MIB))
    push("large", "--snapshot=large.0", f"{group.name}/large")
    done = threading.Event()

    def fill():
        """Takes what the pull needs as soon as it has begun."""
        while not done.is_set() and not any(name.endswith(".part") for name in os.listdir(f"/dev/{group.name}")):
            time.sleep(0.001)
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as device:
            for _ in range(60):
                device.write(os.urandom(MIB))
                os.fsync(device.fileno())

    before = set(group.all())
    thread = threading.Thread(target=fill)
    thread.start()
    status, said = ovbd_fails("pull", "--thin", f"{group.name}/filled/large", f"oci:{LAYOUT}:large")
    done.set()
    thread.join()
    tap.result(status == 1 and "large" in said, "a pool that becomes full meanwhile: the pull fails", (status, said))
    tap.equal((set(group.all()), left(group, "filled")), (before, []), "and leaves nothing")
    mode = run("dmsetup", "status", group.target("filled")).split()[7]
    print(f"# the pool is {mode}")
    refused(group, "a pool that is full", "out_of_data_space" if mode != "rw" else "needs", "large",
            f"{group.name}/filled/large", "filled")


def read_only(group):
    """A pool whose metadata cannot change has no metadata snapshot, and takes no volume."""
    group.pool("ro", 40)
    with open(group.thin("v", 8, "ro"), "wb") as device:
        device.write(os.urandom(MIB))
    group.snapshot("v", "v.0", "--permission", "r")
    # Whatever LVM activates, it gives the pool its own table again.
    run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{group.name}/v.0")
    run("sync")
    target = group.target("ro")
    table = run("dmsetup", "table", target).split()
    run("dmsetup", "load", target, input=" ".join([*table[:7], str(int(table[7]) + 1), "read_only", *table[8:]]) + "\n")
    run("dmsetup", "resume", "--noudevsync", target)
    status, said = ovbd_fails("push", f"{group.name}/v.0", f"oci:{LAYOUT}:ro")
    tap.result(status == 1 and "it is read-only" in said, "a read-only pool: nothing is pushed from it", said)
    status, said = ovbd_fails("pull", "--thin", f"{group.name}/ro/x", f"oci:{LAYOUT}:zeros0")
    tap.result(status == 1, "and nothing is pulled into it", said)
    tap.equal([name for name in group.all() if name.startswith("x")], [], "nothing is left")
    run("dmsetup", "load", target, input=" ".join(table) + "\n")
    run("dmsetup", "resume", "--noudevsync", target)
    tap.equal(push("ro", f"{group.name}/v.0")["layers"], 1, "when it can be written to again, it is pushed")
    run("lvchange", "--activate", "n", f"{group.name}/v.0")


def missing_programs(group):
    """A program that is not installed is named with its package."""
    path = os.environ["PATH"]
    for program, package in (("thin_dump", "thin-provisioning-tools"), ("lvs", "lvm2"), ("lvcreate", "lvm2")):
        folder = SCRATCH / f"without-{program}"
        folder.mkdir()
        for other in ("lvs", "lvcreate", "lvchange", "lvremove", "thin_dump", "thin_delta", "blkid"):
            if other != program:
                (folder / other).symlink_to(run("which", other).strip())
        os.environ["PATH"] = str(folder)
        status, said = ovbd_fails("push", "--full", "--snapshot=missing", f"{group.name}/fs", f"oci:{LAYOUT}:missing")
        os.environ["PATH"] = path
        wanted = f"{program} is missing: install the package {package}"
        tap.result(status == 1 and wanted in said, f"without {program}: the package is named", said)
        if program == "thin_dump":
            tap.result("missing" not in group.all() and not left(group), "and no snapshot is left", group.all())


def rounded_up(group):
    """An image that is no whole extent: what is behind its end in the volume is not in the base, and is sent."""
    raw, layer = SCRATCH / "odd.raw", SCRATCH / "odd.layer"
    raw.write_bytes(random.Random("odd").randbytes(9 * MIB + 4096))
    ovbd("build", "-o", layer, raw)
    ovbd("push", layer, f"oci:{LAYOUT}:odd")
    pull("odd", f"{group.name}/pool/tail")
    descriptor = os.open(group.node("tail"), os.O_RDWR)
    os.pwrite(descriptor, b"tail" * 1024, 9 * MIB + 8192)
    os.fsync(descriptor)
    os.close(descriptor)
    said = push("tail", "--snapshot=tail.0", f"{group.name}/tail")
    tap.result(said["base"] is not None, "what was pulled is the base", said)
    tap.equal(image_content("tail"), (12 * MIB, group.sha256("tail.0")), "what is behind the end of its image is sent")


def another_volume(group):
    """The volume is another one by the time it is to be tagged: that one is no image."""
    group.snapshot("fs", "taken", "--permission", "r")
    folder = SCRATCH / "swap"
    folder.mkdir()
    program = folder / "blkid"
    program.write_text("#!/bin/sh\nPATH=/usr/sbin:/usr/bin\n"
                       f"lvrename {group.name}/taken {group.name}/mine >&2\n"
                       f"lvcreate --snapshot --permission r --name taken {group.name}/pool-other >&2\nexit 2\n")
    program.chmod(0o755)
    group.thin("pool-other", 8)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}:{path}"
    status, said = ovbd_fails("push", "--full", f"{group.name}/taken", f"oci:{LAYOUT}:taken")
    os.environ["PATH"] = path
    tap.result(status == 1 and "not the volume any more" in said, "another volume has the name by now: it fails", said)
    tap.equal((group.tags("taken"), group.tags("mine")), ({}, {}), "and neither is tagged")
    tap.equal(group.fields("mine")["lv_active"], "", "under its new name it is made inactive again")


def main():
    set_up_lvm()
    with Devices() as devices:
        chunks(devices)
        small_extents(devices)
        group = Group(devices, "my-vg.1", 1200)
        group.pool("pool", 400)
        group.pool("pulled", 200)
        external_origin(group)
        file_systems(group)
        no_room(group)
        read_only(group)
        missing_programs(group)
        rounded_up(group)
        another_volume(group)
    tap.finish()


main()
