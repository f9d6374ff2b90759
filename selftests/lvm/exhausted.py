#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Pools that have no room left, of data, from which a push goes on, or of metadata; and pools that need a check. What cannot
be done is refused with the reason, leaves nothing, and is done once the pool is mended."""

import os
import pathlib
import random
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd, ovbd_fails
from test_script import SCRATCH, Tap, run
from volumes import CHUNK, LAYOUT, MIB, Group, image_content, left, push, set_up_lvm, write_random

SIZE = 16
# Chunks of the volume that uses up metadata, of which a block has some 126 where they are written in order.
FILLED, APART = 20000, 100
FILLERS = ["filler", "filler1", "filler2", "filler3", "filler4"]
tap = Tap()


def status(group):
    """What device-mapper says of the pool."""
    return run("dmsetup", "status", group.target()).split()


def refused(group, what, reasons, *words):
    """Passes where `ovbd` fails with all of these in the message, and leaves nothing."""
    before = set(group.all())
    ended, said = ovbd_fails(*words)
    tap.result(ended == 1 and all(reason in said for reason in reasons), f"{what}: refused", f"{ended}, wanted {reasons}\n{said}")
    tap.equal((set(group.all()), left(group)), (before, []), f"{what}: nothing is left")


def scatter(node, chunks):
    """Writes a block to each of these chunks; returns whether all could be written."""
    descriptor = os.open(node, os.O_WRONLY)
    try:
        for chunk in chunks:
            os.pwrite(descriptor, b"scattered" * 400, chunk * CHUNK)
        os.fsync(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def use_metadata(group):
    """Writes to chunks of volumes that are so far apart that each copies a block of metadata which others share; returns
    whether all could be written."""
    return all(scatter(group.node(name), range(0, FILLED, APART)) for name in FILLERS)


def no_data(devices):
    """What is there can be pushed from a pool that takes no more."""
    group = Group(devices, "vgfull", 200)
    group.pool("pool", 48, "--errorwhenfull", "y")
    node = group.thin("web", SIZE)
    write_random(node, random.Random("full"), SIZE * MIB, 20)
    push("full0", "--snapshot=full.0", f"{group.name}/web")
    write_random(node, random.Random("more"), SIZE * MIB, 4)
    group.snapshot("web", "full.1", "--permission", "r")
    filler = group.thin("filler", 100)
    tap.equal(scatter(filler, range(1600)), False, "the pool becomes full")
    print(f"# {' '.join(status(group))}", flush=True)
    refused(group, "a snapshot in a full pool", ["vgfull/new", "free space"], "push", "--snapshot=new", f"{group.name}/web",
            f"oci:{LAYOUT}:full1")
    said = push("full1", f"{group.name}/full.1")
    tap.equal((said["base"], image_content("full1")), (f"{group.name}/full.0", (SIZE * MIB, group.sha256("full.1"))),
              "a push from a pool that is full")
    tap.equal(left(group), [], "it leaves nothing")


def mended(group, what, base, name, snapshot):
    """Does what the messages say, and passes where a push and a pull go on from where they were."""
    run("vgchange", "--activate", "n", group.name)
    run("lvconvert", "--yes", "--repair", f"{group.name}/pool")
    run("lvchange", "--activate", "y", f"{group.name}/web")
    run("lvextend", "--poolmetadatasize", "+4m", f"{group.name}/pool")
    # No pull goes into a pool that does not zero new chunks.
    if group.fields("pool")["zero"] != "zero":
        run("lvchange", "--zero", "y", f"{group.name}/pool")
    words = status(group)
    tap.result("needs_check" not in words and "rw" in words, f"{what}: LVM mends it", words)
    said = push(name, f"{group.name}/{snapshot}")
    tap.equal((said["base"], image_content(name)), (f"{group.name}/{base}", (SIZE * MIB, group.sha256(snapshot))),
              f"{what}: and then the push goes on from where it was")
    ovbd("pull", "--thin", f"{group.name}/pool/x", f"oci:{LAYOUT}:full0")
    tap.equal((SIZE * MIB, group.sha256("x")), image_content("full0"), f"{what}: and so does the pull")


def two_snapshots(group, name):
    """A volume with a snapshot that was pushed and a newer one that was not; returns the node of the volume."""
    node = group.thin("web", SIZE)
    write_random(node, random.Random(name), SIZE * MIB, 30)
    push(f"{name}0", f"--snapshot={name}.0", f"{group.name}/web")
    write_random(node, random.Random("later"), SIZE * MIB, 10)
    group.snapshot("web", f"{name}.1", "--permission", "r")
    return node


def no_metadata(devices):
    """Of metadata LVM gives 2 MiB at least."""
    group = Group(devices, "meta", 2200, "--physicalextentsize", "64k")
    group.pool("pool", 2100, "--chunksize", "64k", "--poolmetadatasize", "2m")
    raw = SCRATCH / "scattered.raw"
    with open(raw, "wb") as file:
        file.truncate(2000 * MIB)
    scatter(raw, range(24000))
    ovbd("build", "-o", SCRATCH / "scattered", raw)
    raw.unlink()
    ovbd("push", SCRATCH / "scattered", f"oci:{LAYOUT}:scattered")
    refused(group, "a pull for which there is too little metadata", ["of metadata", "--poolmetadatasize"], "pull", "--thin",
            f"{group.name}/pool/x", f"oci:{LAYOUT}:scattered")
    # What is written once is not filled up with zeros: the pool is sparse down to the memory that it is in.
    run("lvchange", "--zero", "n", f"{group.name}/pool")
    two_snapshots(group, "meta")
    group.thin("filler", FILLED * CHUNK // MIB)
    scatter(group.node("filler"), range(FILLED))
    # LVM makes no snapshots any more when three quarters are full.
    for name in FILLERS[1:]:
        group.snapshot("filler", name, "--setactivationskip", "n")
    tap.equal(use_metadata(group), False, "the metadata becomes full")
    print(f"# {' '.join(status(group))}", flush=True)
    refused(group, "a push where it is full", ["is read-only", "lvconvert --repair"], "push", f"{group.name}/meta.1",
            f"oci:{LAYOUT}:meta1")
    refused(group, "a push of a new snapshot where it is full", ["meta/"], "push", "--snapshot=new", f"{group.name}/web",
            f"oci:{LAYOUT}:meta1")
    mended(group, "metadata that was full", "meta.0", "meta1", "meta.1")


def needs_check(devices):
    """The disk with the metadata fails for a while."""
    group = Group(devices, "check", 200)
    group.pool("pool", 100)
    node = two_snapshots(group, "check")
    metadata = group.target().replace("-tpool", "_tmeta")
    table = run("dmsetup", "table", metadata)
    start, length, _, disk, offset = table.split()
    broken = f"{start} {length} flakey {disk} {offset} 0 60 1 error_writes\n"
    for text, writes in ((broken, False), (table, True)):
        run("dmsetup", "load", metadata, input=text)
        run("dmsetup", "resume", "--noudevsync", metadata)
        if not writes:
            tap.equal(scatter(node, range(SIZE * MIB // CHUNK)), False, "what needs new metadata cannot be written")
    words = status(group)
    print(f"# {' '.join(words)}", flush=True)
    tap.result("needs_check" in words, "the pool needs a check", words)
    refused(group, "a push where a check is needed", ["needs a check", "lvconvert --repair"], "push", f"{group.name}/check.1",
            f"oci:{LAYOUT}:check1")
    refused(group, "a push of a new snapshot where a check is needed", ["check/"], "push", "--snapshot=new",
            f"{group.name}/web", f"oci:{LAYOUT}:check1")
    refused(group, "a pull where a check is needed", ["needs a check", "lvconvert --repair"], "pull", "--thin", f"{group.name}/pool/x",
            f"oci:{LAYOUT}:full0")
    mended(group, "a check", "check.0", "check1", "check.1")


def main():
    set_up_lvm()
    with Devices() as devices:
        no_data(devices)
        no_metadata(devices)
        needs_check(devices)
    tap.finish()


main()
