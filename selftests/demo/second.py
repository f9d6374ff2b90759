# SPDX-License-Identifier: GPL-2.0
"""The demo's second machine: both images are pulled into the pool of its own volume group, each compared file by file with
what the first machine had, and the second one is mapped in place.

/dev/vda is an empty disk, /dev/vdb a file system for the store. The arguments are the repository, and a folder with the
checksums of both images, `base.json` and `changed.json`.
"""

import json
import pathlib
import subprocess
import sys

from machine import OVBD, chroot, checksums, mounted, run, set_up, show, step

REPOSITORY, FILES = sys.argv[1], pathlib.Path(sys.argv[2])


def pull(name):
    """Pulls an image into the pool; returns the name of the volume that holds it."""
    before = volumes()
    show(OVBD, "pull", "--plain-http", "--thin", "vgb/pool/system", f"{REPOSITORY}:{name}")
    volume, = (found for found in volumes() - before if found.startswith("system."))
    return volume


def volumes():
    return set(run("lvs", "--noheadings", "--options", "lv_name", "vgb").split())


def compare(volume, checked_by):
    """A pulled volume against checksums that were taken when it was written, file by file."""
    run("lvchange", "--activate", "y", "--ignoreactivationskip", f"vgb/{volume}")
    with mounted(f"/dev/vgb/{volume}", "-o", "ro"):
        found = checksums()
        packages = len(chroot("dpkg-query", "-W").splitlines())
    wanted = json.loads((FILES / checked_by).read_text())
    differ = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    if differ or len(found) < 1000:
        sys.exit(f"{len(differ)} of {len(found)} files differ from what was written: {sorted(differ)[:10]}")
    print(f"    all {len(found)} files and links of {volume} are as written; it has {packages} packages", flush=True)


def main():
    set_up("vgb")
    store = pathlib.Path("/var/lib/ovbd")
    store.mkdir(parents=True, exist_ok=True)
    run("mount", "/dev/vdb", store)
    with step("machine B: pulling the first image into the thin pool vgb/pool"):
        volume = pull("mon")
    with step("comparing every file"):
        compare(volume, "base.json")
    with step("pulling the second one: a snapshot of the first, and the increment"):
        volume = pull("tue")
    with step("comparing every file"):
        compare(volume, "changed.json")
    with step("the same image mapped in place, from the layers as they are"):
        show(OVBD, "pull", "--plain-http", f"{REPOSITORY}:tue")
        show(OVBD, "up", "system", f"{REPOSITORY}:tue")
        show("dmsetup", "table", "system")
        show(OVBD, "ls")
        show(OVBD, "info", "--map=term", f"{REPOSITORY}:tue")
    with step("comparing it with the volume, byte by byte"):
        subprocess.run(["cmp", "/dev/mapper/system", f"/dev/vgb/{volume}"], check=True)
    run(OVBD, "down", "system")
    key, certificate = (pathlib.Path("/run") / name for name in ("vm.key", "vm.pem"))
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=vm", "-keyout", key, "-out", certificate)
    with step("sealing it: one more layer, with the tree of dm-verity, and a signature of its root hash"):
        show(OVBD, "push", "--plain-http", "--seal", "--sign-key", key, "--certificate", certificate, f"{REPOSITORY}:tue",
             f"{REPOSITORY}:sealed")
    with step("pulling and mapping it as who trusts that key alone"):
        show(OVBD, "pull", "--plain-http", f"{REPOSITORY}:sealed")
        show(OVBD, "up", "--verity", "image", "--certificate", certificate, "system", f"{REPOSITORY}:sealed")
        show(OVBD, "ls")
        root = json.loads(run(OVBD, "ls", "--json"))[0]["verity"]["root"]
    run(OVBD, "down", "system")
    run("umount", store)
    print(json.dumps({"root": root}), flush=True)


main()
