#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Layers over original tars, mounted: the files are those of the tars, by tar's own comparison, also where a layer above
removes and replaces some. And a layer of TurboOCI with the tar that it points into."""

import gzip
import os
import pathlib
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from fixture_cases import cases, probe_errors
from ovbd_command import existing, ovbd, refused, settled
from test_script import SCRATCH, Tap, load, run

# Folders of the toolchain root with files of many sizes, links, and names of all kinds.
FOLDERS = ["etc", "usr/share/perl5", "usr/share/zoneinfo", "usr/lib/python3/dist-packages"]
MOUNT = SCRATCH / "mount"


def mounted(name, kind, look):
    """What `look` says while the stack `name` is mounted."""
    device = f"/dev/mapper/{name}"
    run("mount", "-t", kind, "-o", "ro", device, MOUNT)
    try:
        return look()
    finally:
        run("umount", MOUNT)


def same(tar, *options):
    """Whether all members of a tar are the files that are mounted; raises where they are not."""
    run("tar", "--compare", "--file", tar, "--directory", MOUNT, *options)
    return True


def look_at_both(lower, upper):
    """Compares the files of two tars over each other; what is left of those that the upper one removes."""
    same(upper, "--exclude=.wh.*", "etc/passwd")
    same(lower, "--exclude=etc/passwd", "--exclude=etc/hostname", "--exclude=etc/mtab", "usr/share/perl5")
    return [(MOUNT / "etc" / "hostname").exists(), os.listdir(MOUNT / "usr" / "share" / "zoneinfo")]


def check_layers(tap):
    lower, upper = SCRATCH / "lower.tar", SCRATCH / "upper.tar"
    folders = [folder for folder in FOLDERS if os.path.isdir(f"/{folder}")]
    # mke2fs wants every folder to be there before what is in it.
    above = sorted({str(part) for folder in folders for part in pathlib.PurePath(folder).parents if str(part) != "."})
    run("tar", "--create", "--file", lower, "--directory", "/", "--no-recursion", *above, "--recursion", *folders)
    changes = SCRATCH / "changes"
    (changes / "etc").mkdir(parents=True)
    (changes / "etc" / ".wh.hostname").touch()
    (changes / "etc" / "passwd").write_text("nobody\n" * 1000)
    (changes / "usr" / "share" / "zoneinfo").mkdir(parents=True)
    (changes / "usr" / "share" / "zoneinfo" / ".wh..wh..opq").touch()
    run("tar", "--create", "--file", upper, "--directory", changes, "etc", "usr")
    one, two, ext4 = SCRATCH / "one.layer", SCRATCH / "two.layer", SCRATCH / "ext4.layer"
    ovbd("build", "--from-tar", lower, "-o", one)
    ovbd("build", "--base", one, "--from-tar", upper, "-o", two)
    ovbd("build", "--fs", "ext4", "--from-tar", lower, "-o", ext4)
    for layer, kind in ((one, "erofs"), (ext4, "ext4")):
        ovbd("up", "tars", layer)
        tap.result(mounted("tars", kind, lambda: same(lower)), f"{kind}: all files are those of the tar")
        ovbd("down", "tars")
    ovbd("up", "tars", one, two)
    tap.equal(mounted("tars", "erofs", lambda: look_at_both(lower, upper)), [False, []],
              "what the upper tar removes is gone, and the rest is there")
    ovbd("down", "tars")


def check_index(tap):
    """An EROFS of 512-byte blocks without content, of both tars: they are one device."""
    lower, upper = SCRATCH / "lower.tar", SCRATCH / "upper.tar"
    one, two, both = SCRATCH / "one.erofs", SCRATCH / "two.erofs", SCRATCH / "both.erofs"
    run("mkfs.erofs", "--quiet", "--tar=i", one, lower)
    run("mkfs.erofs", "--quiet", "--tar=i", "--aufs", two, upper)
    run("mkfs.erofs", "--quiet", "--ovlfs-strip=1", both, one, two)
    ovbd("up", "tars", one, "--target", lower)
    tap.result(mounted("tars", "erofs", lambda: same(lower)), "an index of one tar: all files are those of the tar")
    sector = run("blockdev", "--getss", "/dev/mapper/tars").strip()
    tap.equal(sector, "512", "its device has blocks of 512 bytes")
    ovbd("down", "tars")
    ovbd("up", "tars", both, "--target", lower, "--target", upper)
    tap.equal(mounted("tars", "erofs", lambda: look_at_both(lower, upper)), [False, []],
              "a merged index of two: what the upper tar removes is gone, and the rest is there")
    ovbd("down", "tars")
    refused(tap, "an index of two tars with one", "--target", "up", "tars", both, "--target", lower)


def check_turbo(tap):
    for directory, case in cases():
        if case["kind"] != "turbo-image" or case["expect"] != "ok":
            continue
        words, packed = [], []
        for layer in case["layers"]:
            target = directory / layer["target"]
            compressed = SCRATCH / f"{case['name']}-{len(packed)}.tar.gz"
            compressed.write_bytes(gzip.compress(target.read_bytes(), 1))
            words += [directory / layer["file"], "--target", target]
            packed += [directory / layer["file"], "--target", compressed]
        for what, stack in (("", words), (", compressed", packed)):
            ovbd("up", "turbo", *stack)
            wrong = probe_errors("/dev/mapper/turbo", case["probes"])
            tap.result(not wrong, f"{case['name']}{what}: probes", "\n".join(wrong))
            ovbd("down", "turbo")
        refused(tap, f"{case['name']} without its target", "--target", "up", "turbo", *words[::3])


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile")
    before = existing()
    MOUNT.mkdir()
    check_layers(tap)
    check_index(tap)
    check_turbo(tap)
    tap.equal(settled(before), before, "no device is left")


tap = Tap()
main(tap)
tap.finish()
