# SPDX-License-Identifier: GPL-2.0
"""The guest of the demo of layers over tars: maps the layer, mounts it, compares all files with the tar, and runs the
container. The arguments are the tar and the layer."""

import hashlib
import pathlib
import sys

from machine import OVBD, SYSTEM, load, mounted, run, show, step

TAR, LAYER = sys.argv[1:]


def main():
    load("loop", "dm-overlaybd", "dm-zfile")
    SYSTEM.mkdir()
    with step("the layer is what the image says"):
        with open(TAR, "rb") as tar:
            digest = hashlib.file_digest(tar, "sha256").hexdigest()
        show(OVBD, "verify", "--diff-id", f"sha256:{digest}", LAYER)
    with step("mapping and mounting it"):
        show(OVBD, "up", "debian", LAYER)
    with mounted("/dev/mapper/debian", "-t", "erofs", "-o", "ro"):
        with step("comparing all files with the tar"):
            show("tar", "--compare", "--file", TAR, "--directory", SYSTEM)
            files = sum(path.is_file() and not path.is_symlink() for path in SYSTEM.rglob("*"))
            print(f"    {files} files, no difference", flush=True)
        with step("running the container"):
            run("mount", "-t", "proc", "proc", SYSTEM / "proc")
            show("chroot", SYSTEM, "sh", "-c", "cat /etc/debian_version; dpkg-query --list | grep -c ^ii; perl -e 'print 6 * 7'")
            run("umount", SYSTEM / "proc")
    show(OVBD, "down", "debian")
    print(f"{pathlib.Path(LAYER).name}: all right", flush=True)


main()
