#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Packages of Debian as layers over their tars: mounted, every file is that of the tar by tar's own comparison, and the tars
come out as they went in, with their digests."""

import hashlib
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from ovbd_command import existing, ovbd, settled
from test_script import SCRATCH, Tap, load, run

DEBS = pathlib.Path(os.environ["OVBD_DEBS"])
SETS = [packages.split() for packages in os.environ["OVBD_DEB_SETS"].split(":")]
MOUNT = SCRATCH / "mount"


def tar_of(package):
    """The tar of a package's files."""
    [deb] = DEBS.glob(f"{package}_*.deb")
    tar = SCRATCH / f"{package}.tar"
    with open(tar, "wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], stdout=file, check=True)
    return tar


def digest(tar):
    return "sha256:" + hashlib.sha256(tar.read_bytes()).hexdigest()


def members(tar):
    """The names of the members, and whether each is a folder."""
    lines = run("tar", "--list", "--quoting-style=literal", "--file", tar).splitlines()
    return {line.rstrip("/"): line.endswith("/") for line in lines}


def check(tap, packages):
    name = "-".join(packages)
    tars = [tar_of(package) for package in packages]
    layers = []
    for tar in tars:
        layer = SCRATCH / f"{tar.stem}.layer"
        base = ["--base", *layers] if layers else []
        said = ovbd("build", *base, "--from-tar", tar, "-o", layer)
        tap.equal(said.split()[0], digest(tar), f"{tar.stem}: the digest of the tar")
        layers.append(layer)
    words = [word for tar in tars for word in ("--diff-id", digest(tar))]
    ovbd("verify", *words, *layers)
    for number, tar in enumerate(tars):
        back = SCRATCH / "back"
        ovbd("export", f"--tar={number}", *layers, "-o", back)
        tap.result(back.read_bytes() == tar.read_bytes(), f"{tar.stem}: the tar comes out as it went in")
        back.unlink()
    ovbd("up", "package", *layers)
    run("mount", "-t", "erofs", "-o", "ro", "/dev/mapper/package", MOUNT)
    try:
        wanted = {}
        for tar in tars:
            listed = members(tar)
            wanted |= listed
            # The folders that both have are those of the upper one; its files are no others.
            run("tar", "--compare", "--file", tar, "--directory", MOUNT,
                *([] if tar is tars[-1] else ["--no-recursion", "--", *(one for one, folder in listed.items() if not folder)]))
        found = [os.path.relpath(os.path.join(folder, one), MOUNT)
                 for folder, folders, files in os.walk(MOUNT) for one in folders + files]
        wanted = {os.path.normpath(one) for one in wanted} - {"."}
        tap.equal(sorted(set(found) ^ wanted), [], f"{name}: {len(found)} files, and all are those of the tars")
    finally:
        run("umount", MOUNT)
        ovbd("down", "package")
    for path in tars + layers:
        path.unlink()


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile")
    before = existing()
    MOUNT.mkdir()
    for packages in SETS:
        check(tap, packages)
    tap.equal(settled(before), before, "no device is left")


tap = Tap()
main(tap)
tap.finish()
