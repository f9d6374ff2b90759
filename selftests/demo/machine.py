# SPDX-License-Identifier: GPL-2.0
"""What both machines of the demo do: modules and network, LVM, commands that are shown, and checksums of a file system."""

import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys
import time

SOURCE = pathlib.Path(os.environ["SRC"])
sys.path.insert(0, str(SOURCE / "selftests/lib"))
from test_script import OVBD, load, run

SYSTEM = pathlib.Path("/run/system")
CHUNK = "64k"
POOL_MIB = 1600
# Nobody watches pools here, and nothing of what LVM does has to be remembered.
LVM = "activation { monitoring=0 }\nbackup { backup=0 archive=0 }\n"


def show(*command):
    """Runs a command as a person would, and shows both."""
    words = [str(word) for word in command]
    print(f"    # {' '.join(words).replace(str(OVBD), 'ovbd')}", flush=True)
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    for line in result.stdout.splitlines():
        print(f"    {line}", flush=True)
    if result.returncode:
        sys.exit(f"{' '.join(words)}: exit status {result.returncode}")


@contextlib.contextmanager
def step(title):
    """A progress line, and how long it took."""
    print(f"==> {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


def set_up(group):
    """Makes the machine ready: modules, the way to the registry, and a volume group with a thin pool on /dev/vda."""
    with step(f"loading the modules into the stock kernel {os.uname().release}; a volume group on an empty disk"):
        load("dm-overlaybd", "dm-zfile", "dm-thin-pool", "virtio_net", "virtio_blk")
        run("udevadm", "settle")
        network = next(path.name for path in pathlib.Path("/sys/class/net").iterdir() if path.name != "lo")
        # What QEMU's network of one machine has.
        run("ip", "address", "add", "10.0.2.15/24", "dev", network)
        run("ip", "link", "set", network, "up")
        folder = pathlib.Path("/run/lvm-of-the-demo")
        folder.mkdir()
        (folder / "lvm.conf").write_text(LVM)
        os.environ["LVM_SYSTEM_DIR"] = str(folder)
        SYSTEM.mkdir()
        run("vgcreate", group, "/dev/vda")
        run("lvcreate", "--size", f"{POOL_MIB}m", "--chunksize", CHUNK, "--thinpool", "pool", group)


@contextlib.contextmanager
def mounted(device, *options):
    """A mounted system."""
    run("mount", *options, device, SYSTEM)
    try:
        yield
    finally:
        run("umount", SYSTEM)


@contextlib.contextmanager
def runnable():
    """The mounted system with what its programs want to find."""
    run("mount", "--bind", "/dev", SYSTEM / "dev")
    run("mount", "-t", "proc", "proc", SYSTEM / "proc")
    try:
        yield
    finally:
        run("umount", SYSTEM / "proc", SYSTEM / "dev")


def chroot(*command):
    """Runs a program of the mounted system; returns what it prints."""
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
                   "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
    return run("chroot", SYSTEM, *command, env=environment)


def checksums():
    """What every file and link of the mounted system is."""
    found = {}
    for folder, folders, files in os.walk(SYSTEM):
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                found[os.path.relpath(path, SYSTEM)] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, SYSTEM)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
