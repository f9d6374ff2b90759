#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The demo's part inside the guest: a Debian system on a stack of layers is changed twice, each time into a new
layer, and the stack of three is compared with what was written.

/dev/vda has the base layer, packages and the checksums of the base's files; the new layers go there. /dev/vdb is the
raw image that the base layer was made from.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
OVBD = SOURCE / "tools/target/release/ovbd"
DISK = pathlib.Path("/run/layers")
SYSTEM = pathlib.Path("/run/system")
LAYERS = [DISK / "base.zfile", DISK / "second.zfile", DISK / "third.zfile"]
READ_MIB = 96


def run(*command, **options):
    """Runs a command that must succeed; returns its output."""
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors="replace", **options)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit status {result.returncode}\n{result.stdout}")
    return result.stdout


def show(*command):
    """Runs a command as a person would, and shows both."""
    print(f"    # {' '.join(str(word).replace(str(OVBD), 'ovbd') for word in command)}", flush=True)
    for line in run(*command).splitlines():
        print(f"    {line}", flush=True)


@contextlib.contextmanager
def step(title):
    """A progress line, and how long it took."""
    print(f"==> {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


@contextlib.contextmanager
def mounted(device, *options):
    """A mounted system in which programs can run."""
    run("mount", *options, device, SYSTEM)
    run("mount", "--bind", "/dev", SYSTEM / "dev")
    run("mount", "-t", "proc", "proc", SYSTEM / "proc")
    try:
        yield
    finally:
        run("umount", "--recursive", SYSTEM)


def chroot(*command):
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
                   "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
    return run("chroot", SYSTEM, *command, env=environment)


def checksums(top):
    """What every file and link of the file system at `top` is."""
    found = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if not os.path.ismount(os.path.join(folder, name))]
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                found[os.path.relpath(path, top)] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, top)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def size(path):
    return f"{path.stat().st_size / 1e6:.1f} MB"


def install():
    """The second layer: packages are installed, documentation is deleted."""
    packages = sorted((DISK / "packages").glob("*.deb"))
    with step("installing jq with dpkg and deleting the documentation"):
        device = run(OVBD, "up", "--writable", "system", LAYERS[0]).strip()
        with mounted(device):
            run("cp", *packages, SYSTEM / "tmp")
            chroot("sh", "-c", "dpkg -i /tmp/*.deb && rm /tmp/*.deb && rm -r /usr/share/doc /usr/share/man")
            print(f"    jq in the system: {chroot('jq', '--version').strip()}")
    with step("committing what was written as the second layer (lz4)"):
        show(OVBD, "commit", "system", "-o", LAYERS[1])
        run(OVBD, "down", "system")


def edit():
    """The third layer: files that the second boot wants. Returns what the system then holds."""
    with step("a service and its settings on top of both"):
        device = run(OVBD, "up", "--writable", "system", *LAYERS[:2]).strip()
        with mounted(device):
            for name in ("report", "report.service"):
                folder = "usr/local/bin" if name == "report" else "etc/systemd/system"
                run("install", "-m", "755" if name == "report" else "644", SOURCE / "selftests/demo" / name,
                    SYSTEM / folder / name)
            (SYSTEM / "etc/hostname").write_text("layers\n")
            # Without an identity it would ask for settings at its first boot.
            chroot("systemd-machine-id-setup")
            chroot("useradd", "--create-home", "visitor")
            run("sync")
    with step("committing the third layer (zstd)"):
        show(OVBD, "commit", "--algo", "zstd", "system", "-o", LAYERS[2])
    with step("checksums of every file as written"):
        with mounted(device, "-o", "ro"):
            wanted = checksums(SYSTEM)
        run(OVBD, "down", "system")
        print(f"    {len(wanted)} files and links")
    return wanted


def compare(wanted):
    """The stack of three, read-only, against what was written."""
    run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
    with step("the three layers, read-only"):
        show(OVBD, "up", "system", *LAYERS)
        show("dmsetup", "table")
        with mounted("/dev/mapper/system", "-o", "ro"):
            print(f"    jq in the system: {chroot('jq', '-n', '1 + 1').strip()}")
            print(f"    packages in the system: {len(chroot('dpkg-query', '-W').splitlines())}")
            found = checksums(SYSTEM)
    differ = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    base = json.loads((DISK / "base.json").read_text())
    same = sum(base.get(name) == value for name, value in found.items())
    if differ or len(found) < 1000 or same < 1000:
        sys.exit(f"{len(differ)} of {len(found)} files differ from what was written: {sorted(differ)[:10]}; "
                 f"{same} are those of the base")
    print(f"    all {len(found)} files and links are as written; {same} are those of the base image, by the checksum "
          "taken when it was made", flush=True)
    show("dmsetup", "status", "--target", "zfile")
    show(OVBD, "ls")
    show(OVBD, "info", "--map=term", *LAYERS)
    run(OVBD, "down", "system")


def speed():
    """Sequential direct reads of the same data: raw through dm-linear, and from the base layer."""
    sectors = int(run("blockdev", "--getsz", "/dev/vdb"))
    run("dmsetup", "create", "--readonly", "raw", "--table", f"0 {sectors} linear /dev/vdb 0")
    run(OVBD, "up", "base", LAYERS[0])
    rates = {}
    with step(f"reading {READ_MIB} MiB of the base image, raw through dm-linear and from its layer"):
        for name in ("raw", "base", "raw", "base"):
            run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
            start = time.monotonic()
            # The front of an ext4 image is mostly metadata and holes.
            run("dd", f"if=/dev/mapper/{name}", "of=/dev/null", "bs=1M", f"count={READ_MIB}", "skip=64",
                "iflag=direct")
            rates[name] = READ_MIB / (time.monotonic() - start)
    run("dmsetup", "remove", "--retry", "raw")
    run(OVBD, "down", "base")
    return rates


def main():
    for folder in (DISK, SYSTEM):
        folder.mkdir(parents=True)
    with step(f"loading the modules into the stock kernel {os.uname().release}"):
        run("modprobe", "dm-mod")
        for name in ("dm-overlaybd", "dm-zfile"):
            run("insmod", SOURCE / name / f"{name}.ko")
        run("modprobe", "virtio_blk")
        run("udevadm", "settle")
        run("mount", "/dev/vda", DISK)
    show("dmsetup", "targets")
    install()
    compare(edit())
    rates = speed()
    raw = int(run("blockdev", "--getsize64", "/dev/vdb"))
    print(json.dumps({"raw": raw, "layers": [path.stat().st_size for path in LAYERS], "speed": rates}))
    run("umount", DISK)


main()
