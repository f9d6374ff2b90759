#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Snapshots of a thin volume are pushed one after the other to an image layout: what the image holds is what the snapshot
holds, and only what changed is read and stored."""

import json
import pathlib
import random
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd, ovbd_fails
from test_script import SCRATCH, Tap, run
from volumes import CHUNK, LAYOUT, MIB, Group, image_content, left, push, set_up_lvm, write_random

SIZE = 64
tap = Tap()


def refused(group, what, reason, *words, layout=LAYOUT):
    """Passes where a push fails for that reason, and leaves nothing."""
    status, said = ovbd_fails("push", *words, f"oci:{layout}:x")
    last = said.splitlines()[-1] if said else ""
    tap.result(status == 1 and reason in last, f"{what}: refused", f"exit status {status}, wanted: {reason}\n{said}")
    tap.equal(left(group), [], f"{what}: nothing is left")


def rounds(group, count):
    """Changes, discards, grown volumes: each snapshot against the one before."""
    generator = random.Random("push")
    node = group.node("web")
    size = SIZE * MIB
    write_random(node, generator, size, 60)
    for number in range(count):
        if number == count // 2:
            size += 16 * MIB
            run("lvextend", "--quiet", "--size", f"{size}b", f"{group.name}/web")
        if number:
            write_random(node, generator, size, 12)
        said = push(number, f"--snapshot=web.{number}", f"{group.name}/web")
        tap.equal(image_content(number), (size, group.sha256(f"web.{number}")), f"image {number} holds what the snapshot holds")
        tap.equal(said["layers"], number + 1, f"image {number} has one layer more")
        if number and number != count // 2:
            tap.result(said["read"] <= 2 * said["changed"], f"push {number} reads changed chunks only", said)
            tap.result(said["data"] <= said["changed"], f"push {number} stores what differs", said)
        tap.equal(left(group), [], f"push {number} leaves nothing")
        tags = group.tags(f"web.{number}")
        tap.equal((tags["ovbd.manifest"], tags["ovbd.repo"], tags["ovbd.tag"]),
                  (said["digest"], f"oci:{LAYOUT}", str(number)), f"snapshot {number} says what it is")


def small_changes(group):
    """One sector in a chunk costs one block, and nothing costs nothing."""
    with open(group.node("web"), "r+b") as device:
        device.seek(5 * CHUNK + 512)
        device.write(b"one sector".ljust(512, b"."))
    said = push("one", "--snapshot=one", f"{group.name}/web")
    tap.equal((said["changed"], said["data"]), (CHUNK, 4096), "a sector is a block of 4 KiB in the layer")
    before = said["digest"]
    said = push("none", "--snapshot=none", f"{group.name}/web")
    tap.equal((said["digest"], said["data"]), (before, 0), "a snapshot without changes is the same image")
    said = push("again", f"{group.name}/one")
    tap.equal((said["digest"], said["sent"]), (before, 0), "a snapshot that was pushed gets another name")
    group.snapshot("web", "packed", "--permission", "r")
    push("packed", "--algo=zstd", "--level=9", "--block-size=16k", "--full", f"{group.name}/packed")
    layer, = json.loads(ovbd("inspect", "--json", f"oci:{LAYOUT}:packed"))["layers"]
    tap.equal((layer["content"]["algorithm"], layer["content"]["block_bytes"], image_content("packed")[1]),
              ("zstd", 16 << 10, group.sha256("packed")), "compressed in another way it holds the same")
    run("lvremove", "--yes", f"{group.name}/packed")
    known = set(group.all())
    said = push("dry", "--dry-run", "--snapshot=dry", f"{group.name}/web")
    tap.equal((set(group.all()), left(group)), (known, []), "a dry run leaves nothing")


def checked(group):
    """A base that somebody wrote to and made read-only again: only its content tells."""
    vg = group.name
    push("written", "--snapshot=written", f"{vg}/web")
    said = push("good", "--check", "--snapshot=good", f"--base={vg}/written", f"{vg}/web")
    tap.equal(said["data"], 0, "--check of a base that is its image")
    run("lvchange", "--permission", "rw", f"{vg}/written")
    run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{vg}/written")
    at = 10 * MIB + 4096
    with open(group.node("written"), "r+b") as device:
        device.seek(at)
        byte = device.read(1)[0]
        device.seek(at)
        device.write(bytes([byte ^ 1]))
    run("lvchange", "--activate", "n", f"{vg}/written")
    run("lvchange", "--permission", "r", f"{vg}/written")
    refused(group, "--check of a base that was written to", "is not its image", "--check", f"--base={vg}/written",
            "--snapshot", f"{vg}/web")
    status, said = ovbd_fails("push", "--check", f"--base={vg}/written", "--snapshot", f"{vg}/web", f"oci:{LAYOUT}:x")
    tap.result(f"at byte {at}" in said, "and where it differs is said", said)
    run("lvremove", "--yes", f"{vg}/written", f"{vg}/good")


def status(group):
    """What a push would read is known from metadata."""
    push("status", "--snapshot=status", f"{group.name}/web")
    with open(group.node("web"), "r+b") as device:
        for chunk in (3, 4, 9):
            device.seek(chunk * CHUNK)
            device.write(b"changed")
    run("blkdiscard", "--offset", str(20 * CHUNK), "--length", str(2 * CHUNK), group.node("web"))
    run("sync")
    listed = json.loads(ovbd("lvm", "status", "--json", "--changes", group.name))
    found = [entry for entry in listed if entry["name"] == f"{group.name}/web"]
    tap.equal([(entry["base"], entry["changed"]) for entry in found], [(f"{group.name}/status", 3 * CHUNK)],
              "status says how much may have changed")
    tap.result(found and found[0]["discarded"] in (0, CHUNK, 2 * CHUNK), "and was discarded", found)
    said = push("changed", "--snapshot=changed", f"{group.name}/web")
    tap.equal(said["changed"], 3 * CHUNK, "a push reads as much")
    tap.equal(left(group), [], "status leaves nothing")


def refusals(group):
    """What must not be pushed, or not so."""
    vg = group.name
    refused(group, "a volume that can be written to", "--snapshot", f"{vg}/web")
    refused(group, "a pool", "is a thin pool", "--full", f"{vg}/pool")
    refused(group, "no such volume", "no such logical volume", "--full", f"{vg}/missing")
    refused(group, "a name that is taken", "exists", "--snapshot=web.0", f"{vg}/web")
    group.pool("other", 32)
    group.thin("elsewhere", 16, "other")
    refused(group, "a base in another pool", "is in another pool", f"--base={vg}/web.0", "--snapshot", f"{vg}/elsewhere")
    group.snapshot("web", "plain", "--permission", "r")
    refused(group, "a base that was not pushed", "was not pushed", f"--base={vg}/plain", "--snapshot", f"{vg}/web")
    refused(group, "a base of another repository", "was pushed to", f"--base={vg}/web.0", "--snapshot", f"{vg}/web",
            layout=SCRATCH / "other")
    run("lvchange", "--permission", "rw", f"{vg}/web.0")
    refused(group, "a base that can be written to", "--trust-base", f"--base={vg}/web.0", "--snapshot", f"{vg}/web")
    run("lvchange", "--permission", "r", f"{vg}/web.0")
    run("lvchange", "--addtag", "ovbd.partial", f"{vg}/plain")
    status, said = ovbd_fails("push", f"{vg}/plain", f"oci:{LAYOUT}:x")
    tap.result(status == 1 and "is not complete" in said, "a volume that is not complete: refused", said)
    run("lvremove", "--yes", f"{vg}/plain")
    digest = group.tags("web.1")["ovbd.manifest"].removeprefix("sha256:")
    (LAYOUT / "blobs/sha256" / digest).unlink()
    refused(group, "a base whose image is gone", "is not on", f"--base={vg}/web.1", "--snapshot", f"{vg}/web")
    device = f"{vg.replace('-', '--')}-pool-tpool"
    run("dmsetup", "message", device, "0", "reserve_metadata_snap")
    said = ovbd("lvm", "recover", "--force", f"{vg}/pool")
    tap.result(not group.held() and "released" in said, "recover --force releases a metadata snapshot", said)


def main():
    set_up_lvm()
    with Devices() as devices:
        group = Group(devices, "vg-a.b", 600)
        group.pool("pool", 400, "--chunksize", "64k")
        group.thin("web", SIZE)
        rounds(group, 6)
        small_changes(group)
        checked(group)
        status(group)
        refusals(group)
    tap.finish()


main()
