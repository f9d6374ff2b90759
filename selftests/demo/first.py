# SPDX-License-Identifier: GPL-2.0
"""The demo's first machine: a Debian system on a thin volume is pushed to a registry, changed, and pushed again.

/dev/vda is an empty disk, /dev/vdb the raw image of the system. The arguments are the repository, and a folder with the
packages to install and `base.json`, the checksums of the image's files. The last line of the output is JSON.
"""

import json
import pathlib
import subprocess
import sys

from machine import OVBD, SOURCE, SYSTEM, checksums, chroot, mounted, run, runnable, set_up, show, step
from volumes import changed_chunks, read_ranges

REPOSITORY, FILES = sys.argv[1], pathlib.Path(sys.argv[2])
VOLUME = pathlib.Path("/dev/vga/system")


def push(snapshot, *options):
    """Pushes a new snapshot; returns the bytes of the topmost layer of its image."""
    show(OVBD, "push", "--plain-http", *options, f"--snapshot={snapshot}", "vga/system", f"{REPOSITORY}:{snapshot}")
    said = json.loads(run(OVBD, "inspect", "--plain-http", "--json", f"{REPOSITORY}:{snapshot}"))
    return said["layers"][-1]["size"]


def change():
    """Installs a package, deletes the documentation, and configures what the last boot wants."""
    run("cp", *FILES.glob("packages/*.deb"), SYSTEM / "tmp")
    chroot("sh", "-c", "dpkg -i /tmp/*.deb && rm /tmp/*.deb && rm -r /usr/share/doc /usr/share/man")
    print(f"    jq in the system: {chroot('jq', '--version').strip()}")
    for name, folder, mode in (("report", "usr/local/bin", "755"), ("report.service", "etc/systemd/system", "644")):
        run("install", "-m", mode, SOURCE / "selftests/demo" / name, SYSTEM / folder / name)
    (SYSTEM / "etc/hostname").write_text("layers\n")
    # Without an identity it would ask for settings at its first boot.
    chroot("systemd-machine-id-setup")
    chroot("useradd", "--create-home", "visitor")
    run("fstrim", SYSTEM)


def compressed_chunks(old, new):
    """Bytes of the chunks in which two snapshots differ, through zstd."""
    run("lvchange", "--activate", "y", "--ignoreactivationskip", f"vga/{new}")
    zstd = subprocess.Popen(["sh", "-c", "zstd -3 -c | wc -c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for _, data in read_ranges(f"/dev/vga/{new}", changed_chunks("vga", "vga-pool-tpool", old, new)):
        zstd.stdin.write(data)
    said, _ = zstd.communicate()
    run("lvchange", "--activate", "n", f"vga/{new}")
    return int(said)


def main():
    set_up("vga")
    with step("machine A: a Debian system on the thin volume vga/system"):
        run("lvcreate", "--virtualsize", f"{run('blockdev', '--getsize64', '/dev/vdb').strip()}b", "--wipesignatures", "n",
            "--thin", "--name", "system", "vga/pool")
        run("dd", "if=/dev/vdb", f"of={VOLUME}", "bs=1M", "conv=sparse,fsync")
    with step("pushing a snapshot of it"):
        first = push("mon")
    with mounted(VOLUME, "-o", "discard"):
        with step("installing jq, deleting the documentation, a service and its settings"):
            with runnable():
                change()
        with step("checksums of every file as written"):
            found = checksums()
            base = json.loads((FILES / "base.json").read_text())
            print(f"    {len(found)} files and links, {len(found.items() & base.items())} as before")
        with step("pushing a snapshot of it, while it is mounted"):
            second = push("tue", "--algo=zstd")
    show(OVBD, "lvm", "status", "vga")
    with step("what thin_delta and zstd would send"):
        chunks = compressed_chunks("mon", "tue")
    print(json.dumps({"files": found, "layers": [first, second], "chunks": chunks}), flush=True)


main()
